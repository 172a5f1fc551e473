"""Verification while training: ten-fold accuracy of the network as it stands, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data_tools.common.errors import UserError
from data_tools.load.order import rank_slice
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
    """Ten-fold accuracy on every val_target, the images spread over the ranks.

    before_batch: called before each use of the network, equally often on every rank; what it raises on all
    of them alike ends the verification.

    Raises:
        ValueError: on every rank alike; an image that some rank cannot read, named.
    """
    state.backbone.eval()
    try:
        results = {pairs.name: _score(state, pairs, before_batch) for pairs in state.val_sets}
    finally:
        freezing.train_mode(state.backbone)
    if results:
        short = {
            name: {key: score[key] for key in ("accuracy_mean", "accuracy_std", "xnorm")}
            for name, score in results.items()
        }
        num_pairs = {pairs.name: len(pairs.issame) for pairs in state.val_sets}
        line = "  ".join(
            f"{name} {100 * score['accuracy_mean']:.2f} +- {100 * score['accuracy_std']:.2f} % of "
            f"{num_pairs[name]} pairs"
            for name, score in short.items()
        )
        line += " (+-: the standard deviation over ten folds)"
        record = {"step": state.step, "verification": short}
        logger.record(record, f"step {state.step}  verification  {line}")
    return results


def _score(
    state: TrainState, pairs: lfw.PairSet, before_batch: Callable[[], None]
) -> dict[str, Any]:
    rank, world, group = state.runtime.rank, state.runtime.world, state.runtime.group
    slices = [rank_slice(len(pairs.encoded), world, r) for r in range(world)]
    counts = [stop - start for start, stop in slices]
    start, stop = slices[rank]
    left = max(_uses(count) for count in counts)

    def forward(images: np.ndarray) -> np.ndarray:
        nonlocal left
        left -= 1
        before_batch()
        return embed(state.backbone, images, state.precision, state.runtime.device)

    local, failure = None, None
    try:
        where = f"{pairs.name}.bin, counted from image {start}:"
        local = lfw.embed(forward, pairs.encoded[start:stop], _BATCH, where, state.cfg.resize)
    except ValueError as error:
        failure = f"rank {rank}: {error}"
    for _ in range(left):  # of those that have more images, or could read theirs
        before_batch()
    failures = [text for text in collectives.gather_objects(failure, group) if text]
    if failures or local is None:
        raise UserError(f"cannot verify: {'; '.join(failures)}")
    sums, norms = (
        collectives.gather_parts(torch.from_numpy(part), counts, group) for part in local
    )
    return lfw.score(sums.numpy(), norms.numpy(), pairs.issame)


def _uses(images: int) -> int:
    """How often lfw.embed() uses the network: on each batch and its mirror image, at least once."""
    return 2 * -(-images // _BATCH) or 1
