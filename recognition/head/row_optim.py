"""The optimisers of the sampled class rows, and of what a margin learns."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from data_tools.common.errors import UserError, UserKeyError, UserTypeError
from recognition.head import PartialFC
from recognition.head.chunks import chunk_size
from recognition.head.class_rows import Tables, subtract_radial


class _RowOptimizer:
    """Steps the sampled rows of a head and what its margin learns; all other rows and their state
    stay bit-identical.

    The margin's numbers are stepped without decay, at its lr_factor: those of a class only in steps
    that gave them a gradient, those of the model after their gradients are summed over the ranks.
    """

    def __init__(self, head: PartialFC, weight_decay: float) -> None:
        dtype = head.storage.parameter.dtype
        if dtype.itemsize < torch.float32.itemsize:  # torch._fused_sgd_ is wrong there on a CPU
            raise UserTypeError(
                f"the class rows are {dtype}, in which small updates are lost: keep the head in "
                "float32; Limits(dtype=...) narrows its products"
            )
        self.head = head
        self.weight_decay = weight_decay
        self._begun: float | None = None  # lr of the last step whose backward updates
        own = self._new_state(head.weight.detach())
        head.storage.attach(own)
        self.state = dict(own)  # by class
        self.model_state: dict[str, Tensor] = {}  # the same on all ranks
        for name, parameter in head.margin.named_parameters():
            state = self._new_state(_as_rows(parameter.detach()))
            self._state_of(name).update({f"margin.{name}.{k}": v for k, v in state.items()})

    @torch.no_grad()
    def begin(self, lr: float) -> None:
        """Let the next backward update the rows, chunk by chunk, so that no gradient of them
        exists. step() then steps what the margin learns and ends the step.

        Raises:
            RuntimeError: this step has had a forward already.
        """
        if self.head.has_begun:
            raise RuntimeError("begin() comes before the forward whose backward updates the rows")
        self._check_state()

        self.head.sink, self._begun = functools.partial(self._apply, lr=lr), lr

    @torch.no_grad()
    def step(
        self,
        lr: float,
        grad_scale: Tensor | None = None,  # [] the gradients are this much too large
        found_inf: Tensor | None = None,  # [] not 0: change nothing
    ) -> None:
        """Update the rows that the head sampled since the last step, and end the head's step.

        Raises:
            ValueError: after begin(), another lr, or a wish to scale or skip what has been done.
        """
        self._check_state()
        if self.head.sink is not None:
            if (lr, grad_scale, found_inf) != (self._begun, None, None):
                raise UserError(
                    "the backward has updated the rows (update_in_backward): the step can neither "
                    "be scaled, skipped nor have another lr"
                )
            self.head.end_step()
            self.head.storage.commit()
            self._step_margin(lr, None, None)
            return
        sampled = self.head.end_step(found_inf)
        gradient = sampled.gradient()  # [S, K, D]
        if found_inf is not None and found_inf.device.type == "cpu":  # asking costs nothing
            found_inf, skipped = None, bool(found_inf)
        else:
            skipped = False
        size, device = chunk_size(0, sampled.like, self.head.num_subcenters), sampled.like.device
        for start in range(0, 0 if skipped else len(gradient), size):
            where = slice(start, min(start + size, len(gradient)))
            grad = gradient[where].to(device)
            if grad_scale is not None:
                grad = grad / grad_scale.to(grad.dtype)
            self._apply(sampled.tables, sampled.at(where), grad, lr=lr, found_inf=found_inf)
        self.head.storage.commit()
        sampled.recycle()
        if skipped:
            found_inf = torch.ones((), device=device)
        self._step_margin(lr, grad_scale, found_inf)

    def _apply(
        self,
        tables: Tables,
        rows: slice | Tensor,
        grad: Tensor,  # [n, K, D]
        weight: Tensor | None = None,  # [n, K, D] these rows of it, where they have been read
        radial: Tensor | None = None,  # [n * K] of it to be subtracted from the gradient
        *,
        lr: float,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update some rows of the weight and their state."""
        read = None
        if weight is not None:
            subtract_radial(grad, weight, radial)
            read = weight.flatten(1)
        with tables.updating(rows, read, found_inf) as parts:
            self._update_(grad.flatten(1), lr, self.weight_decay, **parts)

    def _check_state(self) -> None:
        weight = self.head.storage.parameter
        for name, held in self.head.storage.state.items():
            tensor = self.state.get(name)
            if tensor is not held:
                raise RuntimeError("another row optimizer was made for this head: step that one")
            assert tensor is not None
            if tensor.dtype != weight.dtype or tensor.device != weight.device:
                raise UserTypeError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the class rows {weight.dtype} "
                    f"on {weight.device}: make the row optimizer after moving the head"
                )

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
            after = {key: tensor.clone() for key, tensor in before.items()}
            self._update_(grad, lr * margin.lr_factor, 0.0, **after)
            for key, tensor in before.items():
                tensor.copy_(torch.where(touched, after[key], tensor))
            margin.get_parameter(name).grad = None
        margin.project()

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """The dict that holds the state of a parameter of the margin."""
        return self.state if name in self.head.margin.per_class else self.model_state

    def _new_state(self, rows: Tensor) -> dict[str, Tensor]:
        """State at the start for some rows [n, ...], a row for each."""
        raise NotImplementedError

    def _update_(self, grad: Tensor, lr: float, decay: float, **rows: Tensor) -> None:
        """Change the weight and the state of some rows [n, K * D] in place."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """State by global class id: `classes` int64 [C_r], and a row for each in the others, but
        for what a margin learns for the whole model."""
        self.head.settle()
        classes = torch.arange(*self.head.shard, device=self.head.weight.device)
        return {"classes": classes, **self.state, **self.model_state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the rows of this rank's classes from a state that holds them, in any order.

        Raises:
            KeyError: a class of this rank, or a kind of state, is not in it.
        """
        self.head.storage.drop()
        if set(state) != set(self.state_dict()):
            expected = sorted(self.state_dict())
            raise UserKeyError(f"row state {sorted(state)}, expected {expected}")
        classes, order = state["classes"].sort()
        own = torch.arange(*self.head.shard, device=classes.device)
        place = torch.searchsorted(classes, own).clamp_max(len(classes) - 1)
        missing = own[classes[place] != own]
        if len(missing):
            raise UserKeyError(f"no state for {len(missing)} classes, the first {int(missing[0])}")
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

    def _apply(
        self,
        tables: Tables,
        rows: slice | Tensor,
        grad: Tensor,
        weight: Tensor | None = None,
        radial: Tensor | None = None,
        *,
        lr: float,
        found_inf: Tensor | None = None,
    ) -> None:
        library = self.head.limits.cpu_library
        if library is None or found_inf is not None:
            return super()._apply(tables, rows, grad, weight, radial, lr=lr, found_inf=found_inf)
        numbers = lr, self.momentum, self.weight_decay
        if isinstance(rows, slice):
            read = None if weight is None else weight.flatten(1)
            with tables.updating(rows, read) as parts:
                library.sgd(parts, None, grad, radial, *numbers)
        else:  # in place, without a copy
            library.sgd(tables.tensors(), rows, grad, radial, *numbers)
            tables.changed()

    def _update_(self, grad: Tensor, lr: float, decay: float, **rows: Tensor) -> None:
        torch._fused_sgd_(  # what torch.optim.SGD(fused=True) calls: once through the memory
            [rows["weight"]],
            [grad],
            [rows["momentum"]][: self.momentum != 0],
            weight_decay=decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


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

    def _update_(self, grad: Tensor, lr: float, decay: float, **rows: Tensor) -> None:
        beta1, beta2 = self.betas
        steps = rows["steps"].add_(1)  # [n, 1]
        mean = rows["exp_avg"].lerp_(grad, 1 - beta1)
        square = rows["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        deviation = square.sqrt().div_((1 - beta2**steps).sqrt_()).add_(self.eps)
        step = mean / (1 - beta1**steps)
        rows["weight"].mul_(1 - lr * decay).addcdiv_(step, deviation, value=-lr)


def _as_rows(tensor: Tensor) -> Tensor:
    """A view [n, ...] -> [n, numbers of each]; a single number -> [1, 1]."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
