"""Margins of each class, held where the class is held: learned (JAMsFace, AdaM-Softmax), or from
the class's size. (KappaFace has a file of its own.)

Letters: B rows of the global batch, C classes, C_r of this shard; t angle in radians.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.common.errors import UserError
from data_tools.common.schema import option
from recognition.losses.margin import (
    AngularMargin,
    Layer,
    Margin,
    Reduce,
    Rows,
    Statistics,
    angle,
    class_histogram,
    class_mean,
    positive,
)


def _weight(default: float) -> Any:
    return option(default, "weight of the regulariser", low=0, high=1e4)


def _lr_factor() -> Any:
    return option(1.0, "factor of the learning rate", low=0, high=1e4)


@dataclass(eq=False, repr=False)
class JAMsFace(AngularMargin):
    """z_y = s (cos(t_y + a_y) - b_y), a_c and b_c learned for each class, plus
    reg_angular (A - mean a) + reg_cosine (B - mean b) (our reading of
    doi:10.1007/s00521-023-08732-5, not verified against the paper).

    The paper's equations could not be had, only that margins of both spaces are learned for each
    class, and that rich classes need smaller ones.
    This is AdaM-Softmax (AdaptiveFace) carried over to both.

    a_c = A sigmoid(raw), b_c = B sigmoid(raw), A = angular_bound radians, B = cosine_bound: without
    a bound, margins of classes that are seldom seen grow until NaN. The cross-entropy pushes the
    margins of the classes in the batch down, the regulariser pushes up: scope="all" every class,
    so rare ones gain (the paper's figure 1); scope="batch" those in the batch.
    With scope="all" a class of n_c images in a set of N rests where the share of wrong probability
    of its rows is about reg N / (s C n_c): while the network is young that is far above it, so
    margins fall at first and rise as training gets on. They are stepped with lr_factor times the
    learning rate of the centres, without decay.
    gradient="straight_through" acts on the cosine; the margins keep their exact slopes.
    """

    per_class = ("raw_angular", "raw_cosine")

    angular_bound: float = angle(0.8)
    cosine_bound: float = option(0.5, "largest cosine margin", low=0, high=2)
    angular_init: float = 0.3
    cosine_init: float = 0.2
    reg_angular: float = _weight(8.0)
    reg_cosine: float = _weight(8.0)
    _: KW_ONLY
    scope: Literal["all", "batch"] = "all"
    lr_factor: float = _lr_factor()

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in ("angular", "cosine"):
            bound, first = getattr(self, f"{kind}_bound"), getattr(self, f"{kind}_init")
            if not 0 < first < bound:
                raise UserError(
                    f"{kind}_init={first}: between 0 and {kind}_bound={bound}, neither included"
                )
        self.bounds = (self.angular_bound, self.cosine_bound)

    def bind(self, layer: Layer) -> None:
        num = layer.shard[1] - layer.shard[0]
        self.num_classes = layer.num_classes
        starts = (self.angular_init, self.cosine_init)
        raw = [math.log(m / (bound - m)) for m, bound in zip(starts, self.bounds, strict=True)]
        self.raw_angular = nn.Parameter(torch.full((num,), raw[0]))
        self.raw_cosine = nn.Parameter(torch.full((num,), raw[1]))

    def margins(self) -> Tensor:
        """The angular and the cosine margin of this shard's classes: [C_r, 2]."""
        return self._bounded(self.raw_angular, self.raw_cosine)

    def _bounded(self, *raw: Tensor) -> Tensor:
        bounded = [b * part.sigmoid() for b, part in zip(self.bounds, raw, strict=True)]
        return torch.stack(bounded, 1)

    def class_values(self, local_ids: Tensor) -> Tensor:
        return self._bounded(self.raw_angular[local_ids], self.raw_cosine[local_ids])

    def target(self, rows: Rows) -> Tensor:
        angular, cosine = rows.class_values.unbind(1)
        return self.turned(rows, angular) - cosine

    def regularizer(self, rows: Rows) -> Tensor | None:
        if self.scope == "all":
            return None
        share = _mean_over_classes(rows.label).to(rows.class_values.dtype)
        return self._pull(rows.class_values, share)

    def class_regularizer(self) -> Tensor | None:
        if self.scope == "batch":
            return None
        margins = self.margins()
        return self._pull(margins, torch.full_like(margins[:, 0], 1 / self.num_classes))

    def _pull(self, margins: Tensor, share: Tensor) -> Tensor:
        """Sum of share_c (reg_angular (A - a_c) + reg_cosine (B - b_c)): []."""
        weights = (self.reg_angular, self.reg_cosine)
        kinds = zip(weights, self.bounds, margins.unbind(1), strict=True)
        below = [weight * (bound - margin) for weight, bound, margin in kinds]
        return (share * (below[0] + below[1])).sum()

    def statistics(self, reduce: Reduce) -> Statistics:
        angular, cosine = self.margins().detach().unbind(1)
        return {
            "angular_mean": class_mean(angular, reduce),
            "cosine_mean": class_mean(cosine, reduce),
            "angular_histogram": class_histogram(angular, reduce),
            "cosine_histogram": class_histogram(cosine, reduce),
        }


@dataclass(eq=False, repr=False)
class AdaMSoftmax(Margin):
    """z_y = s (cos t_y - m_y), m_c learned for each class, plus reg (1 - mean m)
    (AdaptiveFace, CVPR 2019, AdaM-Softmax).

    m_c starts in U(0.3, 0.4), drawn by class, and is held to [0, 1] after each step, as in
    FaceX-Zoo's code. The mean is over all classes, so classes that are seldom seen gain margin:
    each is pulled up by reg / C a step, so that on a set of some hundred classes the default soon
    holds every margin at 1: give a reg in proportion to C there.
    """

    per_class = ("margins",)

    scale: float = positive(30.0)
    reg: float = _weight(70.0)
    _: KW_ONLY
    lr_factor: float = _lr_factor()

    def bind(self, layer: Layer) -> None:
        self.num_classes = layer.num_classes
        # A low-discrepancy draw by class id: the same at every number of shards.
        ids = np.arange(*layer.shard, dtype=np.float64)
        start = 0.3 + 0.1 * np.modf(ids * ((math.sqrt(5) - 1) / 2))[0]
        self.margins = nn.Parameter(torch.from_numpy(start).to(torch.get_default_dtype()))

    def class_values(self, local_ids: Tensor) -> Tensor:
        return self.margins[local_ids, None]

    def target(self, rows: Rows) -> Tensor:
        return rows.cos_target - rows.class_values[:, 0]

    def class_regularizer(self) -> Tensor:
        return self.reg * (1 - self.margins).sum() / self.num_classes

    def project(self) -> None:
        self.margins.data.clamp_(0, 1)

    def statistics(self, reduce: Reduce) -> Statistics:
        margins = self.margins.detach()
        return {
            "margin_mean": class_mean(margins, reduce),
            "margin_histogram": class_histogram(margins, reduce),
        }


@dataclass(eq=False, repr=False)
class DynamicArcFace(AngularMargin):
    """z_y = s cos(t_y + m_y), m_c = low + (high - low) (u_c - min u) / (max u - min u),
    u_c = n_c^(-1/4) (arXiv:2010.05350).

    n_c are the images of the class in the data set, an absent class counting as one; where all
    classes are of one size the margin is `low`. Written from the formula, not run against the
    authors' code. They use three sub-centres (num_subcenters
    of the head).
    """

    scale: float = positive(80.0)
    low: float = angle(0.05)
    high: float = angle(0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise UserError(
                f"low={self.low}, high={self.high}: the margins of the largest and smallest class"
            )
        self.margins: Tensor

    def bind(self, layer: Layer) -> None:
        if layer.class_counts is None:
            raise UserError(
                "dynamicarcface needs the number of images of each class: "
                "PartialFC(..., class_counts=counts)"
            )
        u = np.maximum(layer.class_counts, 1).astype(np.float64) ** -0.25  # [C]
        spread = u.max() - u.min()
        place = (u - u.min()) / spread if spread > 0 else np.zeros_like(u)
        margins = self.low + (self.high - self.low) * place[slice(*layer.shard)]
        margins = torch.from_numpy(margins).to(torch.get_default_dtype())
        self.register_buffer("margins", margins, persistent=False)  # nothing that is not known

    def class_values(self, local_ids: Tensor) -> Tensor:
        return self.margins[local_ids, None]

    def target(self, rows: Rows) -> Tensor:
        return self.turned(rows, rows.class_values[:, 0])

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"margin_mean": class_mean(self.margins, reduce)}


def _mean_over_classes(label: Tensor) -> Tensor:
    """Weights [B] of the rows whose weighted sum is the mean over the distinct classes."""
    ordered, order = label.sort()
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.zeros_like(new).index_copy_(0, order, new)  # the first row of each class
    return first.double() / new.sum()
