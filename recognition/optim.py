"""The optimisers of the sampled class rows, by the names that scripts import."""

from recognition.head.row_optim import RowAdamW, RowSGD

__all__ = ["RowAdamW", "RowSGD"]
