"""Margins that are fixed numbers on the target angle: ArcFace, CosFace, the SphereFace family.

Letters: B rows of the global batch, n classes of a chunk; t angle in radians.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data_tools.common.errors import UserError
from data_tools.common.schema import option
from recognition.losses.margin import (
    AngularMargin,
    Gradient,
    Margin,
    Rows,
    angle,
    angle_of,
    positive,
    shifted_cosine,
    with_gradient,
)


def _factor(default: float) -> Any:
    note = "1 changes nothing"
    return option(default, "a positive factor of the angle", note=note, low=0, open_ends="low")


@dataclass(eq=False, repr=False)
class Softmax(Margin):
    """z = s cos t for all classes, no margin (NormFace, arXiv:1704.06369).

    Both gradients are the same.
    """

    _: KW_ONLY
    gradient: Gradient = "exact"

    def target(self, rows: Rows) -> Tensor:
        return rows.cos_target


@dataclass(eq=False, repr=False)
class CombinedMargin(AngularMargin):
    """z_y = s (cos(m1 t_y + m2) - m3), z_j = s cos t_j (ArcFace, arXiv:1801.07698 eq. 4).

    The paper's settings (m1, m2, m3): SphereFace (1.35, 0, 0), ArcFace (1, 0.5, 0), CosFace (1,
    0, 0.35), CM1 (1, 0.3, 0.2), CM2 (0.9, 0.4, 0.15). InsightFace's PyTorch class ignores m1 and
    m2 where m3 > 0 and refuses m1 != 1; here all three act.

    gradient: "exact" is the derivative of the formula; "straight_through" takes the slope 1 in
    its place (dz_y / dcos t_y = s), as InsightFace has done since December 2022. overflow: where
    the angle m1 t + m2 passes pi and the cosine turns up again, "none" (the paper states no
    rule), "fallback" (m1 = 1 only) or "easy", as margin.shifted_cosine says.
    """

    m1: float = _factor(1.0)
    m2: float = angle(0.0)
    m3: float = option(0.0, "a cosine margin (0.35 or 0.4 is CosFace's)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overflow == "fallback" and self.m1 != 1.0:
            raise UserError(
                f"overflow='fallback' is defined for m1=1 only, not m1={self.m1}: use 'easy'"
            )

    def target(self, rows: Rows) -> Tensor:
        return with_gradient(self._shift, rows.cos_target, self.gradient) - self.m3

    def _shift(self, cos: Tensor) -> Tensor:
        """cos(m1 t + m2) with the rule for large angles."""
        if self.m1 == 1.0:
            return shifted_cosine(cos, self.m2, self.overflow)
        shifted = torch.cos(self.m1 * angle_of(cos) + self.m2)
        return torch.where(cos > 0, shifted, cos) if self.overflow == "easy" else shifted


@dataclass(eq=False, repr=False)
class ArcFace(AngularMargin):
    """z_y = s cos(t_y + m) (arXiv:1801.07698 eq. 3).

    gradient, overflow: as in CombinedMargin. With num_subcenters=K of the head it is sub-center
    ArcFace (eq. 7): cos t is the largest over the K centres of a class, for the target and for the
    others; as is every margin here that reads cosines alone.
    """

    margin: float = angle(0.5)

    def target(self, rows: Rows) -> Tensor:
        return self.turned(rows, self.margin)


@dataclass(eq=False, repr=False)
class CosFace(Margin):
    """z_y = s (cos t_y - m) (arXiv:1801.09414 eq. 4).

    The slope is 1: both gradients are the same.
    """

    margin: float = option(0.4, "a cosine margin (0.35 or 0.4 is usual)")
    _: KW_ONLY
    gradient: Gradient = "exact"

    def target(self, rows: Rows) -> Tensor:
        return rows.cos_target - self.margin


@dataclass(eq=False, repr=False)
class SphereFace(AngularMargin):
    """z_y = s cos(m1 t_y), or piecewise s ((-1)^k cos(m t_y) - 2 k), k = floor(m t_y / pi)
    (arXiv:1704.08063).

    form="cosine" is what ArcFace compares with (arXiv:1801.07698 table 2). form="piecewise" falls
    over all of 0..pi; m is OpenSphere's, whose scale is 30. The annealing of the first version
    (m = 4) is left out, as in OpenSphere.
    gradient: as in CombinedMargin; OpenSphere's is "straight_through". overflow: of the cosine
    form, which alone turns up again.
    """

    m1: float = _factor(1.35)
    _: KW_ONLY
    form: Literal["cosine", "piecewise"] = "cosine"
    m: float = _factor(1.7)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overflow == "fallback":
            raise UserError("overflow='fallback' is defined for m1=1 only: use 'easy'")
        if self.form == "piecewise" and self.overflow != "none":
            raise UserError(f"overflow={self.overflow!r}: the piecewise form needs no such rule")

    def target(self, rows: Rows) -> Tensor:
        return with_gradient(self._multiplied, rows.cos_target, self.gradient)

    def _multiplied(self, cos: Tensor) -> Tensor:
        if self.form == "cosine":
            multiplied = torch.cos(self.m1 * angle_of(cos))
            return torch.where(cos > 0, multiplied, cos) if self.overflow == "easy" else multiplied
        angle = self.m * angle_of(cos)
        k = torch.floor(angle.detach() / math.pi)
        sign = 1 - 2 * torch.remainder(k, 2)
        return sign * torch.cos(angle) - 2 * k


@dataclass(eq=False, repr=False)
class SphereFaceR(Margin):
    """v1: z_y = s cos(min(m t_y, pi)); v2: z_j = s cos(t_j / m) instead (SphereFace-R,
    arXiv:2109.05565).

    The authors weigh the loss by 50 / s, which is left to the learning rate here.
    gradient="straight_through" is the authors' "characteristic gradient detachment": slope 1 of
    whatever m acts on; the value is theirs. The norm of the features is not used (their "H" form).
    """

    scale: float = positive(30.0)
    m: float = option(1.5, "a factor of the angle (1 changes nothing)", low=1)
    _: KW_ONLY
    version: Literal["v1", "v2"] = "v1"
    gradient: Gradient = "exact"

    def target(self, rows: Rows) -> Tensor:
        if self.version == "v2":
            return rows.cos_target
        return with_gradient(
            lambda cos: torch.cos((self.m * angle_of(cos)).clamp_max(math.pi)),
            rows.cos_target,
            self.gradient,
        )

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        if self.version == "v1":
            return cos
        return with_gradient(lambda c: torch.cos(angle_of(c) / self.m), cos, self.gradient)
