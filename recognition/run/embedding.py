"""What a network in training gives for images, outside of a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from data_tools.load.loader import normalise
from recognition.precision import autocast, dtype_of


@torch.no_grad()
def embed(
    backbone: nn.Module,
    images: np.ndarray,  # uint8 RGB [n, 112, 112, 3]
    precision: str,
    device: torch.device,
) -> np.ndarray:
    """Embeddings [n, D] of the network as it stands, float32."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, non_blocking=True)
    unflipped = torch.zeros(len(pixels), dtype=torch.bool, device=device)
    with autocast(precision, device):
        embeddings = backbone(normalise(pixels, unflipped, dtype_of(precision)))
    return embeddings.float().cpu().numpy()
