"""Margins of each sample: from its norm (AdaFace, MagFace), by chance (ElasticFace), and the scale
that adapts itself (AdaCos).

Letters: B rows of the global batch; t angle in radians.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from data_tools.common.errors import UserError
from data_tools.common.schema import option
from recognition.losses.margin import (
    AngularMargin,
    Gradient,
    Layer,
    Margin,
    Overflow,
    Owned,
    Reduce,
    Rows,
    Statistics,
    angle,
    angle_of,
    shifted_cosine,
    with_gradient,
)


@dataclass(eq=False, repr=False)
class AdaFace(Margin):
    """z_y = s (cos(t_y - m q) - (m + m q)), q = clip(h (|x| - mean) / (std + 1e-3), -1, 1)
    (arXiv:2204.00964 eq. 18).

    Hard samples count where the norm says that the image is good. The norm, clamped to [1e-3, 100],
    gets no gradient. mean and std are running statistics of the whole batch's norms, started at 20
    and 100 (as CosFace, q near 0); they move by t_alpha towards this batch's mean and unbiased std,
    then are used, as in the authors' code; a batch of one leaves std as it is. Under accumulation
    the statistics are those of the micro-batches so far, and one optimiser step moves them once.
    The angle t - m q stays in [1e-3, pi - 1e-3]. Both g_add and g_angle are inside the scale, as in
    the authors' code.

    Differs from the authors' code: there the statistics are those of one process's batch, and
    cosines are clamped to +-(1 - 1e-3). CVLface's version is gradient="straight_through".
    """

    margin: float = angle(0.4)
    h: float = option(0.333, "how far a standard deviation of the norm reaches", low=0)
    t_alpha: float = option(0.01, "share of the batch in the running statistics", low=0, high=1)
    _: KW_ONLY
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def observe(self, rows: Rows, x: Tensor, owned: Owned) -> None:
        norm = self._all_gathered(_usable(rows.norm))
        self._next = {"mean": self.mean.lerp(norm.mean(), self.t_alpha)}
        if len(norm) > 1:
            self._next["std"] = self.std.lerp(norm.std(), self.t_alpha)

    def target(self, rows: Rows) -> Tensor:
        deviation = _usable(rows.norm.detach()) - self.current("mean")
        q = (self.h * deviation / (self.current("std") + 1e-3)).clamp(-1, 1)
        moved = self.margin * q

        def turned(cos: Tensor) -> Tensor:
            return torch.cos((angle_of(cos) - moved).clamp(1e-3, math.pi - 1e-3))

        return with_gradient(turned, rows.cos_target, self.gradient) - (self.margin + moved)

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"norm_mean": self.mean, "norm_std": self.std}


@dataclass(eq=False, repr=False)
class MagFace(AngularMargin):
    """z_y = s cos(t_y + m(a)), a = clip(|x|, l_a, u_a), m rising from l_m at l_a to u_m at u_a,
    plus lambda_g mean(a / u_a^2 + 1 / a) (arXiv:2103.06627).

    As in the authors' code; good images get long embeddings. The norm gets gradient through m(a)
    and through the regulariser, whose mean is over the whole batch. overflow="easy" is the authors'
    default; gradient="straight_through" acts on the cosine alone.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = angle(0.45)
    u_m: float = angle(0.8)
    lambda_g: float = option(35.0, "a weight (35 is usual)", low=0)
    _: KW_ONLY
    overflow: Overflow = "easy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l_m > self.u_m:
            raise UserError(
                f"l_m={self.l_m}, u_m={self.u_m}: the margin rises with the norm, l_m <= u_m"
            )
        if not 0 < self.l_a < self.u_a < math.inf:
            raise UserError(
                f"l_a={self.l_a}, u_a={self.u_a}: two norms, 0 < l_a < u_a (10 and 110)"
            )

    def target(self, rows: Rows) -> Tensor:
        above = (rows.norm.clamp(self.l_a, self.u_a) - self.l_a) / (self.u_a - self.l_a)
        margin = self.l_m + (self.u_m - self.l_m) * above  # [B]
        return self.turned(rows, margin)

    def regularizer(self, rows: Rows) -> Tensor:
        a = rows.norm.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1 / a).mean()


@dataclass(eq=False, repr=False)
class ElasticFace(Margin):
    """z_y = s cos(t_y + m_i) ("arc") or s (cos t_y - m_i) ("cos"), m_i ~ N(margin, std) drawn
    anew for each row and step (arXiv:2109.09416).

    plus: the drawn margins are given out in order, the smallest to the row with the largest target
    cosine, over the whole batch. The authors' code sorts both and then applies the permutation
    where its inverse is due, so its pairing is not monotone; ours is.
    The draw is a function of (seed, step, micro-step, place of the row in the global batch).
    margin: 0.5 (arc) or 0.35 (cos) if not given. The authors' std: 0.05; with plus 0.0175 (arc) or
    0.02 (cos).
    """

    margin: float | None = angle(None)
    std: float = option(0.05, "standard deviation of the margin", low=0, high=1)
    _: KW_ONLY
    kind: Literal["arc", "cos"] = "arc"
    plus: bool = False
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean = {"arc": 0.5, "cos": 0.35}[self.kind] if self.margin is None else self.margin

    def draw(self, rows: Rows) -> Tensor:
        """The margins of this batch in the order of the draw: [B]."""
        # On the host in float64, so that every device and precision sees the same margins.
        generator = torch.Generator().manual_seed(rows.key >> 1)
        drawn = torch.randn(len(rows.norm), generator=generator, dtype=torch.float64)
        drawn = (self.mean + self.std * drawn).to(rows.norm.dtype)
        if rows.norm.is_cuda:
            drawn = drawn.pin_memory()  # a copy from pageable memory waits for the stream
        return drawn.to(rows.norm.device, non_blocking=True)

    def target(self, rows: Rows) -> Tensor:
        margin = self.draw(rows)
        if self.plus:
            falling = torch.argsort(rows.cos_target.detach(), descending=True, stable=True)
            margin = torch.zeros_like(margin).index_copy_(0, falling, margin.sort().values)
        if self.kind == "cos":
            return rows.cos_target - margin
        return with_gradient(
            lambda cos: shifted_cosine(cos, margin), rows.cos_target, self.gradient
        )


class AdaCos(Margin):
    """z = s cos t without a margin, s = ln(B_avg) / cos(min(pi/4, median t_y)) of each batch
    (arXiv:1905.00292).

    B_avg is the mean over the rows of the sum over the other classes of exp(s_before cos t_j); s
    starts at sqrt(2) ln(C - 1). Under sampling B_avg is multiplied by (C - 1) / (classes that the
    row was compared with), or the scale would sink with the sample rate. s gets no gradient and is
    at least 1: with few classes the logarithm could become negative. The median is the lower one of
    an even number. Under accumulation B_avg and the median are over the micro-batches so far.
    """

    needs_lse = True

    def __init__(
        self, scale: float | None = None, *, interclass_filtering_threshold: float = 0.0
    ) -> None:
        super().__init__(1.0, interclass_filtering_threshold=interclass_filtering_threshold)
        if scale is not None and not 0 < scale < math.inf:
            raise UserError(f"scale={scale}: give a positive number, or none")
        self._first_scale = scale
        self.adapted_scale: Tensor
        self.register_buffer("adapted_scale", torch.tensor(float("nan")))
        self._mass: list[Tensor] = []  # log of the corrected sums of this step's rows

    @property  # type: ignore[override]
    def scale(self) -> Tensor:
        return self.current("adapted_scale")

    @scale.setter
    def scale(self, first: float) -> None:  # Margin's constructor sets one; bind() starts it
        pass

    def bind(self, layer: Layer) -> None:
        self.num_classes = layer.num_classes
        first = math.sqrt(2) * math.log(max(layer.num_classes - 1, 1))
        first = max(first, 1.0) if self._first_scale is None else self._first_scale
        self.adapted_scale.fill_(first)

    def rescale(self, lse: Tensor, rows: Rows, num_negatives: int) -> None:
        if num_negatives == 0:
            return
        angle = self._all_gathered(angle_of(rows.cos_target)).median()
        self._mass.append(lse + math.log((self.num_classes - 1) / num_negatives))
        mass = torch.cat(self._mass)
        log_average = torch.logsumexp(mass, 0) - math.log(len(mass))
        scale = log_average / torch.cos(angle.clamp_max(math.pi / 4))
        self._next = {"adapted_scale": scale.clamp_min(1.0)}

    def commit(self, found_inf: Tensor | None = None) -> None:
        super().commit(found_inf)
        self._mass = []

    def target(self, rows: Rows) -> Tensor:
        return rows.cos_target

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"scale": self.adapted_scale}


def _usable(norm: Tensor) -> Tensor:
    """Norms as AdaFace's code clamps them."""
    return norm.clamp(1e-3, 100.0)
