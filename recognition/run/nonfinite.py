"""The guard against inf and nan: found on the device, agreed on by all ranks, named on the host."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from recognition.distributed.collectives import gather_objects, largest_over_ranks


class FiniteGuard:
    """Checks the tensors of each step. All ranks skip a step that has a non-finite tensor;
    raise_if_found() then stops the run and names the tensors."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._found = torch.zeros((), device=device)  # 1.0 once a step was not finite
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._flags: Tensor | None = None  # bool [names] of that first step
        self._names: list[str] = []

    @torch.no_grad()
    def check(
        self, tensors: Mapping[str, Tensor], step: int, tolerated: Mapping[str, Tensor]
    ) -> Tensor:
        """1.0 if any tensor on any rank is not finite, else 0.0: float32 [], equal on all ranks.

        No host synchronisation; one all-reduce of two numbers. `tolerated` tensors affect the
        result but not raise_if_found(): fp16 gradients overflow occasionally. The names must be the
        same at every step.
        """
        device = self._found.device
        flags, tolerated_flags = _non_finite(tensors, device), _non_finite(tolerated, device)
        local = torch.stack([flags.any(), tolerated_flags.any()]).float()
        worst = largest_over_ranks(local, self._group)  # [2]
        if self._flags is None:
            self._names, self._flags = list(tensors), torch.zeros_like(flags)
        assert self._names == list(tensors), "the names of the checked tensors have changed"
        first = (self._found == 0) & (worst[0] > 0)
        self._flags = torch.where(first, flags, self._flags)
        self._step = torch.where(first, step, self._step)
        self._found = torch.maximum(self._found, worst[0])
        return worst.max()

    def raise_if_found(self) -> None:
        """One host synchronisation.

        Raises:
            FloatingPointError: on every rank, naming step, ranks and tensors.
        """
        if not self._found.item() or self._flags is None:
            return
        bad = [name for name, flag in zip(self._names, self._flags.tolist(), strict=True) if flag]
        places = [
            f"rank {rank}: {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" * (len(names) > 3))
            for rank, names in enumerate(gather_objects(bad, self._group))
            if names
        ]
        raise FloatingPointError(
            f"non-finite values in step {int(self._step)}, which was not applied; "
            + "; ".join(places)
            + ". Lower lr, lengthen warmup_epochs, or look at the data of that step"
        )


class SkippingStep:
    """A torch optimiser's step that is skipped when the flag that the ranks agreed on is set.

    torch's fused optimisers read the flag on the device, without a host synchronisation. A trial
    step on a separate parameter tells whether this optimiser does; otherwise the host reads it.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self.on_device = _honours_found_inf(optimizer, device)

    def __call__(self, found_inf: Tensor) -> None:  # []; not 0: skip the step
        if self.on_device:
            _set_found_inf(self._optimizer, found_inf)
        elif found_inf.item():
            return
        self._optimizer.step()


def _honours_found_inf(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether an optimiser of this type and these options obeys the flag `found_inf`."""
    first = next(p for group in optimizer.param_groups for p in group["params"])
    parameter = nn.Parameter(torch.ones(2, device=device, dtype=first.dtype))
    taken = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in taken}
    try:
        probe = type(optimizer)([parameter], **options | {"lr": 1.0})
        parameter.grad = torch.ones_like(parameter)
        _set_found_inf(probe, torch.ones((), device=device))
        probe.step()
    except Exception:  # optimisers reject the flag in different ways
        return False
    return bool((parameter == 1).all())


def _set_found_inf(optimizer: Optimizer, found_inf: Tensor) -> None:
    setattr(optimizer, "found_inf", found_inf)  # noqa: B010  (torch's name, in no stub)


def _non_finite(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Which tensors contain an inf or a nan: bool [tensors]; False for an empty tensor."""
    # As they lie in memory: to flatten the gradient of a channels-last convolution is to copy it.
    filled = [tensor.detach() for tensor in tensors.values() if tensor.numel()]
    norms = iter(torch._foreach_norm(filled, torch.inf) if filled else [])
    nothing = torch.zeros((), device=device)
    # The gradient of class rows in host memory lies on the host as well.
    worst = [
        next(norms).float().to(device) if tensor.numel() else nothing for tensor in tensors.values()
    ]
    if not worst:
        return torch.zeros(0, dtype=torch.bool, device=device)
    return ~torch.stack(worst).isfinite()
