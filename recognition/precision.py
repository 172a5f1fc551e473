"""The number format of a run: of its parameters, of its pixels and of its multiplications."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.load.loader import normalise

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bf16 where it is faster than fp32, on Ampere and newer GPUs.

    Small networks on a CPU gain nothing even with its matrix units: PReLU and depthwise
    convolutions dominate there.
    """
    if precision != "auto":
        return precision
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if is_fast else "fp32"


def resolve_head(head_precision: str, precision: str, device: torch.device) -> str:
    """What head_precision="auto" means for a run of this resolved precision: products of fp32
    numbers do not use a GPU's matrix units, which multiply bf16 ones ten times as fast."""
    if head_precision != "auto":
        return head_precision
    return "bf16" if device.type == "cuda" and precision == "bf16" else "full"


def dtype_of(precision: str) -> torch.dtype:
    """Of parameters and pixels."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


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


class LossScaler:
    """The fp16 loss scale: halved when any rank finds a non-finite gradient, doubled after a run of
    good steps. torch's GradScaler decides on each rank alone, so replicas drift apart; here
    `found_inf` is handed in after the ranks have agreed on it."""

    def __init__(
        self, device: torch.device, initial: float = 65536.0, growth_interval: int = 2000
    ) -> None:
        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), device=device)  # steps so far
        self.growth_interval = growth_interval

    def update(self, found_inf: Tensor) -> None:  # [] not 0: this step was skipped
        """The next step's scale, without a host synchronisation."""
        self.skipped += found_inf
        torch._amp_update_scale_(
            self.scale, self.good_steps, found_inf, 2.0, 0.5, self.growth_interval
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
