"""Learning rates, the optimisers of the sampled class rows, and the fp16 loss scale.

Letters: C_r classes of this rank, S sampled, K sub-centres, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recognition.head import PartialFC

_PIECE_ELEMENTS = 4 << 20  # rows are updated in pieces, so the temporaries stay small


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step."""

    kind: str  # "polynomial" | "step" | "cosine"
    lr: float  # after the warm-up
    total_steps: int
    warmup_steps: int = 0
    power: float = 1.0  # of the polynomial
    milestones: Sequence[int] = ()  # steps after which "step" multiplies by gamma
    gamma: float = 0.1

    def lr_at(self, step: float) -> float:
        """The rate of the optimiser step that follows `step` completed ones.

        Linear warm-up to lr over warmup_steps; then lr * (1 - p)^power, lr * (1 + cos(pi p)) / 2,
        or lr * gamma^(milestones passed), with p the share done of the steps after the warm-up.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        after = max(self.total_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / after, 1.0)
        if self.kind == "polynomial":
            return self.lr * (1.0 - done) ** self.power
        if self.kind == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * done)) / 2
        return self.lr * self.gamma ** sum(step >= milestone for milestone in self.milestones)


class _RowOptimizer:
    """Steps the sampled rows of a head and what its margin learns; all other rows and their state
    stay bit-identical.

    The margin's numbers are stepped without decay, at its lr_factor: those of a class only in steps
    that gave them a gradient, those of the model after their gradients are summed over the ranks.
    """

    def __init__(self, head: PartialFC, weight_decay: float) -> None:
        self.head = head
        self.weight_decay = weight_decay
        self.state = self._new_state(head.weight.detach())  # by class
        self.model_state: dict[str, Tensor] = {}  # the same on all ranks
        for name, parameter in head.margin.named_parameters():
            state = self._new_state(_as_rows(parameter.detach()))
            self._state_of(name).update({f"margin.{name}.{k}": v for k, v in state.items()})

    @torch.no_grad()
    def step(
        self,
        lr: float,
        grad_scale: Tensor | None = None,  # [] the gradients are this much too large
        found_inf: Tensor | None = None,  # [] not 0: change nothing
    ) -> None:
        """Update the rows that the head sampled since the last step, and end the head's step."""
        sampled = self.head.end_step(found_inf)
        gradient = sampled.gradient().flatten(1)  # [S, K * D]
        weight = self.head.weight.detach().flatten(1)  # [C_r, K * D]
        for name, tensor in self.state.items():
            if tensor.dtype != weight.dtype or tensor.device != weight.device:
                raise TypeError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the class rows {weight.dtype} "
                    f"on {weight.device}: make the row optimizer after moving the head"
                )
        own = {k: v.flatten(1) for k, v in self.state.items() if not k.startswith("margin.")}
        tensors = {"weight": weight} | own
        size = max(_PIECE_ELEMENTS // max(weight.shape[1], 1), 1)
        for start in range(0, len(gradient), size):
            where = slice(start, start + size)
            rows = where if sampled.index is None else sampled.index[where]
            grad = gradient[where]
            if grad_scale is not None:
                grad = grad / grad_scale.to(grad.dtype)
            before = {name: tensor[rows] for name, tensor in tensors.items()}
            after = self._update(grad, lr, self.weight_decay, **before)
            for name, tensor in tensors.items():
                new = after[name]
                if found_inf is not None:
                    new = torch.where(found_inf > 0, before[name], new)
                tensor[rows] = new
        self._step_margin(lr, grad_scale, found_inf)

    def _step_margin(self, lr: float, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        margin = self.head.margin
        for name, grad in self.head.margin_gradients().items():
            parameter = _as_rows(margin.get_parameter(name).detach())  # [C_r, n] or [1, n]
            prefix = f"margin.{name}."
            state = {
                key.removeprefix(prefix): tensor
                for key, tensor in self._state_of(name).items()
                if key.startswith(prefix)
            }
            grad = _as_rows(grad)
            if grad_scale is not None:
                grad = grad / grad_scale.to(grad.dtype)
            touched = (grad != 0).any(1, keepdim=True)
            if found_inf is not None:
                touched = touched & (found_inf == 0)
            before = {"weight": parameter} | state
            after = self._update(grad, lr * margin.lr_factor, 0.0, **before)
            for key, tensor in before.items():
                tensor.copy_(torch.where(touched, after[key], tensor))
            margin.get_parameter(name).grad = None
        margin.project()

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """Where the state of a parameter of the margin stands."""
        return self.state if name in self.head.margin.per_class else self.model_state

    def _new_state(self, rows: Tensor) -> dict[str, Tensor]:
        """State at the start for some rows [n, ...], a row for each."""
        raise NotImplementedError

    def _update(self, grad: Tensor, lr: float, decay: float, **rows: Tensor) -> dict[str, Tensor]:
        """New values of the weight and the state of some rows [n, K * D]."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """State by global class id: `classes` int64 [C_r], and a row for each in the others, but
        for what a margin learns for the whole model."""
        device = self.head.weight.device
        classes = torch.arange(*self.head.shard, device=device)
        return {"classes": classes, **self.state, **self.model_state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the rows of this rank's classes from a state that holds them, in any order.

        Raises:
            KeyError: a class of this rank, or a kind of state, is not in it.
        """
        if set(state) != set(self.state_dict()):
            expected = sorted(self.state_dict())
            raise KeyError(f"row state {sorted(state)}, expected {expected}")
        classes, order = state["classes"].sort()
        own = torch.arange(*self.head.shard, device=classes.device)
        place = torch.searchsorted(classes, own).clamp_max(len(classes) - 1)
        missing = own[classes[place] != own]
        if len(missing):
            raise KeyError(f"no state for {len(missing)} classes, the first {int(missing[0])}")
        for name, tensor in self.state.items():
            tensor.copy_(state[name][order[place]])
        for name, tensor in self.model_state.items():
            tensor.copy_(state[name])


class RowSGD(_RowOptimizer):
    """SGD with momentum on the sampled rows: v = momentum v + g + decay w;  w = w - lr v.

    Momentum and decay of a row act only in the steps that sample it (lazy, as in Partial FC of
    2021).
    """

    def __init__(self, head: PartialFC, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        self.momentum = momentum
        super().__init__(head, weight_decay)

    def _new_state(self, rows: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(rows)}

    def _update(self, grad: Tensor, lr: float, decay: float, **rows: Tensor) -> dict[str, Tensor]:
        velocity = rows["momentum"] * self.momentum
        velocity += grad
        velocity.add_(rows["weight"], alpha=decay)
        return {"weight": rows["weight"] - lr * velocity, "momentum": velocity}


class RowAdamW(_RowOptimizer):
    """AdamW (arXiv:1711.05101 algorithm 2) on the sampled rows, with a step count for every row.

    The count corrects the bias of a row by the steps that it took part in: a row seen for the
    first time late in training is not divided by a correction that others have outgrown.
    """

    def __init__(
        self,
        head: PartialFC,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 5e-4,
    ) -> None:
        self.betas, self.eps = betas, eps
        super().__init__(head, weight_decay)

    def _new_state(self, rows: Tensor) -> dict[str, Tensor]:
        return {
            "exp_avg": torch.zeros_like(rows),
            "exp_avg_sq": torch.zeros_like(rows),
            "steps": rows.new_zeros(len(rows), 1),
        }

    def _update(self, grad: Tensor, lr: float, decay: float, **rows: Tensor) -> dict[str, Tensor]:
        beta1, beta2 = self.betas
        steps = rows["steps"] + 1  # [n, 1]
        mean = rows["exp_avg"].lerp(grad, 1 - beta1)
        square = rows["exp_avg_sq"] * beta2 + (1 - beta2) * grad.square()
        unbiased = mean / (1 - beta1**steps)
        deviation = (square / (1 - beta2**steps)).sqrt() + self.eps
        weight = rows["weight"] * (1 - lr * decay) - lr * unbiased / deviation
        return {"weight": weight, "exp_avg": mean, "exp_avg_sq": square, "steps": steps}


def _as_rows(tensor: Tensor) -> Tensor:
    """A view [n, ...] -> [n, numbers of each]; a single number -> [1, 1]."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)


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
