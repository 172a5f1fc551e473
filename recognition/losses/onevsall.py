"""One binary decision a class instead of one choice among all: UniFace, SphereFace2.

The head sums softplus over the classes ("sigmoid" reduction): loss of a row =
positive_weight softplus(-z_y) + negative_weight sum over j != y of softplus(z_j).
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from data_tools.common.errors import UserError
from data_tools.common.schema import option
from recognition.losses.margin import (
    Gradient,
    Layer,
    Margin,
    Reduce,
    Rows,
    Statistics,
    positive,
    with_gradient,
)


@dataclass(eq=False, repr=False)
class UniFace(Margin):
    """z_y = s (cos t_y - m) - b, z_j = s cos t_j - b, one-vs-all with one learned b (UniFace,
    ICCV 2023, unified cross-entropy).

    Every genuine score is to be above the threshold b, every other below. b starts at ln(10 C r), r
    the sample rate. The authors' negative weight is 1. bounded: z is cut at -s and s, as in the
    authors' code, so that a row far behind its margin gets no gradient; the formula of the paper,
    and the default here, is without.
    """

    reduction = "sigmoid"

    margin: float = option(0.4, "a cosine margin", low=-1, high=2)
    negative_weight: float = positive(1.0)
    _: KW_ONLY
    bounded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bias = nn.Parameter(torch.tensor(0.0))

    def bind(self, layer: Layer) -> None:
        compared = max(layer.num_classes * layer.sample_rate, 1.0)
        self.bias.data.fill_(math.log(10 * compared))

    def target(self, rows: Rows) -> Tensor:
        return self._moved(rows.cos_target - self.margin)

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        return self._moved(cos)

    def _moved(self, cos: Tensor) -> Tensor:
        moved = cos - self.bias / self.scale
        return moved.clamp(-1, 1) if self.bounded else moved

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"bias": self.bias.detach()}


@dataclass(eq=False, repr=False)
class SphereFace2(Margin):
    """z_y = r (g(cos t_y) - m) + b, z_j = r (g(cos t_j) + m) + b, g(c) = 2 ((c + 1) / 2)^t - 1,
    one-vs-all (arXiv:2108.01513 eq. 5, SphereFace2-C).

    The two terms weigh w lam / r and w (1 - lam) / r. `scale` is the paper's r, loss_weight the
    authors' w = 50. b is learned; it starts where the pulls of the target and of the negatives
    balance at cos t = 0, the negatives counted as those that are sampled.
    gradient="straight_through" is the authors' code: slope 1 of g, for target and negatives.
    """

    reduction = "sigmoid"

    scale: float = positive(40.0)
    margin: float = option(0.4, "margin of g", low=0, high=2)
    t: float = option(3.0, "exponent of g", low=1, high=100)
    lam: float = 0.7
    loss_weight: float = positive(50.0)
    _: KW_ONLY
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lam < 1:
            raise UserError(
                f"lam={self.lam}: the weight of the target, between 0 and 1 (0.7 is usual)"
            )
        self.positive_weight = self.loss_weight * self.lam / self.scale
        self.negative_weight = self.loss_weight * (1 - self.lam) / self.scale
        self.bias = nn.Parameter(torch.tensor(0.0))

    def bind(self, layer: Layer) -> None:
        num_negatives = max((layer.num_classes - 1) * layer.sample_rate, 1.0)
        z = self.lam / ((1 - self.lam) * num_negatives)
        middle = 2 * 0.5**self.t - 1  # g(0)
        positive = self.scale * (middle - self.margin)
        negative = self.scale * (middle + self.margin)
        root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(positive - negative))
        # Two forms of one root, each without a difference of near numbers on its side of z = 1.
        if z <= 1:
            bias = math.log(2 * z) - negative - math.log(1 - z + root)
        else:
            bias = math.log((z - 1 + root) / 2) - positive
        self.bias.data.fill_(bias)

    def target(self, rows: Rows) -> Tensor:
        grown = with_gradient(self._grown, rows.cos_target, self.gradient)
        return grown - self.margin + self.bias / self.scale

    def negatives(self, cos: Tensor, rows: Rows, centre_cos: Tensor | None = None) -> Tensor:
        grown = with_gradient(self._grown, cos, self.gradient)
        return grown + self.margin + self.bias / self.scale

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"bias": self.bias.detach()}

    def _grown(self, cos: Tensor) -> Tensor:
        """g: -1..1 onto itself, flat for small cosines. Rounding may leave cos beyond -1."""
        return 2 * ((cos + 1) / 2).clamp_min(0).pow(self.t) - 1
