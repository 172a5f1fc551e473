"""What a margin loss is: a small formula on cosines, and the little state that some of them keep.

A margin sees values, never a rank, a column or a process group. The head (head/partial_fc.py)
gives it the cosine of every row to its own class, and the cosines of every row to the other
classes in chunks, and turns its answers into the loss over all sampled classes.

Letters: B rows of the global batch, C classes, C_r of this shard, n of a chunk, D embedding,
m rows of the batch whose class is in this shard, k values of a class.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.common.errors import UserError
from data_tools.common.schema import option

Gradient = Literal["exact", "straight_through"]
Overflow = Literal["none", "fallback", "easy"]

# reduce(values, "sum" | "max"): the same over all shards.
Reduce = Callable[[Tensor, str], Tensor]

_BINS = 50  # of a histogram


class Rows(NamedTuple):
    """The global batch, as every rank knows it. A field carries gradient only on the rank that
    holds the row's class, so that a gradient counts once."""

    cos_target: Tensor  # [B] cosine to the own class
    norm: Tensor  # [B] norm of the embedding
    label: Tensor  # int64 [B] global class id
    class_values: Tensor  # [B, k] what class_values() of the shard that holds the class returned
    key: int = 0  # of this batch's random draws: a function of (seed, step, micro-step)

    def constant(self) -> "Rows":
        """The same without gradient."""
        return self._replace(
            cos_target=self.cos_target.detach(),
            norm=self.norm.detach(),
            class_values=self.class_values.detach(),
        )


class Owned(NamedTuple):
    """The rows of the batch whose class is in this shard."""

    row: Tensor  # int64 [m]
    local_id: Tensor  # int64 [m] place of their classes in the shard


class Layer(NamedTuple):
    """The facts of the head's layer that a margin may use."""

    num_classes: int
    shard: tuple[int, int]  # the classes [start, stop) whose state this margin holds
    embedding_size: int
    num_subcenters: int = 1
    sample_rate: float = 1.0
    class_counts: np.ndarray | None = None  # int64 [C] images of every class, where known


class Histogram(NamedTuple):
    """A distribution over all classes, for the log."""

    edges: Tensor  # [bins + 1]
    counts: Tensor  # [bins]


Statistics = dict[str, Tensor | Histogram]  # 0-d tensors, or distributions


def positive(default: float) -> Any:
    """An argument above 0, as a dataclass's field."""
    return option(default, "give a positive number", note=f"{default:g} is usual", **_ABOVE_0)


_ABOVE_0: dict[str, Any] = {"low": 0, "open_ends": "low"}


def angle(default: float | None) -> Any:
    """An argument in radians, as a dataclass's field."""
    note = "0 <= {name} < pi (0.5 is usual)"
    return option(default, "an angle in radians", note=note, low=0, high=math.pi, open_ends="high")


@dataclass(eq=False, repr=False)
class Margin(nn.Module):
    """The logits of a row: scale * target(rows) for its class, scale * negatives(cos, rows)
    elsewhere; "softmax" makes them the cross-entropy, "sigmoid" one binary loss a class.

    A subclass is a dataclass: its fields are the arguments. One made by data_tools' option() also
    states its range, which is checked here; so are the words of a Literal.

    interclass_filtering_threshold: negatives with a cosine above it count as 0 and get no
    gradient: conflicting or duplicate identities are left in peace (arXiv:2203.15565 section
    3.2). 0: off.

    State of a class lives with the class: parameters and buffers named in `per_class` have this
    shard's classes as first dimension. All other state is equal on all ranks, because it comes
    from `rows` alone. What observe() gathers counts from the moment it is gathered and is kept by
    commit(), at the end of the optimiser step.
    """

    scale: float = positive(64.0)  # AdaCos's is a constant tensor []
    _: KW_ONLY
    interclass_filtering_threshold: float = option(
        0.0, "a cosine", note="0 to 1 (0.4 is usual), or 0 for off", low=0, high=1
    )

    reduction: ClassVar[Literal["softmax", "sigmoid"]] = "softmax"
    per_class: ClassVar[tuple[str, ...]] = ()
    needs_lse = False  # wants rescale() before its scale is used
    needs_centres = False  # negatives() wants centre_cos
    positive_weight = 1.0  # of the two terms of the "sigmoid" reduction
    negative_weight = 1.0
    lr_factor = 1.0  # of the own parameters, on the learning rate of the class rows

    def __post_init__(self) -> None:
        """Raises: UserError naming an argument out of its range."""
        super().__init__()
        for field in dataclasses.fields(self):
            _check(field, vars(self).get(field.name))
        self._gathered: list[Tensor] = []  # by observe() in the micro-steps of this step
        self._next: dict[str, Tensor] = {}  # buffers as the end of the step will have them

    def extra_repr(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))

    @property
    def encoder_momentum(self) -> float | None:
        """The pace of a slow copy of the network, whose features observe() wants; None: none."""
        return None

    @property
    def leaves_negatives(self) -> bool:
        """Whether the logits of other classes are scale * cos: nothing acts on them."""
        own = type(self).negatives is not Margin.negatives
        return not (own or self.interclass_filtering_threshold)

    # --- The formula ---

    def target(self, rows: Rows) -> Tensor:  # -> [B]
        """What replaces the target cosine."""
        raise NotImplementedError

    def negatives(
        self,
        cos: Tensor,  # [B, n]
        rows: Rows,  # a constant here
        centre_cos: Tensor | None = None,  # [B, n] own centre to the n classes, a constant
    ) -> Tensor:  # -> [B, n]
        """What replaces the cosines to other classes. Default: nothing."""
        return cos

    def filtered_negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None) -> Tensor:
        """negatives(), after the inter-class filter where it is on: [B, n] -> [B, n]."""
        if self.interclass_filtering_threshold:
            cos = torch.where(cos > self.interclass_filtering_threshold, 0.0, cos)
        return self.negatives(cos, rows, centre_cos)

    def regularizer(self, rows: Rows) -> Tensor | None:
        """A term [] of the loss computed from the batch, the same on all ranks."""
        return None

    def class_regularizer(self) -> Tensor | None:
        """This shard's share [] of a term of the loss that is a sum over all classes."""
        return None

    # --- State ---

    def bind(self, layer: Layer) -> None:
        """Called once, by the head: make the state that depends on the classes."""

    def class_values(self, local_ids: Tensor) -> Tensor | None:  # int64 [m] -> [m, k]
        """What `rows.class_values` says of these classes of the shard; None: nothing."""
        return None

    def observe(self, rows: Rows, x: Tensor, owned: Owned) -> None:
        """First in a training forward: look at the batch (constants; x [B, D] is of norm 1)."""

    def rescale(self, lse: Tensor, rows: Rows, num_negatives: int) -> None:
        """If needs_lse: log of the sum over a row's negatives of exp(logit) [B] at the present
        scale, and how many classes each row had for negatives, over all shards."""

    def commit(self, found_inf: Tensor | None = None) -> None:  # [] not 0: the step was skipped
        """Called after an optimiser step: keep what observe() gathered, or drop it."""
        for name, value in self._next.items():
            if found_inf is not None:
                value = torch.where(found_inf > 0, getattr(self, name), value)
            setattr(self, name, value)
        self._next = {}
        self._gathered = []

    def project(self) -> None:
        """After an optimiser step: bring the parameters back into their bounds."""

    def end_epoch(self, reduce: Reduce) -> Statistics:
        """Called after an epoch of samples; what the log shows of it."""
        return {}

    def statistics(self, reduce: Reduce) -> Statistics:
        """What each line of the log shows of this loss."""
        return {}

    def frozen(self, committed: bool = False) -> "Margin":
        """A copy that keeps the present state, or with `committed` the state before this optimiser
        step, so that a backward computes with the state of its forward."""
        kept = copy.copy(self)
        kept._buffers = dict(self._buffers)
        if committed:
            kept._next = {}
        return kept

    def current(self, name: str) -> Tensor:
        """A buffer with what this step has gathered so far."""
        return self._next.get(name, getattr(self, name))

    def _all_gathered(self, values: Tensor) -> Tensor:  # [B] -> [B of all micro-steps so far]
        self._gathered.append(values)
        return torch.cat(self._gathered)


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raises: UserError: none of the words, not finite, or beyond the bounds of the field."""
    words, entry = get_args(field.type), field.metadata.get("option")
    if isinstance(value, str) and value not in words:
        raise UserError(f"{field.name}={value!r}: one of {', '.join(words)}")
    if entry is not None and value is not None:
        if not math.isfinite(value) or entry.broken_bound(value):
            bounds = entry.note.format(name=field.name) or entry.range or "a finite number"
            raise UserError(f"{field.name}={value}: {entry.help}, {bounds}")


@dataclass(eq=False, repr=False)
class AngularMargin(Margin):
    """Margins that add an angle to the target's, z_y = s cos(t_y + m): by which slope (see
    with_gradient) and by which rule past pi (see shifted_cosine)."""

    _: KW_ONLY
    gradient: Gradient = "exact"
    overflow: Overflow = "none"

    def turned(self, rows: Rows, margin: float | Tensor) -> Tensor:
        """cos(t_y + m) of the rows: [B]; margin: radians, one or [B]."""
        return with_gradient(
            lambda cos: shifted_cosine(cos, margin, self.overflow), rows.cos_target, self.gradient
        )


def angle_of(cos: Tensor) -> Tensor:
    """arccos in radians, exact near 0 and pi and with a finite slope (0) at and beyond +-1."""
    least = (8 * torch.finfo(cos.dtype).eps) ** 2
    sin = ((1 - cos) * (1 + cos)).clamp_min(least).sqrt()
    return torch.atan2(sin, cos)


def shifted_cosine(cos: Tensor, margin: float | Tensor, overflow: Overflow = "none") -> Tensor:
    """cos(t + m), with a rule for t + m past pi, where the cosine turns up again: [B].

    "none": as the formula says. "fallback": cos t - m sin m there (ArcFace's code of 2018).
    "easy": cos(t + m) for cos t > 0 only, cos t elsewhere.
    """
    if isinstance(margin, float | int) and margin == 0:
        return cos
    angle = angle_of(cos) + margin
    shifted = torch.cos(angle)
    if overflow == "fallback":
        sin = torch.sin(margin) if isinstance(margin, Tensor) else math.sin(margin)
        return torch.where(angle > math.pi, cos - margin * sin, shifted)
    if overflow == "easy":
        return torch.where(cos > 0, shifted, cos)
    return shifted


def with_gradient(formula: Callable[[Tensor], Tensor], cos: Tensor, gradient: Gradient) -> Tensor:
    """formula(cos), whose slope with respect to cos is its own ("exact") or 1 ("straight_through",
    as in InsightFace since December 2022); its other slopes are its own in both."""
    if gradient == "exact":
        return formula(cos)
    constant = cos.detach()
    return formula(constant) + (cos - constant)


def add_rows_(target: Tensor, index: Tensor, source: Tensor) -> None:
    """target[index] += source, the same bits in every run, with repeated indices too: on a GPU
    index_add_ sums those by atomic operations, in any order, and this sorts them first."""
    if target.is_cuda:
        target.index_put_((index,), source, accumulate=True)
    else:
        target.index_add_(0, index, source)


# --- Statistics of a value that every class has, for the log --------------------------------------


def class_mean(values: Tensor, reduce: Reduce) -> Tensor:  # [C_r] -> []
    """The mean over the classes of all shards, float64."""
    wide = values.double()
    total, count = reduce(torch.stack([wide.sum(), wide.new_tensor(len(wide))]), "sum").unbind()
    return total / count


def class_histogram(values: Tensor, reduce: Reduce) -> Histogram:  # [C_r] ->
    """How the classes of all shards spread between their smallest and largest value."""
    wide = values.double()
    nothing = wide.new_tensor([-torch.inf])
    ends = torch.stack([torch.cat([wide, nothing]).max(), torch.cat([-wide, nothing]).max()])
    high, low = reduce(ends, "max") * wide.new_tensor([1, -1])
    width = torch.where(high > low, high - low, 1.0)  # all alike, or none
    place = ((wide - low) / width * _BINS).long().clamp(0, _BINS - 1)
    counts = wide.new_zeros(_BINS).index_add_(0, place, torch.ones_like(wide))
    edges = low + width * torch.linspace(0, 1, _BINS + 1, dtype=wide.dtype, device=wide.device)
    return Histogram(edges.nan_to_num(0.0, 0.0, 0.0), reduce(counts, "sum"))
