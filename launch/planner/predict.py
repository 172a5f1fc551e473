"""What a run will need, before it is started: memory, traffic, steps, hours, disk.

    python -m launch.plan launch/configs/wf42m_r100_cosface_pfc02.py --gpus 64 --memory 80
    python -m launch.plan RECIPE --gpus 8 --memory 24 --classes 10000000 sample_rate=0.1
    python -m launch.plan RECIPE --gpus 8 --images-per-second 9000        (or --measured RUN)

Predicted, not measured: sums over what the head, the backbone and the optimisers hold
(tests/launch/planner/test_predict.py compares them with measured bytes), the activations as
autograd keeps
them for the backward. The libraries' own memory (CUDA context, cuDNN, nccl) is not in it: keep some
GB free. Not in it either: what a loss keeps of each class (KappaFace's sums are as large as the
centres), its slow copy of the network, a teacher. rec_heads are planned as one head over all
classes. Time on the wire is bytes over --bandwidth, no overlap, no latency.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any, NamedTuple

from data_tools.common import cli
from data_tools.common.errors import UserError
from data_tools.union import open_all
from launch.planner.advice import advice
from launch.planner.backbone_memory import BackboneSizes, backbone_bytes, backbone_sizes
from launch.planner.course import Course, Pace, course, measured_pace
from recognition import config
from recognition.config import Config
from recognition.head.async_copy import BUFFER_BYTES
from recognition.head.chunks import size_for
from recognition.head.multi_head import limits_of, make_run_margin

_FP32, _INT64 = 4, 8
_GB = 1e9


class Prediction(NamedTuple):
    gpu: dict[str, float]  # bytes per GPU, by part
    wire: dict[str, float]  # bytes that a GPU sends per step, by collective
    host: dict[str, float]  # bytes per process in the host's memory, by part (head_storage=host)
    bus: float  # bytes between it and its GPU per step

    @property
    def total(self) -> float:
        return sum(self.gpu.values())


def plan(cfg: Config, num_classes: int, gpus: int, is_cuda: bool = True) -> Prediction:
    """What each of `gpus` processes holds and sends."""
    batch = cfg.global_batch(gpus) // cfg.accumulation  # rows of a micro-step over all
    rows = math.ceil(batch / gpus)
    return Prediction(
        head_bytes(cfg, num_classes, gpus, batch, is_cuda) | backbone_bytes(cfg, rows),
        _wire(cfg, batch, gpus, backbone_sizes(cfg, rows)),
        *host_bytes(cfg, num_classes, gpus, batch),
    )


def head_bytes(
    cfg: Config, num_classes: int, gpus: int, batch: int, is_cuda: bool = True
) -> dict[str, float]:
    """Bytes of the head on one process; `batch` rows over all."""
    size, columns = cfg.embedding_size, cfg.num_subcenters
    local, missed, sampled, row, state = _rows(cfg, num_classes, gpus, batch)
    piece = min(size_for(batch, size, columns, _FP32, is_cuda), sampled)
    piece_bytes = max(batch * piece * columns * _FP32, 1)
    limit = limits_of(cfg).stored_on(is_cuda)
    is_narrow = _keeps_bf16(cfg, is_cuda)
    kept_bytes = piece_bytes / 2 if is_narrow else piece_bytes  # of a piece that is kept
    stored = limit // kept_bytes * kept_bytes
    on_host, is_sampled = cfg.head_storage == "host", cfg.sample_rate < 1
    # A sample's rows and state are copied, and AdamW takes memory for its deviation and its step.
    # The update after the backward goes in larger pieces.
    is_copied = is_sampled and not on_host
    updating = (state if is_copied else 0) + (2 * row if cfg.optimizer == "adamw" else 0)
    # The gradient of a piece is written where it stays, unless it is added to or goes elsewhere.
    apart = cfg.update_in_backward or cfg.accumulation > 1 or (on_host and not is_sampled)
    at_work = row * (apart + is_copied) + (updating if cfg.update_in_backward else 0)
    whole = min(sampled, size_for(0, size, columns, _FP32, is_cuda))
    updated = (row if is_copied else 0) + updating
    staged = 0.0
    if on_host:  # two stages of sampled rows; or two pieces of all rows, those of the update larger
        pieces = piece if cfg.update_in_backward else whole
        staged = 2 * (sampled + missed if is_sampled else pieces) * (row + state)
    gradient = 0.0 if cfg.update_in_backward else sampled * row
    logits = batch * sampled * columns * _FP32
    kept = min(stored, math.ceil(sampled / max(piece, 1)) * kept_bytes)  # in whole pieces
    # Beside a piece: the embeddings, their directions, those times the scale and times their share
    # of the gradient, and the gradient; of the targets what they add to both, and their centres.
    vectors = batch * size * _FP32
    gathered = 5 * vectors + 3 * vectors / gpus + batch * _INT64
    # [B, n * K] at once: cosines and exponentials, one less where all are kept; of sub-centres also
    # eight [B, n], of the nearest, its int64 place, and the formula with its gradient.
    products = 2 + (8 / columns if columns > 1 else 0) - (stored >= logits and not is_narrow)
    index = 2 * _INT64 if cfg.sample_rate < 1 else 0
    return {
        "classes: weights": 0 if on_host else local * row,
        "classes: optimiser state": 0 if on_host else local * state,
        "classes: rows on their way": staged,
        "classes: sub-centre votes": local * columns * _INT64 if columns > 1 else 0,
        "classes: gradient": 0 if on_host and not is_sampled else gradient,
        "classes: indices and norms": sampled * (index + columns * _FP32),
        "logits kept": kept,
        "logits or update of a piece": max(
            products * piece_bytes + piece * at_work,
            vectors,  # the gradient of the embeddings, before and after its normalisation
            0 if cfg.update_in_backward else whole * updated - gathered,  # those are free by then
        ),
        "gathered embeddings": gathered,
    }


def _keeps_bf16(cfg: Config, is_cuda: bool) -> bool:
    """Whether what the plain form keeps are exponentials in bf16."""
    is_auto = cfg.head_precision == "auto" and is_cuda and cfg.precision in ("auto", "bf16")
    is_plain = cfg.num_subcenters == 1 and make_run_margin(cfg).leaves_negatives
    return is_plain and (is_auto or cfg.head_precision == "bf16")


def host_bytes(
    cfg: Config, num_classes: int, gpus: int, batch: int
) -> tuple[dict[str, float], float]:
    """Bytes of the head in the host's memory for one process, and those that pass between the two
    in a step."""
    if cfg.head_storage == "device":
        return {}, 0.0
    local, _, sampled, row, state = _rows(cfg, num_classes, gpus, batch)
    held = {
        "classes: weights": local * row,
        "classes: optimiser state": local * state,
        "copies' buffers": 2.0 * BUFFER_BYTES,
    }
    moved = 2 * (row + state)
    if cfg.sample_rate == 1:  # the weights come twice or thrice, the gradient goes and comes
        moved += row
        if not cfg.update_in_backward:
            held["classes: gradient"] = local * row
            moved += 2 * row * cfg.accumulation + row
        moved += 2 * row * (cfg.accumulation - 1)
    return held, sampled * moved


def _rows(
    cfg: Config, num_classes: int, gpus: int, batch: int
) -> tuple[int, float, float, int, int]:
    """Of one process: classes, those of a batch that the draw misses, classes of a sample; bytes of
    a class's centres and of their optimiser state."""
    local = math.ceil(num_classes / gpus)
    row = cfg.num_subcenters * cfg.embedding_size * _FP32
    missed = (1 - cfg.sample_rate) * batch / gpus  # each on the one rank that holds its class
    sampled = min(cfg.sample_rate * local + missed, local)
    return local, missed, sampled, row, 2 * row + _FP32 if cfg.optimizer == "adamw" else row


def _wire(cfg: Config, batch: int, gpus: int, backbone: BackboneSizes) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by rings: (W - 1) / W of the whole for a gather or a
    scatter, twice that for a sum."""
    once = (gpus - 1) / gpus
    ring = once * cfg.accumulation
    # Embeddings travel in their own format, or in that of the head's products; their gradient is
    # summed in fp32.
    sent = cfg.embedding_size * (2 if cfg.head_precision == "bf16" else backbone.embedding_itemsize)
    gradients = backbone.weights / (2 if cfg.gradient_compression == "bf16" else 1)
    statistics = 2 * once * backbone.statistics
    if cfg.sync_bn:  # means and variances gathered from all, and two sums in the backward
        statistics = (gpus + 2) * ring * backbone.statistics
    return {
        "gather of embeddings and labels": ring * batch * (sent + _INT64),
        "sum of target cosines": 2 * ring * batch * _FP32,
        "merge of log-sum-exps": 2 * 2 * ring * batch * _FP32,  # a maximum and a sum
        "scatter of their gradients": ring * batch * cfg.embedding_size * _FP32,
        "sum of the backbone's gradients": 2 * once * gradients,
        "BatchNorm's statistics": statistics,
    }


@cli.on_one_line()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", help="a Python file that defines `config`")
    add("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    add("--gpus", type=int, required=True, metavar="N", help="processes in all, one a GPU")
    add("--memory", type=float, metavar="GB", help="of one GPU; says what fits")
    add("--classes", type=int, metavar="C", help="instead of those of rec")
    add("--images", type=int, metavar="N", help="instead of those of rec")
    add("--images-per-second", type=float, metavar="X", help="pace of all GPUs; gives the hours")
    add("--measured", metavar="RUN", help="a run directory whose log states the pace")
    add("--bandwidth", type=float, default=25.0, metavar="GB/S", help="of a GPU; %(default)s")
    add("--json", action="store_true", help="one JSON line last")
    args = parser.parse_intermixed_args(arguments)
    for option in ("gpus", "memory", "classes", "images", "images_per_second", "bandwidth"):
        number = getattr(args, option)
        if number is not None and not number > 0:
            raise UserError(f"--{option.replace('_', '-')} {number:g}: a number above 0")
    if args.images_per_second and args.measured:
        raise UserError("--images-per-second and --measured both state a pace: keep one")
    unread = [] if args.classes is None else ["rec=-"]  # then a recipe needs no data
    cfg = config.load(args.recipe, [*args.overrides, *unread])
    num_classes, num_images = _counts(cfg, args)
    if num_classes < args.gpus:
        raise UserError(f"--gpus {args.gpus}: 1 to {num_classes}, the number of classes")
    found = plan(cfg, num_classes, args.gpus)
    hints = advice(
        cfg,
        args.gpus,
        (args.memory or math.inf) * _GB,
        lambda one, gpus: plan(one, num_classes, gpus).total,
    )
    report = _report(found, num_classes, args, hints)
    if num_images:
        pace = None
        if args.images_per_second:
            pace = Pace(args.images_per_second, "the pace was stated, not measured")
        elif args.measured:
            pace = measured_pace(args.measured, args.gpus)
        report |= _report_course(course(cfg, num_classes, num_images, args.gpus, pace), num_images)
    else:
        print("steps, hours and disk need the number of images: --images N")
    if args.json:
        print(json.dumps(report))
    return 0


def _counts(cfg: Config, args: argparse.Namespace) -> tuple[int, int | None]:
    """Classes and images, from the flags, the recipe or its data; None: images unknown."""
    num_classes, num_images = args.classes or cfg.num_classes, args.images or cfg.num_image
    if num_classes and (num_images or args.classes):
        return num_classes, num_images
    try:
        data = open_all(cfg.rec)
    except OSError as error:
        if num_classes:
            return num_classes, num_images
        raise OSError(f"{error}; --classes C --images N plan without the data") from error
    return num_classes or data.num_classes, num_images or data.num_images


def _report_course(found: Course, num_images: int) -> dict[str, Any]:
    print(
        f"{found.steps} steps of {found.batch} images, {found.batch_per_gpu} at once on a GPU: "
        f"{found.epochs:.2f} epochs of {num_images} images"
    )
    if found.hours is None:
        print("hours: --images-per-second X or --measured RUN states the pace")
    else:
        print(f"hours: {found.hours:.1f}")
    print(f"disk: {sum(found.disk.values()) / _GB:.3f} GB")
    for part, size in found.disk.items():
        print(f"  {size / _GB:9.3f} GB  {part}")
    for words in found.unmeasured:
        print(f"assumed for the {words}")
    return {
        "steps": found.steps,
        "batch": found.batch,
        "batch_per_gpu": found.batch_per_gpu,
        "epochs": found.epochs,
        "hours": found.hours,
        "disk_bytes": found.disk,
        "assumed": found.unmeasured,
    }


def _report(
    found: Prediction, num_classes: int, args: argparse.Namespace, hints: list[str]
) -> dict[str, Any]:
    print(f"{num_classes} classes on {args.gpus} GPUs, predicted, of each GPU:")
    for part, size in sorted(found.gpu.items(), key=lambda entry: -entry[1]):
        print(f"  {size / _GB:9.3f} GB  {part}")
    print(f"  {found.total / _GB:9.3f} GB  in all")
    sent = sum(found.wire.values())
    print(
        f"sent in a step: {sent / _GB:.3f} GB, {1e3 * sent / args.bandwidth / _GB:.1f} ms at "
        f"{args.bandwidth:g} GB/s"
    )
    for part, size in found.wire.items():
        print(f"  {size / 1e6:9.3f} MB  {part}")
    if found.host:
        print(
            f"in the host's memory, for each GPU: {sum(found.host.values()) / _GB:.3f} GB; "
            f"between the two in a step: {found.bus / _GB:.3f} GB"
        )
    fits = None
    if args.memory is not None:
        fits = not hints
        verdict = "fits" if fits else "does not fit"
        would = "" if fits else "; would fit with: " + "; or ".join(hints)
        print(f"{verdict} into {args.memory:g} GB{would}")
    return {
        "classes": num_classes,
        "gpus": args.gpus,
        "bytes": found.gpu,
        "total": found.total,
        "wire_bytes": found.wire,
        "wire_seconds": sent / args.bandwidth / _GB,
        "fits": fits,
        "advice": hints,
        "host_bytes": found.host,
        "bus_bytes": found.bus,
    }


if __name__ == "__main__":
    sys.exit(main())
