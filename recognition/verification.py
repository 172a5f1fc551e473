"""Verification while training: ten-fold accuracy of the network as it stands, on all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data_tools.loader import normalise
from data_tools.order import rank_slice
from eval import lfw
from recognition import collectives
from recognition.build import TrainState
from recognition.logger import Logger
from recognition.precision import autocast, dtype_of

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
            lambda images: embed(state, images),
            pairs.encoded[start:stop],
            _BATCH,
            f"{pairs.name}.bin, counted from image {start}:",
        )
        sums, norms = (
            collectives.gather_parts(torch.from_numpy(part), counts, group) for part in local
        )
        results[pairs.name] = lfw.score(sums.numpy(), norms.numpy(), pairs.issame)
    state.backbone.train()
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


def embed(state: TrainState, images: np.ndarray) -> np.ndarray:  # uint8 [n, 112, 112, 3] -> [n, D]
    """Embeddings of the network as it stands, float32."""
    device = state.runtime.device
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, non_blocking=True)
    unflipped = torch.zeros(len(pixels), dtype=torch.bool, device=device)
    with autocast(state.precision, device):
        embeddings = state.backbone(normalise(pixels, unflipped, dtype_of(state.precision)))
    return embeddings.float().cpu().numpy()
