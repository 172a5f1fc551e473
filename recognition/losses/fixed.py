"""Margins that are fixed numbers on the target angle: ArcFace, CosFace, the SphereFace family.

Letters: B rows of the global batch, n classes of a chunk; t angle in radians.
"""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from torch import Tensor

from data_tools.common.errors import UserError
from recognition.losses.margin import (
    AngularMargin,
    Gradient,
    Margin,
    Options,
    Overflow,
    Rows,
    angle_of,
    check_angle,
    check_gradient,
    one_of,
    shifted_cosine,
    with_gradient,
)


class Softmax(Margin):
    """z = s cos t for all classes, no margin (NormFace, arXiv:1704.06369).

    Both gradients are the same.
    """

    def __init__(
        self, scale: float = 64.0, *, gradient: Gradient = "exact", **options: Unpack[Options]
    ) -> None:
        super().__init__(scale, **options)
        check_gradient(gradient)

    def target(self, rows: Rows) -> Tensor:
        return rows.cos_target


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

    def __init__(
        self,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.0,
        m3: float = 0.0,
        *,
        gradient: Gradient = "exact",
        overflow: Overflow = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(scale, gradient, overflow, **options)
        if not (math.isfinite(m1) and m1 > 0):
            raise UserError(f"m1={m1}: a positive factor of the angle, 1 is none")
        check_angle("m2", m2)
        if not math.isfinite(m3):
            raise UserError(f"m3={m3}: a finite number (0.35 or 0.4 is CosFace's)")
        if overflow == "fallback" and m1 != 1.0:
            raise UserError(
                f"overflow='fallback' is defined for m1=1 only, not m1={m1}: use 'easy'"
            )
        self.m1, self.m2, self.m3 = m1, m2, m3

    def target(self, rows: Rows) -> Tensor:
        return with_gradient(self._shift, rows.cos_target, self.gradient) - self.m3

    def _shift(self, cos: Tensor) -> Tensor:
        """cos(m1 t + m2) with the rule for large angles."""
        if self.m1 == 1.0:
            return cos if self.m2 == 0.0 else shifted_cosine(cos, self.m2, self.overflow)
        shifted = torch.cos(self.m1 * angle_of(cos) + self.m2)
        return torch.where(cos > 0, shifted, cos) if self.overflow == "easy" else shifted

    def extra_repr(self) -> str:
        return f"scale={self.scale}, margin_list=({self.m1}, {self.m2}, {self.m3})"


class ArcFace(CombinedMargin):
    """z_y = s cos(t_y + m) (arXiv:1801.07698 eq. 3).

    gradient, overflow: as in CombinedMargin. With num_subcenters=K of the head it is sub-center
    ArcFace (eq. 7): cos t is the largest over the K centres of a class, for the target and for the
    others; as is every margin here that reads cosines alone.
    """

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        *,
        gradient: Gradient = "exact",
        overflow: Overflow = "none",
        **options: Unpack[Options],
    ) -> None:
        check_angle("margin", margin)
        super().__init__(scale, m2=margin, gradient=gradient, overflow=overflow, **options)


class CosFace(CombinedMargin):
    """z_y = s (cos t_y - m) (arXiv:1801.09414 eq. 4).

    The slope is 1: both gradients are the same.
    """

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.4,
        *,
        gradient: Gradient = "exact",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(scale, m3=margin, gradient=gradient, **options)


class SphereFace(AngularMargin):
    """z_y = s cos(m1 t_y), or piecewise s ((-1)^k cos(m t_y) - 2 k), k = floor(m t_y / pi)
    (arXiv:1704.08063).

    form="cosine" is what ArcFace compares with (arXiv:1801.07698 table 2). form="piecewise" falls
    over all of 0..pi; m is OpenSphere's, whose scale is 30. The annealing of the first version
    (m = 4) is left out, as in OpenSphere.
    gradient: as in CombinedMargin; OpenSphere's is "straight_through". overflow: of the cosine
    form, which alone turns up again.
    """

    def __init__(
        self,
        scale: float = 64.0,
        m1: float = 1.35,
        *,
        form: Literal["cosine", "piecewise"] = "cosine",
        m: float = 1.7,
        gradient: Gradient = "exact",
        overflow: Overflow = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(scale, gradient, overflow, **options)
        one_of("form", form, ("cosine", "piecewise"))
        if overflow == "fallback":
            raise UserError("overflow='fallback' is defined for m1=1 only: use 'easy'")
        for name, factor in (("m1", m1), ("m", m)):
            if not (math.isfinite(factor) and factor > 0):
                raise UserError(f"{name}={factor}: a positive factor of the angle, 1 is none")
        if form == "piecewise" and overflow != "none":
            raise UserError(f"overflow={overflow!r}: the piecewise form needs no such rule")
        self.form, self.factor = form, m1 if form == "cosine" else m

    def target(self, rows: Rows) -> Tensor:
        return with_gradient(self._multiplied, rows.cos_target, self.gradient)

    def _multiplied(self, cos: Tensor) -> Tensor:
        angle = self.factor * angle_of(cos)
        if self.form == "cosine":
            multiplied = torch.cos(angle)
            return torch.where(cos > 0, multiplied, cos) if self.overflow == "easy" else multiplied
        k = torch.floor(angle.detach() / math.pi)
        sign = 1 - 2 * torch.remainder(k, 2)
        return sign * torch.cos(angle) - 2 * k

    def extra_repr(self) -> str:
        return f"scale={self.scale}, form={self.form}, factor={self.factor}"


class SphereFaceR(Margin):
    """v1: z_y = s cos(min(m t_y, pi)); v2: z_j = s cos(t_j / m) instead (SphereFace-R,
    arXiv:2109.05565).

    The authors weigh the loss by 50 / s, which is left to the learning rate here.
    gradient="straight_through" is the authors' "characteristic gradient detachment": slope 1 of
    whatever m acts on; the value is theirs. The norm of the features is not used (their "H" form).
    """

    def __init__(
        self,
        scale: float = 30.0,
        m: float = 1.5,
        *,
        version: Literal["v1", "v2"] = "v1",
        gradient: Gradient = "exact",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(scale, **options)
        one_of("version", version, ("v1", "v2"))
        check_gradient(gradient)
        if not (math.isfinite(m) and m >= 1):
            raise UserError(f"m={m}: a factor of the angle of at least 1, which is none")
        self.m, self.version, self.gradient = m, version, gradient

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

    def extra_repr(self) -> str:
        return f"scale={self.scale}, m={self.m}, version={self.version}"
