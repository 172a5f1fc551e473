"""Verification while training: ten-fold accuracy of the network as it stands, on all ranks."""

from __future__ import annotations

from typing import Any

import torch

from data_tools.order import rank_slice
from eval import lfw
from recognition import collectives, freezing
from recognition.build import TrainState
from recognition.embedding import embed
from recognition.logger import Logger

_BATCH = 64  # images


@torch.no_grad()
def verify(state: TrainState, logger: Logger) -> dict[str, Any]:
    """Ten-fold accuracy on every val_target, the images spread over the ranks."""
    rank, world, group = state.runtime.rank, state.runtime.world, state.runtime.group
    state.backbone.eval()
    results = {}
    for pairs in state.val_sets:
        counts = [
            stop - start
            for start, stop in (rank_slice(len(pairs.encoded), world, r) for r in range(world))
        ]
        start, stop = rank_slice(len(pairs.encoded), world, rank)
        local = lfw.embed(
            lambda images: embed(state.backbone, images, state.precision, state.runtime.device),
            pairs.encoded[start:stop],
            _BATCH,
            f"{pairs.name}.bin, counted from image {start}:",
        )
        sums, norms = (
            collectives.gather_parts(torch.from_numpy(part), counts, group) for part in local
        )
        results[pairs.name] = lfw.score(sums.numpy(), norms.numpy(), pairs.issame)
    freezing.train_mode(state.backbone)
    if results:
        short = {
            name: {key: score[key] for key in ("accuracy_mean", "accuracy_std", "xnorm")}
            for name, score in results.items()
        }
        line = "  ".join(
            f"{name} {100 * score['accuracy_mean']:.2f} +- {100 * score['accuracy_std']:.2f} %"
            for name, score in short.items()
        )
        record = {"step": state.step, "verification": short}
        logger.record(record, f"step {state.step}  verification  {line}")
    return results
