"""The guard against inf and nan: found on the device, agreed over the ranks, named on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from recognition.collectives import gather_objects, largest_over_ranks


class FiniteGuard:
    """Looks at the tensors of each step. A step with a non-finite one is to be skipped by all
    ranks; raise_if_found() then stops the run with their names."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._found = torch.zeros((), device=device)  # 1.0 from the first bad step on
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._flags: Tensor | None = None  # bool [number of names], of the first bad step
        self._names: list[str] = []

    @torch.no_grad()
    def look(self, tensors: Mapping[str, Tensor], step: int, tolerate: bool = False) -> Tensor:
        """1.0 if any tensor on any rank is not finite, else 0.0: float32 [], equal on all ranks.

        No host synchronisation; one all-reduce of one number. tolerate: the answer is not kept for
        raise_if_found() (the fp16 loss scale expects to overflow now and then).
        """
        filled = {name: t.detach().flatten() for name, t in tensors.items() if t.numel()}
        norms = torch._foreach_norm(list(filled.values()), torch.inf)
        flags = ~torch.stack([n.to(torch.float32) for n in norms]).isfinite()
        found = largest_over_ranks(flags.any().float(), self._group)
        if not tolerate:
            first = (self._found == 0) & (found > 0)
            self._flags = flags if self._flags is None else torch.where(first, flags, self._flags)
            self._step = torch.where(first, step, self._step)
            self._found = torch.maximum(self._found, found)
            self._names = list(filled)
        return found

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
