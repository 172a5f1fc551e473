"""The data of a run: checks before it starts, verification sets, and this rank's batches."""

from __future__ import annotations

from typing import Any

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.images.decode import check_size
from data_tools.load.augment import Probabilities
from data_tools.load.dali import Dali
from data_tools.load.loader import BatchSource, Loader
from data_tools.shards import FORMAT, INDEX, Shards, check_labels
from data_tools.union import Union
from data_tools.verification_bin import PairSet, load_bin
from eval.protocols import lfw
from recognition.backbones.input import INPUT_SIZE
from recognition.config import Config
from recognition.head import multi_head
from recognition.run.state import TrainState


def open_val_set(data: Shards | Union, name: str, resize: bool) -> PairSet:
    """The pairs of a val_target; a set that cannot be verified on fails now, not at the first
    verification."""
    pairs = load_bin(data.bin_path(name.removesuffix(".bin")))
    same = int(pairs.issame.sum())
    if len(pairs.issame) < 10 or same in (0, len(pairs.issame)):
        raise UserError(
            f"{name}.bin has {same} pairs of one person and {len(pairs.issame) - same} of two: ten "
            "folds need ten pairs, and pairs of both kinds"
        )
    lfw.count_resized(pairs, resize)
    return pairs


def check_data(cfg: Config, data: Shards | Union, world: int) -> None:
    """Refuse counts, batches and image sizes that do not fit the data.

    Raises:
        ValueError: the message names the key.
    """
    for name, stated, true in [
        ("num_classes", cfg.num_classes, data.num_classes),
        ("num_image", cfg.num_image, data.num_images),
    ]:
        if stated is not None and stated != true:
            raise UserError(f"{name}={stated}, but {cfg.rec} has {true}: leave {name} out")
    # From step to step a set's share of the batch may vary by one row.
    sets = cfg.rec_shares or cfg.rec_heads
    least = cfg.global_batch(world) // (world * cfg.accumulation) - len(sets)
    if least < 2:
        raise UserError(
            f"a global batch of {cfg.global_batch(world)} over {world} processes and "
            f"{cfg.accumulation} micro-steps leaves {least} images for one: BatchNorm needs 2"
        )
    if cfg.keep_best is not None and cfg.keep_best not in cfg.val_targets:
        targets = ",".join(cfg.val_targets)
        raise UserError(f"keep_best={cfg.keep_best} is not one of val_targets={targets}")
    if cfg.keep_best is not None and cfg.checkpoint_every % cfg.verify_every:
        raise UserError(
            f"keep_best={cfg.keep_best} needs every checkpoint verified: checkpoint_every="
            f"{cfg.checkpoint_every} must be a multiple of verify_every={cfg.verify_every}"
        )
    check_labels(data)
    if data.image_size is not None:
        height, width = data.image_size
        check_size(width, height, INPUT_SIZE, f"the images of {cfg.rec}", cfg.resize)


def hashes_of(data: Shards | Union) -> list[dict[str, str]]:
    """Hashes of the data sets. The run records them because a directory may be repacked later."""
    hashes = []
    for one in data.sets if isinstance(data, Union) else [data]:
        if one.index["format"] == FORMAT:
            digest, of = files.sha256(one.path / INDEX), "index.json"
        else:
            digest, of = one.sha256, "labels and offsets"
        hashes.append({"name": one.path.name, "sha256": digest, "of": of})
    return hashes


def make_loader(state: TrainState) -> BatchSource:
    """This rank's batches from `state.samples_seen` on."""
    cfg, runtime = state.cfg, state.runtime
    stream: dict[str, Any] = dict(
        seed=cfg.seed,
        global_batch=cfg.global_batch(runtime.world),
        world=runtime.world,
        rank=runtime.rank,
        accumulation=cfg.accumulation,
        samples_seen=state.samples_seen,
        workers=cfg.num_workers,
        resize=cfg.resize,
        blocks=state.order.blocks,
        shares=multi_head.shares(cfg, state.data),
        chances=Probabilities(
            cfg.crop_augmentation_prob,
            cfg.low_res_augmentation_prob,
            cfg.photometric_augmentation_prob,
        ),
    )
    if cfg.loader == "dali":
        return Dali(state.data, device=runtime.device, **stream)
    return Loader(state.data, pin_memory=runtime.device.type == "cuda", **stream)
