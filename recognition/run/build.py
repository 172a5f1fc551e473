"""build(cfg, runtime) assembles a run: data, network, heads, optimisers and schedule."""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from data_tools.common.draws import Purpose, hash_words
from data_tools.common.errors import UserError
from data_tools.load import dali
from data_tools.load.loader import make_order
from data_tools.load.order import ShuffleBlocks
from data_tools.union import open_all
from eval.protocols import lfw
from recognition import checkpoint
from recognition.backbones import make_backbone
from recognition.config import Config
from recognition.distributed.runtime import Runtime
from recognition.distributed.store_exchange import check_same, run_on_all_ranks
from recognition.distributed.sync_batch_norm import SyncBatchNorm
from recognition.head import PartialFC, multi_head
from recognition.head.kernels.autotune import choose_all
from recognition.optim import RowAdamW, RowSGD
from recognition.precision import LossScaler, dtype_of, embed, resolve, resolve_head
from recognition.run import resume
from recognition.run.data import check_data, hashes_of, open_val_set
from recognition.run.nonfinite import FiniteGuard
from recognition.run.run_dir import commit, initial_weights
from recognition.run.schedule import AdaptedRun, Schedule, adapt
from recognition.run.spikes import make_guard, skipped
from recognition.run.state import TrainState
from recognition.weights import distill, head_init, saved_rows
from recognition.weights.freezing import freeze, train_mode


def build(cfg: Config, runtime: Runtime) -> TrainState:
    """The state of a new run, or of a run that resumes from a checkpoint.

    Raises:
        ValueError, KeyError, FileNotFoundError: the configuration or the data has a mistake.
    """
    if cfg.loader == "dali":
        dali.check_installed()
    resumed_from, damaged = resume.choose_checkpoint(cfg, runtime)
    manifest = checkpoint.read_manifest(resumed_from, True) if resumed_from else None
    plan = adapt(cfg, manifest, runtime.world)
    cfg = plan.cfg
    data = open_all(cfg.rec)
    blocks = ShuffleBlocks(cfg.shuffle_block, cfg.shuffle_window) if cfg.shuffle_block else None
    order = make_order(data, cfg.seed, multi_head.shares(cfg, data), blocks)
    multi_head.check_rows(cfg, order, runtime.world)
    labels_crc32 = zlib.crc32(np.ascontiguousarray(data.labels).data)
    check_same(
        runtime.group,
        val_targets=cfg.val_targets,
        num_images=data.num_images,
        num_classes=data.num_classes,
        labels_crc32=labels_crc32,
    )
    check_data(cfg, data, runtime.world)
    val_sets = [open_val_set(data, name, cfg.resize) for name in cfg.val_targets]
    precision = resolve(cfg.precision, runtime.device)
    dtype = dtype_of(precision)

    messages = list[str]()
    for pairs in val_sets if cfg.resize else []:
        count = lfw.count_resized(pairs, cfg.resize)
        messages.append(f"{pairs.name}.bin: {count} of {len(pairs.encoded)} images are resized")
    backbone = _make_backbone(cfg, runtime, dtype, resumed_from is None, messages)
    model = _distribute(cfg, backbone, runtime)
    head_precision = resolve_head(cfg.head_precision, precision, runtime.device)
    if head_precision != cfg.head_precision and head_precision == "bf16":
        messages.append(
            "head_precision=auto: the head multiplies bf16 numbers, with sums and logits in fp32, "
            "as the run is bf16; head_precision=full multiplies fp32 numbers, which is slower"
        )
    heads = [
        head.to(runtime.device, dtype)
        for head in multi_head.make_heads(cfg, data, runtime.group, head_precision)
    ]
    saved_forms = manifest["config"].get("head_forms") if manifest else None
    choices = choose_all(cfg, heads, runtime.world, saved_forms)
    optimizer = _make_optimizer(cfg, backbone)
    scaler = LossScaler(runtime.device) if precision == "fp16" else None
    encoder = None
    if multi_head.encoder_momentum(heads) is not None:
        encoder = _new_network(cfg).to(runtime.device, dtype).eval().requires_grad_(False)
        encoder.load_state_dict(backbone.state_dict())
    head_parts = [checkpoint.HeadParts(head, _row_optimizer(cfg, head)) for head in heads]
    parts = checkpoint.Parts(backbone, optimizer, head_parts, scaler, encoder)
    schedule = _make_schedule(plan.first(), len(data), runtime.world)
    state = TrainState(
        cfg,
        runtime,
        data,
        order,
        val_sets,
        precision,
        model,
        parts,
        schedule,
        FiniteGuard(runtime.group, runtime.device),
        facts={
            "commit": commit(),
            "world": runtime.world,
            "precision": precision,
            "head_precision": head_precision,
            "num_classes": data.num_classes,
            "num_image": data.num_images,
            "labels_crc32": labels_crc32,
            "data_sha256": hashes_of(data),
            "first_batch": plan.first_batch,
            "first_rows": plan.first_rows,
            "head_forms": [choice.form for choice in choices],
        },
        messages=messages + [choice.message for choice in choices if choice.message],
        damaged=damaged,
        spikes=make_guard(cfg, runtime.group, runtime.device),
        skipped=skipped(cfg.output, None),
    )
    if cfg.teacher is not None:
        state.teacher = distill.open_teacher(
            cfg.teacher, cfg.embedding_size, len(data), runtime.device, precision
        )
        state.messages.append(
            f"teacher={cfg.teacher}: {cfg.teacher_loss} loss, teacher_weight={cfg.teacher_weight:g}"
        )
    if resumed_from is not None:
        _load(state, plan, schedule, resumed_from)
    elif cfg.init_head is not None:
        _start_centres(state)
    else:
        state.messages.append(f"all {data.num_classes} class centres start at random")
    return state


def _load(state: TrainState, plan: AdaptedRun, first: Schedule, path: str) -> None:
    """Continue from the checkpoint at `path`; first: the schedule of the start of the run."""
    cfg, manifest = state.cfg, checkpoint.load(path, state.parts)
    state.step, state.samples_seen = manifest["step"], manifest["samples_seen"]
    state.saved_by, state.loaded_step = manifest["world"], manifest["step"]
    state.skipped = skipped(cfg.output, manifest)
    if state.spikes is not None and manifest.get("spikes"):
        state.spikes.load(manifest["spikes"])
    state.changes = resume.list_changes(manifest["config"], cfg, state.facts, path)
    due = state.step % cfg.verify_every == 0 and not manifest.get("metrics", True)
    pending = manifest.get(checkpoint.PENDING, False)
    state.owes_verification = bool(state.val_sets) and (due or pending)
    state.schedule = plan.schedule(first, state.step, state.samples_seen)
    state.elastic_message = plan.message
    was, batch = manifest["global_batch"], cfg.global_batch(state.runtime.world)
    if was != batch:
        state.changes.append(f"global batch {was} -> {batch}")
    resume.refuse_ignored(state, manifest["config"], path)


def _start_centres(state: TrainState) -> None:
    """Initialise the class centres of this rank from init_head."""
    cfg, runtime = state.cfg, state.runtime
    if len(state.parts.heads) > 1:
        raise UserError("init_head fills one head only: leave it out of a run of several heads")
    assert cfg.init_head is not None

    source = str(cfg.init_head)
    saved_rows.verify(source, runtime.group)

    def fill() -> int:
        state.backbone.eval()
        try:
            return head_init.start_centres(
                state.head,
                source,
                cfg.init_label_map,
                state.data,
                lambda images: embed(state.backbone, images, state.precision, runtime.device),
                cfg.resize,
            )
        except UserError as error:  # it may concern this rank's images only
            raise OSError(str(error)) from error

    filled = run_on_all_ranks(runtime.group, "start the class centres", fill)
    train_mode(state.backbone)
    state.facts["centres_started"] = sum(filled)
    others = state.data.num_classes - sum(filled)
    state.messages.append(
        f"init_head={source}: {sum(filled)} class centres start from {head_init.origin(source)}"
        + f"; the other {others} at random" * bool(others)
    )


def _new_network(cfg: Config) -> nn.Module:
    return make_backbone(cfg.network, cfg.embedding_size, cfg.network_args)


def _make_backbone(
    cfg: Config, runtime: Runtime, dtype: torch.dtype, is_new_run: bool, messages: list[str]
) -> nn.Module:
    """The backbone on its device, with the weights of init_from in a new run."""
    torch.manual_seed(hash_words(cfg.seed, Purpose.NETWORK) >> 1)  # the same network on every rank
    backbone = _new_network(cfg)
    if cfg.init_from and is_new_run:
        color_order = None if cfg.init_color_order == "auto" else cfg.init_color_order
        weights = initial_weights(cfg.init_from, color_order)
        checkpoint.load_state(backbone, weights, cfg.init_from)
        messages.append(f"init_from={cfg.init_from}: {len(weights)} tensors of the network loaded")
    if cfg.freeze:
        freeze(backbone, cfg.freeze)
    if cfg.sync_bn:
        backbone = SyncBatchNorm.convert(backbone, runtime.group)
    train_mode(backbone)
    return backbone.to(runtime.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _distribute(cfg: Config, backbone: nn.Module, runtime: Runtime) -> DistributedDataParallel:
    """The backbone wrapped in DDP, with its buckets in their final order.

    DDP reorders its buckets after the first backward, which changes the order in which three or
    more ranks are summed. One backward before the first step makes a resumed run sum in the same
    order as a run that was never interrupted.
    """
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    new_name = "forward_sync_buffers" in known  # torch 2.13 renamed it
    buffers: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    model = DistributedDataParallel(
        backbone,
        device_ids=ids,
        process_group=runtime.group,
        gradient_as_bucket_view=True,
        **buffers,
    )
    if cfg.gradient_compression == "bf16":
        # DDP accepts the hook by name for nccl only; wrapped in a lambda it also runs on gloo.
        model.register_comm_hook(
            runtime.group, lambda group, bucket: bf16_compress_hook(group, bucket)
        )
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    parameter = next(backbone.parameters())
    model(
        torch.zeros(2, 3, 112, 112, dtype=parameter.dtype, device=runtime.device)
    ).sum().backward()
    model.zero_grad(set_to_none=True)
    for name, buffer in backbone.named_buffers():
        buffer.copy_(before[name])
    if cfg.compile:
        # In place, so that its parameters keep their names. After the backward above, whose two
        # images would compile a graph that no step uses and make the batch a dynamic size.
        backbone.compile()
    return model


def _make_optimizer(cfg: Config, backbone: nn.Module) -> Optimizer:
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    if cfg.optimizer == "adamw":
        return AdamW(parameters, cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    optimizer = SGD(
        parameters, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=True
    )
    # torch's fused step allocates the momentum buffer uninitialised and leaves it so when it skips.
    for parameter in parameters if cfg.momentum else []:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _row_optimizer(cfg: Config, head: PartialFC) -> RowSGD | RowAdamW:
    if cfg.optimizer == "adamw":
        return RowAdamW(head, weight_decay=cfg.weight_decay)
    return RowSGD(head, cfg.momentum, cfg.weight_decay)


def _make_schedule(cfg: Config, num_images: int, world: int) -> Schedule:
    steps_per_epoch = num_images / cfg.global_batch(world)
    return Schedule(
        cfg.schedule,
        cfg.lr,
        total_steps=cfg.total_steps(num_images, world),
        warmup_steps=round(cfg.warmup_epochs * steps_per_epoch),
        power=cfg.lr_power,
        milestones=[round(epoch * steps_per_epoch) for epoch in cfg.lr_milestones],
        gamma=cfg.lr_gamma,
    )
