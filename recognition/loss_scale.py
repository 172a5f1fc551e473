"""The fp16 loss scale."""

from __future__ import annotations

import torch
from torch import Tensor


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
