"""The schema of a run: every key, its default, unit and help; and load(), which checks recipes.

A recipe is a Python file that defines `config`, a SimpleNamespace, EasyDict or dict with what
differs from these defaults. `key=value` on the command line passes the same checks.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import runpy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from data_tools.common import files, schema, text
from data_tools.common.errors import UserError, UserKeyError, UserTypeError
from data_tools.common.schema import Option, option

BATCH_SIZE = 128  # images per process and micro-step where neither batch size is given
NUM_EPOCHS = 20.0  # where neither num_epochs nor max_steps is given

_data = partial(option, group="Data")
_network = partial(option, group="Network and weights")
_loss = partial(option, group="Loss")
_optimisation = partial(option, group="Optimisation")
_schedule = partial(option, group="Schedule")
_head = partial(option, group="Head and speed")
_spikes = partial(option, group="Faults and machines")
_machines = partial(option, group="Faults and machines", may_change=True)
_checkpoints = partial(option, group="Checkpoints", may_change=True)
_logging = partial(option, group="Logging and verification", may_change=True)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Lengths are in epochs; steps are optimiser steps."""

    rec: str | list[str] = _data(
        MISSING,
        "Directory of the RecordIO data: shards, or InsightFace's layout. A list is read as one "
        "set, with the classes of each directory after those of the previous one.",
        may_change=True,
    )
    rec_shares: list[int] = _data(
        [], "Share of every batch for each rec, such as [3, 1]; empty: each image once per epoch."
    )
    rec_heads: list[dict] = _data(
        [],
        "A head for each rec, with the keys that differ from the run's; empty: one head over all.",
    )
    val_targets: list[str] = _data(
        [], "Verification sets: names of .bin files in rec, without the extension.", may_change=True
    )
    num_classes: int | None = _data(
        None, "Read from rec; if given, it must match.", may_change=True
    )
    num_image: int | None = _data(None, "Read from rec; if given, it must match.", may_change=True)
    loader: Literal["cpu", "dali"] = _data(
        "cpu",
        "Image decoder; dali uses the GPU if there is one. On the CPU both give the same pixels.",
    )
    num_workers: int = _data(2, "Decoding threads per process.", low=1, may_change=True)
    resize: bool = _data(
        False, "Accept aligned images whose size is not the network's, and resize them."
    )
    crop_augmentation_prob: float = _data(
        0.0, "How often AdaFace's random crop is applied; its models used 0.2.", low=0, high=1
    )
    low_res_augmentation_prob: float = _data(
        0.0, "How often AdaFace's down-sampling is applied; its models used 0.2.", low=0, high=1
    )
    photometric_augmentation_prob: float = _data(
        0.0, "How often AdaFace's colour changes are applied; its models used 0.2.", low=0, high=1
    )
    shuffle_block: int = _data(
        0,
        "Neighbouring images shuffled as one block, for slow disks; 0: each image on its own.",
        low=0,
    )
    shuffle_window: int = _data(64, "Blocks that are read ahead and mixed.", low=1)

    network: str = _network("r50", "Name of the backbone, see Networks.")
    network_args: dict = _network(
        {}, "Further arguments of the backbone: dropout (r*), drop_path, mask_ratio (vit_*)."
    )
    embedding_size: int = _network(512, "Length of an embedding.", low=1)
    init_from: str | None = _network(
        None, "Initial weights of the backbone: a run, or a published weight file.", may_change=True
    )
    init_color_order: Literal["auto", "RGB", "BGR"] = _network(
        "auto",
        "Channel order that init_from was trained on; auto: BGR for AdaFace's, else RGB.",
        may_change=True,
    )
    init_head: str | None = _network(
        None,
        "Initial class centres: features, an .onnx, a run, or a directory of partial FC files.",
        may_change=True,
    )
    init_label_map: str | None = _network(
        None, "File with one line per class: its id in init_head, -1 for none.", may_change=True
    )
    freeze: list[str] = _network(
        [], "Patterns of backbone parameters that are not trained, such as layer1.*."
    )
    teacher: str | None = _network(
        None, "Larger network to learn from: a run, an .onnx, or an .npy [images, D]."
    )
    teacher_weight: float = _network(
        1.0, "Weight of the distance to the teacher in the loss.", low=0
    )
    teacher_loss: Literal["cosine", "feature"] = _network(
        "cosine", "Distance to the teacher's embeddings."
    )

    margin: str = _loss("arcface", "Name of the margin loss, see Losses.")
    margin_args: dict = _loss({}, "Arguments of the loss, for example margin_args.scale=30.")
    sample_rate: float = _loss(
        1.0, "Share of the classes that a step samples as negatives (Partial FC).", low=0, high=1
    )
    num_subcenters: int = _loss(1, "Centres per class; only the nearest is used.", low=1)
    interclass_filtering_threshold: float = _loss(
        0.0, "Negatives with a cosine above this are ignored; 0: off.", low=0, high=1
    )

    batch_size: int | None = _optimisation(
        None,
        f"Images per process and micro-step ({BATCH_SIZE} if global_batch_size is not set).",
        low=1,
        may_change=True,
    )
    global_batch_size: int | None = _optimisation(
        None, "Images per optimiser step over all processes.", low=1, may_change=True
    )
    accumulation: int = _optimisation(1, "Micro-steps per optimiser step.", low=1)
    optimizer: Literal["sgd", "adamw"] = _optimisation(
        "sgd", "Optimiser of the backbone and class rows."
    )
    momentum: float = _optimisation(0.9, "Momentum of SGD.", low=0, high=1)
    weight_decay: float = _optimisation(
        5e-4, "Weight decay of the backbone and the sampled class rows.", low=0
    )
    clip_norm: float | None = _optimisation(
        5.0, "Limit of the backbone's gradient norm; none: off.", low=0
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = _optimisation(
        "auto", "Precision of the backbone; auto: bf16 on GPUs that support it, else fp32."
    )
    sync_bn: bool = _optimisation(False, "Compute BatchNorm statistics over all processes.")
    seed: int = _optimisation(0, "Seed of every random draw.", low=0)

    lr: float = _schedule(0.1, "Learning rate after the warm-up.", low=0)
    schedule: Literal["polynomial", "step", "cosine"] = _schedule(
        "polynomial", "How the learning rate decreases."
    )
    lr_power: float = _schedule(
        1.0, "Exponent of the polynomial; InsightFace's tables used 2.", low=0
    )
    lr_milestones: list[float] = _schedule([], "Milestones of the step schedule.", unit="epochs")
    lr_gamma: float = _schedule(0.1, "Factor at each milestone.", low=0, high=1)
    warmup_epochs: float = _schedule(0.0, "Linear warm-up.", low=0, unit="epochs")
    num_epochs: float | None = _schedule(
        None,
        f"Length of the run ({NUM_EPOCHS:g} if max_steps is not set).",
        low=0,
        high=1e6,
        unit="epochs",
    )
    max_steps: int | None = _schedule(None, "Length of the run.", low=1, unit="steps")

    head_kernel: Literal["auto", "plain", "native", "compiled", "triton"] = _head(
        "auto", "Form of the head's reduction. A form that is not available falls back to plain."
    )
    head_precision: Literal["auto", "full", "bf16"] = _head(
        "auto",
        "Precision of the head's products; sums and logits stay fp32. "
        "auto: bf16 in bf16 runs on GPUs.",
        may_change=True,
    )
    head_storage: Literal["device", "host"] = _head(
        "device", "Where class centres and their optimiser state live.", may_change=True
    )
    head_stored_mib: int | None = _head(
        None,
        "Memory for forward results kept for the backward; null: 16 on a CPU, 1024 on a GPU.",
        low=0,
        unit="MiB per process",
    )
    update_in_backward: bool = _head(
        False, "Update class rows inside the backward. Not with accumulation, fp16 or rollback."
    )
    compile: bool = _head(False, "Compile the backbone with torch.compile.")
    gradient_compression: Literal["none", "bf16"] = _head(
        "none", "Compression of the backbone's gradients between ranks."
    )
    profile: bool = _head(False, "Write trace-<rank>.json of a few steps.", may_change=True)

    loss_spike_factor: float | None = _spikes(
        None, "A loss this many times its running mean is a spike; none: off.", low=1
    )
    norm_spike_factor: float | None = _spikes(
        None, "A gradient norm this many times its running mean is a spike; none: off.", low=1
    )
    on_spike: Literal["warn", "stop", "rollback"] = _spikes(
        "warn", "rollback: return to the newest checkpoint and skip the samples up to the spike."
    )
    max_rollbacks: int = _spikes(3, "Rollbacks of a run before it stops.", low=1)
    elastic: Literal["auto", "batch_size", "accumulation", "lr"] = _machines(
        "auto", "What adapts when a run resumes at another world size."
    )
    collective_timeout: float = _machines(
        600.0,
        "How long a rank waits in a collective before all processes exit.",
        low=1,
        unit="seconds",
    )
    preflight_seconds: float = _machines(
        10.0, "Time limit of the checks at the start; 0: off.", low=0, unit="seconds"
    )
    debug: bool = _machines(
        False, "Compare what should be equal on all ranks, and record the images of each step."
    )
    debug_every: int = _machines(100, "Steps between two comparisons.", low=1, unit="steps")

    output: str = _checkpoints("runs/default", "Run directory; default: runs/<name of the recipe>.")
    resume: str | None = _checkpoints(
        "auto", "auto: the newest checkpoint of output; none: a new run; or a checkpoint directory."
    )
    checkpoint_every: int = _checkpoints(
        2000, "Steps between two checkpoints; the last step is always saved.", low=1, unit="steps"
    )
    save_async: bool = _checkpoints(
        True, "Write in the background during training; needs a copy of the state in host memory."
    )
    keep_checkpoints: int = _checkpoints(3, "How many of the newest checkpoints to keep.", low=1)
    keep_every: int | None = _checkpoints(
        None, "Also keep the checkpoint of every multiple of this step count.", low=1, unit="steps"
    )
    keep_best: str | None = _checkpoints(None, "Also keep the best one on this val_target.")

    log_every: int = _logging(10, "Steps between two log lines.", low=1, unit="steps")
    verify_every: int = _logging(
        2000,
        "Steps between two verifications; also before the first and after the last step.",
        low=1,
        unit="steps",
    )

    @property
    def recs(self) -> list[str]:
        return [self.rec] if isinstance(self.rec, str) else self.rec

    def recorded(self) -> dict[str, Any]:
        """Every key as a run records it, with absolute paths."""
        return with_absolute_paths(dataclasses.asdict(self))

    def global_batch(self, world: int) -> int:
        """Images of one optimiser step."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        return (self.batch_size or BATCH_SIZE) * world * self.accumulation

    def total_steps(self, num_images: int, world: int) -> int:
        if self.max_steps is not None:
            return self.max_steps
        epochs = NUM_EPOCHS if self.num_epochs is None else self.num_epochs
        return max(math.ceil(epochs * num_images / self.global_batch(world)), 1)


# Keys that a data set's own head may set; loss_weight is 1 if absent.
HEAD_KEYS = (
    "margin",
    "margin_args",
    "interclass_filtering_threshold",
    "sample_rate",
    "num_subcenters",
    "loss_weight",
)

# Two keys for the same thing: a recipe or a command line may set one of them.
_ALTERNATIVES = [("batch_size", "global_batch_size"), ("max_steps", "num_epochs")]

# Keys whose values are paths.
_PATHS = {"rec", "init_from", "init_head", "init_label_map", "teacher", "output"}

# Keys of arcface_torch: what to write instead.
_RENAMED = {
    "num_epoch": "num_epochs",
    "warmup_epoch": "warmup_epochs",
    "gradient_acc": "accumulation",
    "fp16": 'precision="fp16"',
    "dali": 'loader: "cpu" or "dali"',
    "verbose": "verify_every",
    "frequent": "log_every",
    "save_all_states": "checkpoint_every (every checkpoint resumes)",
}


def load(path: str, overrides: Sequence[str] = (), safe: bool = False) -> Config:
    """The recipe at `path` with `key=value` overrides, checked.

    A .json holds the keys as one object; anything else is Python, and is run. safe: refuse that.

    Raises:
        FileNotFoundError: no such recipe.
        PermissionError: it is Python, and `safe`.
        KeyError: an unknown key; the message names the nearest.
        TypeError, ValueError: a value of the wrong type or out of its range.
    """
    if not files.is_file(path):
        raise FileNotFoundError(f"no recipe at {path}")
    json_recipe = path.endswith(".json")
    if safe and not json_recipe:
        raise PermissionError(
            f"{path} is a program, which --safe does not run: give its keys in a .json"
        )
    recipe = text.read_json(path) if json_recipe else _run_recipe(path)
    if isinstance(recipe, SimpleNamespace):
        recipe = vars(recipe)
    if not isinstance(recipe, Mapping):
        raise UserTypeError(
            f"{path} defines no `config`: a SimpleNamespace, an EasyDict or a dict with the keys "
            "it sets"
        )
    values = _translate(dict(recipe), path)
    if "output" not in values:
        values["output"] = os.path.join("runs", os.path.splitext(os.path.basename(path))[0])
    typed = _translate(_parse(overrides), "the command line")
    for pair in _ALTERNATIVES:
        if any(key in typed for key in pair):
            values = {key: value for key, value in values.items() if key not in pair}
    if "rec" in typed:  # these describe the recipe's own data
        values = {k: v for k, v in values.items() if k not in ("num_classes", "num_image")}
    for what in ("margin", "network"):
        args = f"{what}_args"
        if what in typed and typed[what] != values.get(what):
            values.pop(args, None)  # they belong to the recipe's
        for key in [key for key in typed if key.startswith(f"{args}.")]:
            typed[args] = {**values.get(args, {}), **typed.get(args, {})}
            typed[args][key.removeprefix(f"{args}.")] = typed.pop(key)
    return make(values | typed)


def _run_recipe(path: str) -> object:
    """The `config` of a Python recipe.

    Its code may raise anything. That is the user's error in the user's file, so the message names
    the line instead of a traceback through this package.
    """
    try:
        return runpy.run_path(path).get("config")
    except SyntaxError as error:
        where = "" if error.filename in (None, path) else f"{error.filename}, "
        what = f"{where}line {error.lineno}: {type(error).__name__}: {error.msg}"
        raise UserError(f"{path} does not run: {what}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame for frame in frames if frame.filename == path]
        where = f"line {lines[-1].lineno} (`{lines[-1].line}`): " if lines else ""
        raise UserError(f"{path} does not run: {where}{type(error).__name__}: {error}") from error


def make(values: Mapping[str, Any]) -> Config:
    """A Config of `values`, whose names, types and ranges are checked."""
    checked = schema.checked(Config, values)
    if checked.get("clip_norm") == 0:
        raise UserError("clip_norm=0 would stop the backbone: a positive number, or none for off")
    if checked.get("update_in_backward"):
        excluded = {"precision": "fp16", "on_spike": "rollback"}
        clash = [key for key, value in excluded.items() if checked.get(key) == value]
        for key in ["accumulation"] * (checked.get("accumulation", 1) > 1) + clash:
            raise UserError(
                f"update_in_backward with {key}={checked[key]}: it keeps no gradient of the class "
                "rows to accumulate, scale or drop; choose one of the two"
            )
    if isinstance(checked.get("rec"), list) and len(checked["rec"]) < 2:
        checked["rec"] = "".join(checked["rec"])
    if checked.get("init_label_map") and not checked.get("init_head"):
        raise UserError(
            "init_label_map maps the classes of init_head=, which is missing: give that too"
        )
    for name in checked.get("val_targets", []):
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise UserError(f"val_targets={name!r}: the name of a .bin of rec, not a path")
    if not checked.get("rec"):
        raise UserKeyError("rec is missing: name the data set to train on, rec=DIRECTORY")
    cfg = Config(**checked)
    for k in range(len(cfg.rec_heads)):
        of_head(cfg, k)
    return cfg


def with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with every path absolute: it means the same in another working directory."""

    def absolute(path: Any) -> Any:
        if isinstance(path, list):
            return [absolute(each) for each in path]
        return os.path.abspath(path) if path else path

    return {key: absolute(value) if key in _PATHS else value for key, value in values.items()}


def of_head(cfg: Config, k: int) -> Config:
    """The configuration of a data set's own head.

    Raises:
        KeyError, TypeError, ValueError: as make(), and for a key that is not of a head.
    """
    place = f"rec_heads[{k}]"
    own = _translate(dict(cfg.rec_heads[k]), place)
    for key in own:
        if key not in HEAD_KEYS:
            raise UserKeyError(
                f"{place}: unknown key {key!r}: {schema.nearest(str(key), HEAD_KEYS)}"
            )
    loss_weight = own.pop("loss_weight", 1.0)
    schema.checked_value(f"{place}: loss_weight", loss_weight, float, Option("", low=0))
    if own.get("margin", cfg.margin) != cfg.margin:
        own.setdefault("margin_args", {})  # the run's belong to its own margin
    try:
        return make({**dataclasses.asdict(cfg), "rec_heads": [], **own})
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error.args[0]}") from error


def _translate(values: dict[str, Any], place: str) -> dict[str, Any]:
    """Map arcface_torch's margin_list; refuse its other keys, naming ours."""
    if values.get("resume") is False:  # arcface_torch's default
        values["resume"] = None
    for key in values:
        if key in _RENAMED:
            raise UserKeyError(f"{key} in {place} is called {_RENAMED[key]} here")
    for pair in _ALTERNATIVES:
        if all(values.get(key) is not None for key in pair):
            raise UserError(f"{place} sets both {pair[0]} and {pair[1]}: keep one")
    if "margin_list" in values:
        margins = values.pop("margin_list")
        if "margin" in values or "margin_args" in values:
            raise UserError(f"{place} sets margin_list beside margin or margin_args: keep one")
        if not isinstance(margins, list | tuple) or len(margins) != 3:
            raise UserError(f"margin_list={margins!r} in {place}: expected (m1, m2, m3)")
        m1, m2, m3 = margins
        values |= {"margin": "combined", "margin_args": {"m1": m1, "m2": m2, "m3": m3}}
    return values


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not key=value")
        try:
            typed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            typed[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return typed
