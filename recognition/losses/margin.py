"""What a margin loss is: a small formula on cosines. And the margins that are fixed numbers.

A margin sees values, never a rank, a column or a process group. The head (recognition/head.py)
gives it the cosine of every row to its own class, and the cosines of every row to the other
classes in pieces, and turns what it answers into the softmax cross-entropy over all sampled
classes.

Letters: B rows of the global batch, n classes of a piece.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Gradient = Literal["exact", "straight_through"]
Overflow = Literal["none", "fallback", "easy"]


class Rows(NamedTuple):
    """What every rank knows of the global batch. A field carries gradient only on the rank that
    holds the row's class, so what is computed from it counts once."""

    cos_target: Tensor  # [B] cosine to the own class
    norm: Tensor  # [B] norm of the embedding
    label: Tensor  # int64 [B] global class id


class Margin(nn.Module):
    """The logits of a row: scale * target(rows) for its class, scale * negatives(cos, rows)
    elsewhere.

    interclass_filtering_threshold: negatives with a cosine above it get the logit 0 and no
    gradient: conflicting or duplicate identities are left in peace (arXiv:2203.15565 section
    3.2). 0: off.
    """

    def __init__(self, scale: float, interclass_filtering_threshold: float = 0.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale}: give a positive number, 64 is usual")
        if not 0.0 <= interclass_filtering_threshold <= 1.0:
            raise ValueError(
                f"interclass_filtering_threshold={interclass_filtering_threshold}: a cosine "
                "in (0, 1], 0.4 is usual, or 0 for off"
            )
        self.scale = scale
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def target(self, rows: Rows) -> Tensor:  # -> [B]
        """What replaces the target cosine."""
        raise NotImplementedError

    def negatives(self, cos: Tensor, rows: Rows) -> Tensor:  # [B, n] -> [B, n]
        """What replaces the cosines to other classes; `rows` is a constant here. Default:
        nothing."""
        return cos

    def filtered_negatives(self, cos: Tensor, rows: Rows) -> Tensor:  # [B, n] -> [B, n]
        """negatives(), after the inter-class filter where it is on."""
        if self.interclass_filtering_threshold:
            cos = torch.where(cos > self.interclass_filtering_threshold, 0.0, cos)
        return self.negatives(cos, rows)


class Softmax(Margin):
    """NormFace: no margin, z_y = s cos t_y (arXiv:1704.06369). Both gradients are the same."""

    def __init__(
        self,
        scale: float = 64.0,
        *,
        gradient: Gradient = "exact",
        interclass_filtering_threshold: float = 0.0,
    ) -> None:
        super().__init__(scale, interclass_filtering_threshold)
        one_of("gradient", gradient, ("exact", "straight_through"))

    def target(self, rows: Rows) -> Tensor:
        return rows.cos_target


class CombinedMargin(Margin):
    """z_y = s (cos(m1 t_y + m2) - m3), z_j = s cos t_j (ArcFace, arXiv:1801.07698 eq. 4).

    The paper's settings (m1, m2, m3): SphereFace (1.35, 0, 0), ArcFace (1, 0.5, 0), CosFace (1,
    0, 0.35), CM1 (1, 0.3, 0.2), CM2 (0.9, 0.4, 0.15). InsightFace's PyTorch class ignores m1 and
    m2 where m3 > 0 and refuses m1 != 1; here all three act.

    gradient: "exact" is the derivative of the formula; "straight_through" takes the slope 1 in
    its place (dz_y / dcos t_y = s), as InsightFace has done since December 2022. overflow, where
    the angle m1 t + m2 passes pi and the cosine turns up again:
        "none"      as the formula says (the paper states no rule);
        "fallback"  cos t - m2 sin m2 in place of cos(t + m2), ArcFace's code of 2018; m1 = 1 only;
        "easy"      cos(m1 t + m2) for cos t > 0 only, cos t elsewhere ("easy margin").
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
        interclass_filtering_threshold: float = 0.0,
    ) -> None:
        super().__init__(scale, interclass_filtering_threshold)
        one_of("gradient", gradient, ("exact", "straight_through"))
        one_of("overflow", overflow, ("none", "fallback", "easy"))
        if not (math.isfinite(m1) and m1 > 0):
            raise ValueError(f"m1={m1}: a positive factor of the angle, 1 is none")
        if not 0.0 <= m2 < math.pi:
            raise ValueError(f"m2={m2}: an angle in radians, 0 <= m2 < pi (0.5 is ArcFace's)")
        if not math.isfinite(m3):
            raise ValueError(f"m3={m3}: a finite number (0.35 or 0.4 is CosFace's)")
        if overflow == "fallback" and m1 != 1.0:
            raise ValueError(
                f"overflow='fallback' is defined for m1=1 only, not m1={m1}: use 'easy'"
            )
        self.m1, self.m2, self.m3 = m1, m2, m3
        self.gradient, self.overflow = gradient, overflow

    def target(self, rows: Rows) -> Tensor:
        cos = rows.cos_target
        shifted = self._shift(cos) - self.m3
        if self.gradient == "straight_through":
            return cos + (shifted - cos).detach()
        return shifted

    def _shift(self, cos: Tensor) -> Tensor:
        """cos(m1 t + m2) with the rule for large angles."""
        if self.m1 == 1.0 and self.m2 == 0.0:
            return cos
        angle = self.m1 * angle_of(cos) + self.m2
        shifted = torch.cos(angle)
        if self.overflow == "fallback":
            return torch.where(angle > math.pi, cos - self.m2 * math.sin(self.m2), shifted)
        if self.overflow == "easy":
            return torch.where(cos > 0, shifted, cos)
        return shifted

    def extra_repr(self) -> str:
        return f"scale={self.scale}, margin_list=({self.m1}, {self.m2}, {self.m3})"


class ArcFace(CombinedMargin):
    """z_y = s cos(t_y + m) (arXiv:1801.07698 eq. 3). gradient, overflow: as in CombinedMargin."""

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        *,
        gradient: Gradient = "exact",
        overflow: Overflow = "none",
        interclass_filtering_threshold: float = 0.0,
    ) -> None:
        super().__init__(
            scale,
            m2=margin,
            gradient=gradient,
            overflow=overflow,
            interclass_filtering_threshold=interclass_filtering_threshold,
        )


class CosFace(CombinedMargin):
    """z_y = s (cos t_y - m) (arXiv:1801.09414 eq. 4), of slope 1: both gradients are the same."""

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.4,
        *,
        gradient: Gradient = "exact",
        interclass_filtering_threshold: float = 0.0,
    ) -> None:
        super().__init__(
            scale,
            m3=margin,
            gradient=gradient,
            interclass_filtering_threshold=interclass_filtering_threshold,
        )


class SphereFace(CombinedMargin):
    """z_y = s cos(m1 t_y), the form that ArcFace compares with (arXiv:1801.07698 table 2)."""

    def __init__(
        self,
        scale: float = 64.0,
        m1: float = 1.35,
        *,
        gradient: Gradient = "exact",
        overflow: Overflow = "none",
        interclass_filtering_threshold: float = 0.0,
    ) -> None:
        super().__init__(
            scale,
            m1,
            gradient=gradient,
            overflow=overflow,
            interclass_filtering_threshold=interclass_filtering_threshold,
        )


def angle_of(cos: Tensor) -> Tensor:
    """arccos in radians, exact near 0 and pi and with a finite slope (0) at and beyond +-1."""
    least = (8 * torch.finfo(cos.dtype).eps) ** 2
    sin = ((1 - cos) * (1 + cos)).clamp_min(least).sqrt()
    return torch.atan2(sin, cos)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: one of {', '.join(allowed)}")
