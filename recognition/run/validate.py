"""Verification during training: ten-fold accuracy of the present network, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data_tools.common.errors import UserError
from data_tools.load.order import rank_slice
from data_tools.verification_bin import PairSet
from eval.protocols import lfw
from recognition.distributed import collectives
from recognition.precision import embed
from recognition.run.logger import Logger
from recognition.run.state import TrainState
from recognition.weights import freezing

_BATCH = 64  # images


@torch.no_grad()
def verify(
    state: TrainState, logger: Logger, before_batch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Ten-fold accuracy on every val_target, with the images divided among the ranks.

    before_batch: called before each forward pass, equally often on every rank; an exception that it
        raises on all ranks aborts the verification.

    Raises:
        ValueError: on all ranks, if one cannot read an image; the message names the image.
    """
    state.backbone.eval()
    try:
        results = {pairs.name: _score(state, pairs, before_batch) for pairs in state.val_sets}
    finally:
        freezing.train_mode(state.backbone)
    if results:
        short, parts = {}, []
        for pairs in state.val_sets:
            score = results[pairs.name]
            keys = ("accuracy_mean", "accuracy_std", "xnorm")
            short[pairs.name] = {key: score[key] for key in keys}
            mean, std = 100 * score["accuracy_mean"], 100 * score["accuracy_std"]
            count = len(pairs.issame)
            parts.append(f"{pairs.name} {mean:.2f} +- {std:.2f} % of {count} pairs")
        line = "  ".join(parts) + " (+-: the standard deviation over ten folds)"
        record = {"step": state.step, "verification": short}
        logger.record(record, f"step {state.step}  verification  {line}")
    return results


def _score(state: TrainState, pairs: PairSet, before_batch: Callable[[], None]) -> dict[str, Any]:
    rank, world, group = state.runtime.rank, state.runtime.world, state.runtime.group
    slices = [rank_slice(len(pairs.encoded), world, r) for r in range(world)]
    counts = [stop - start for start, stop in slices]
    start, stop = slices[rank]
    # lfw.embed() has two forward passes a batch (plain and mirrored), and at least one.
    left = max(2 * math.ceil(count / _BATCH) or 1 for count in counts)

    def forward(images: np.ndarray) -> np.ndarray:
        nonlocal left
        left -= 1
        before_batch()
        return embed(state.backbone, images, state.precision, state.runtime.device)

    local, failure = None, None
    try:
        where = f"{pairs.name}.bin, counted from image {start}:"
        local = lfw.embed(forward, pairs.encoded[start:stop], _BATCH, where, state.cfg.resize)
    except UserError as error:
        failure = f"rank {rank}: {error}"
    for _ in range(left):  # other ranks have more images, or this one failed early
        before_batch()
    failures = [text for text in collectives.gather_objects(failure, group) if text]
    if failures or local is None:
        raise UserError(f"cannot verify: {'; '.join(failures)}")
    sums, norms = (
        collectives.gather_parts(torch.from_numpy(part), counts, group) for part in local
    )
    return lfw.score(sums.numpy(), norms.numpy(), pairs.issame)
