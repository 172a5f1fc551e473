"""Losses that also change the negatives: re-weighted, margined, or both.

Letters: B rows of the global batch, n classes of a chunk; t angle in radians.
"""

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from data_tools.common.errors import UserError
from data_tools.common.schema import option
from recognition.losses.margin import (
    AngularMargin,
    Layer,
    Margin,
    Overflow,
    Owned,
    Reduce,
    Rows,
    Statistics,
    angle,
    angle_of,
    positive,
    shifted_cosine,
)

_LEAST_CENTRE_ANGLE = 0.01  # radians, as in InterFace's code


@dataclass(eq=False, repr=False)
class CurricularFace(AngularMargin):
    """z_y = s cos(t_y + m); z_j = s cos t_j (t + cos t_j) where cos t_j > cos(t_y + m), else
    s cos t_j (arXiv:2004.00288).

    Hard negatives weigh more as training goes on: t starts at 0 and moves by `momentum` towards the
    whole batch's mean target cosine, first, and is then used (the authors' 0.99 t + 0.01 mean). t
    and the comparison get no gradient. overflow="fallback" is the authors' rule. Differs from their
    code in nothing else than that t follows the whole batch, not one process's.
    gradient="straight_through" acts on the target.
    """

    margin: float = angle(0.5)
    momentum: float = option(0.01, "share of the batch in t", low=0, high=1)
    _: KW_ONLY
    overflow: Overflow = "fallback"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.t: Tensor
        self.register_buffer("t", torch.tensor(0.0))

    def observe(self, rows: Rows, x: Tensor, owned: Owned) -> None:
        self._next = {"t": self.t.lerp(self._all_gathered(rows.cos_target).mean(), self.momentum)}

    def target(self, rows: Rows) -> Tensor:
        return self.turned(rows, self.margin)

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        hard = cos > shifted_cosine(rows.cos_target, self.margin)[:, None]
        return torch.where(hard, cos * (self.current("t") + cos), cos)

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"t": self.t}


@dataclass(eq=False, repr=False)
class MVSoftmax(AngularMargin):
    """z_y = s cos(t_y + m) or s (cos t_y - m); z_j = s ((1 + t) cos t_j + t) where cos t_j is above
    the margined target's (MV-Softmax, arXiv:1912.00833).

    As in the authors' code. kind="arc" or "am". adaptive=False: s (cos t_j + t) for those
    negatives. overflow="easy" is the authors': the margin acts for cos t_y > 0 only; the comparison
    is with the margined target all the same. margin: 0.5 (arc) or 0.35 (am) if not given.
    gradient="straight_through" acts on the target.
    """

    scale: float = positive(32.0)
    margin: float | None = angle(None)
    t: float = option(0.2, "extra weight of a misclassified vector", low=0, high=10)
    _: KW_ONLY
    kind: Literal["arc", "am"] = "arc"
    adaptive: bool = True
    overflow: Overflow = "easy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "am" and self.overflow == "fallback":
            raise UserError("overflow='fallback' belongs to kind='arc': use 'easy' or 'none'")
        self.m = {"arc": 0.5, "am": 0.35}[self.kind] if self.margin is None else self.margin

    def target(self, rows: Rows) -> Tensor:
        if self.kind == "arc":
            return self.turned(rows, self.m)
        cos = rows.cos_target
        eased = (cos <= 0) & (self.overflow == "easy")
        return torch.where(eased, cos, cos - self.m)

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        own = rows.cos_target
        limit = shifted_cosine(own, self.m) if self.kind == "arc" else own - self.m
        harder = (1 + self.t) * cos + self.t if self.adaptive else cos + self.t
        return torch.where(cos > limit[:, None], harder, cos)


@dataclass(eq=False, repr=False)
class InterFace(AngularMargin):
    """z_y = s cos(t_y + m), z_j = s cos(t_j - d_ij), d_ij = alpha (exp(-tau_j) - exp(-t_y / c_yj))
    (arXiv:2210.02018, as in the authors' code).

    Negatives come nearer where the sample is far from its own centre, compared with the angle c_yj
    from that centre to the class's.

    variant, two letters: centre angle constant (c = pi / 2) or dynamic (between the centres, at
    least 0.01); threshold tau constant (cc 0.2, dc 0.3) or dynamic (dd: (pi / 18) / c_yj).
    d has no gradient. gradient="straight_through" acts on the target.

    The authors' code gathers all centres and all logits on every rank, and with sampling takes the
    wrong rows. Here the centres of the batch's own classes are shared, B * D values a step. dd and
    dc compare one centre a class: sub-centres are refused.
    """

    margin: float = angle(0.5)
    alpha: float = option(0.1, "largest margin of a negative in radians", low=0, high=1)
    _: KW_ONLY
    variant: Literal["dd", "dc", "cc"] = "dd"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_centres = self.variant != "cc"

    def bind(self, layer: Layer) -> None:
        if self.needs_centres and layer.num_subcenters > 1:
            raise UserError(
                f"interface compares one centre a class, not num_subcenters="
                f"{layer.num_subcenters}: use num_subcenters=1, variant='cc', or another margin"
            )

    def target(self, rows: Rows) -> Tensor:
        return self.turned(rows, self.margin)

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            moved = self._moved(rows, centre_cos)  # [B, n] or [B, 1]
            turn, lift = torch.cos(moved), torch.sin(moved)
        # cos(t - d) without an arccos; the slope of sin t is 0 at the ends, as angle_of's.
        least = (8 * torch.finfo(cos.dtype).eps) ** 2
        sin = ((1 - cos) * (1 + cos)).clamp_min(least).sqrt()
        return torch.addcmul(cos * turn, sin, lift)

    def _moved(self, rows: Rows, centre_cos: Tensor | None) -> Tensor:
        """d_ij, by how much the angle to each negative shrinks, radians."""
        angle = angle_of(rows.cos_target)[:, None]  # [B, 1]
        if centre_cos is None:
            return self.alpha * (math.exp(-0.2) - torch.exp(-angle / (math.pi / 2)))
        inverse = torch.acos(centre_cos.clamp(-1, 1)).clamp_min_(_LEAST_CENTRE_ANGLE).reciprocal_()
        near = torch.exp(-angle * inverse)
        if self.variant == "dc":
            return self.alpha * (math.exp(-0.3) - near)
        return inverse.mul_(-math.pi / 18).exp_().sub_(near).mul_(self.alpha)


@dataclass(eq=False, repr=False)
class Circle(Margin):
    """z_y = gamma [1 + m - c_y]+ (c_y - (1 - m)), z_j = gamma [c_j + m]+ (c_j - m), c the cosine
    (arXiv:2002.10857, class level).

    The brackets are weights without gradient, as in the paper and in FaceX-Zoo's code.
    """

    scale: float = field(init=False)
    gamma: float = positive(256.0)
    margin: float = option(0.25, "relaxation of the circle", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale = self.gamma

    def target(self, rows: Rows) -> Tensor:
        cos = rows.cos_target
        return (1 + self.margin - cos.detach()).clamp_min(0) * (cos - (1 - self.margin))

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        return (cos.detach() + self.margin).clamp_min(0) * (cos - self.margin)
