"""A decision on the images of a set, written as a relabel index."""

from pathlib import Path

import numpy as np

from data_tools import relabel
from data_tools.common import files
from data_tools.shards import NO_RELABEL, Shards
from data_tools.shards import open as open_shards


def before_cleaning(data: Shards) -> np.ndarray:
    """Number of each of the M images in the set without its relabel index, int64 [M]."""
    return np.arange(len(data)) if data.cleaned is None else data.cleaned.images


def write_decision(
    path: Path, data: Shards, new: np.ndarray, overwrite: bool = False
) -> relabel.Relabel:
    """Write the index under which image i of `data` has class new[i] (or is dropped).

    new: int64 [M] in the numbering of `data` (C or more: a new class), or relabel.DROP. Decisions
    that `data` was opened with stay in force: the index replaces theirs.
    """
    if files.exists(path) and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or remove it")
    if data.cleaned is None:
        whole, full = data, new
    else:
        whole = open_shards(data.path, NO_RELABEL)
        classes = data.cleaned.classes
        beyond = max(whole.num_classes, int(classes.max()) + 1)
        numbers = np.append(classes, beyond + np.arange(max(0, int(new.max()) + 1 - len(classes))))
        full = np.full(len(whole), relabel.DROP, np.int64)
        full[data.cleaned.images] = np.where(new == relabel.DROP, relabel.DROP, numbers[new])
    changed = np.flatnonzero(full != whole.labels)
    index = relabel.Relabel(data.fingerprint, len(whole), whole.num_classes, changed, full[changed])
    relabel.write(path, index)
    return index
