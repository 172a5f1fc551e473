"""KappaFace: margins from the concentration and the size of each class, held where the class is.

Letters: B rows of the global batch, C classes, C_r of this shard, D embedding, m rows of the batch
whose class is in this shard; t angle in radians.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data_tools.common.schema import option
from recognition.losses.margin import (
    AngularMargin,
    Layer,
    Owned,
    Reduce,
    Rows,
    Statistics,
    add_rows_,
    angle,
    class_histogram,
    class_mean,
)

_SIZES = (1, 2, 5, 10, 20, 50, 100)  # classes of so many images and more, in the log
_CHUNK = 1 << 15  # classes
_ROUNDING = 1e-9  # a deviation below this share of the mean is one of rounding
_LARGEST_R = 1 - 1e-3  # a mean of unit features this long or longer is as concentrated as can be


def _share(default: float, help: str) -> Any:
    return option(default, help, low=0, high=1)


def _weight() -> Any:
    return option(None, "weight of a part of psi", low=0, high=2)


@dataclass(eq=False, repr=False)
class KappaFace(AngularMargin):
    """z_y = s cos(t_y + psi_y m), psi_c = w_kappa w_k + w_size w_s (arXiv:2201.07394).

    A larger margin for classes whose features scatter, and for small classes. Of the unit features
    seen of class c in an epoch, n_c of them: r = |their mean|, kappa = r (D - r^2) / (1 - r^2),
    standardised over the classes (unbiased); w_k = 1 - sigmoid(temperature kappa); w_s = (cos(pi
    n_c / (1.05 max n)) + 1) / 2. psi is 1 in the first epoch and is computed anew at the end of
    each.

    w_kappa, w_size: gamma and 1 - gamma if not given, as in the authors' code; the paper's text has
    them the other way round. features: "epoch" takes the embeddings that were trained on,
    "momentum" those of a slow copy of the network (its parameters move by 1 - encoder_momentum each
    step, BatchNorm's statistics are copied), at the price of one more forward.

    Differs from the authors' code: psi is that of the row's own class on every rank; classes with
    one image take w_k of the median class and stay out of mean and deviation, r is at most 0.999
    (one image over and over has no finite kappa); n_c are the images seen, not those that exist; a
    class not seen keeps its psi; the slow copy moves after the step, theirs before it; the slow
    copy has BatchNorm's statistics; all state is saved.
    """

    per_class = ("psi", "feature_sum", "seen")

    margin: float = angle(0.8)
    temperature: float = _share(0.4, "sharpness of the concentration weight")
    gamma: float = _share(0.7, "weight of the concentration")
    _: KW_ONLY
    w_kappa: float | None = _weight()
    w_size: float | None = _weight()
    features: Literal["epoch", "momentum"] = "epoch"
    encoder_momentum: float = _share(0.9, "share kept each step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight_kappa = self.gamma if self.w_kappa is None else self.w_kappa
        self.weight_size = 1 - self.gamma if self.w_size is None else self.w_size
        if self.features == "epoch":
            self.encoder_momentum = None  # type: ignore[assignment]
        self.psi: Tensor
        self.feature_sum: Tensor
        self.seen: Tensor
        self._pending: list[tuple[Tensor, Tensor]] = []  # (local ids [m], unit features [m, D])

    def bind(self, layer: Layer) -> None:
        num = layer.shard[1] - layer.shard[0]
        self.num_classes, self.shard = layer.num_classes, layer.shard
        self.register_buffer("psi", torch.ones(num))
        self.register_buffer("feature_sum", torch.zeros(num, layer.embedding_size))
        self.register_buffer("seen", torch.zeros(num, dtype=torch.int64))

    def class_values(self, local_ids: Tensor) -> Tensor:
        return self.psi[local_ids, None]

    def observe(self, rows: Rows, x: Tensor, owned: Owned) -> None:
        self._pending.append((owned.local_id, x[owned.row]))

    def commit(self, found_inf: Tensor | None = None) -> None:
        for local_id, features in self._pending:
            one = torch.ones_like(local_id)
            if found_inf is not None:
                features = torch.where(found_inf > 0, 0.0, features)
                one = torch.where(found_inf > 0, 0, one)
            add_rows_(self.feature_sum, local_id, features)
            add_rows_(self.seen, local_id, one)
        self._pending = []

    def target(self, rows: Rows) -> Tensor:
        return self.turned(rows, self.margin * rows.class_values[:, 0].detach())

    def end_epoch(self, reduce: Reduce) -> Statistics:
        kappa = self._concentrations()  # [C_r], of classes with two images and more
        several = self.seen >= 2
        standard = self._standardised(kappa, several, reduce)
        w_k = 1 - torch.sigmoid(self.temperature * standard)
        num_seen = self.seen.double()  # n_c
        most = reduce(num_seen.max(), "max").clamp_min(1)
        w_s = (torch.cos(math.pi * num_seen / (1.05 * most)) + 1) / 2
        psi = self.weight_kappa * w_k + self.weight_size * w_s
        self.psi = torch.where(self.seen > 0, psi.to(self.psi.dtype), self.psi)
        statistics = self._epoch_statistics(kappa, several, reduce)
        self.feature_sum.zero_()
        self.seen.zero_()
        return statistics

    def statistics(self, reduce: Reduce) -> Statistics:
        return {"psi_mean": class_mean(self.psi, reduce)}

    def _concentrations(self) -> Tensor:
        parts = self.feature_sum.split(_CHUNK)  # in float64, but never all of them at once
        length = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in parts])
        r = (length / self.seen.clamp_min(1)).clamp_max(_LARGEST_R)  # [C_r]
        return r * (self.feature_sum.shape[1] - r**2) / (1 - r**2)

    def _standardised(self, kappa: Tensor, several: Tensor, reduce: Reduce) -> Tensor:
        """(kappa - mean) / std [C_r]; the median of all where a class has one image."""
        count = reduce(several.sum(), "sum")
        mean = reduce(kappa[several].sum(), "sum") / count.clamp_min(1)
        square = reduce((kappa[several] - mean).square().sum(), "sum")
        std = (square / (count - 1).clamp_min(1)).sqrt()
        spread = std > _ROUNDING * mean.abs()  # else all are alike
        standard = (kappa - mean) / torch.where(spread, std, torch.inf)
        # The median needs all of them in one place: C numbers, once an epoch.
        every = standard.new_zeros(self.num_classes)
        counted = torch.zeros_like(every, dtype=torch.int64)
        every[slice(*self.shard)] = standard
        counted[slice(*self.shard)] = several.long()
        every = reduce(every, "sum")[reduce(counted, "sum") > 0]
        median = every.median() if len(every) else every.new_zeros(())
        return torch.where(several, standard, median)

    def _epoch_statistics(self, kappa: Tensor, several: Tensor, reduce: Reduce) -> Statistics:
        found: Statistics = {
            "kappa": class_histogram(kappa[several], reduce),
            "psi": class_histogram(self.psi, reduce),
            "classes_seen": reduce((self.seen > 0).sum(), "sum"),
        }
        for least, above in zip(_SIZES, (*_SIZES[1:], math.inf), strict=True):
            where = (self.seen >= least) & (self.seen < above)
            count = reduce(where.sum(), "sum")
            margin = self.margin * reduce(self.psi[where].sum(), "sum") / count.clamp_min(1)
            if count > 0:  # once an epoch: the host may wait
                found[f"margin_of_classes_from_{least}_images"] = margin
        return found
