"""Several data sets read as one, for training on them together.

The images of set k come after those of set k - 1, and so do its classes: label l of set k is class
l + (classes of the sets before). Nothing is copied or compared: a person in two sets has two
classes, which then repel one another (docs/data.md says when to use which).
"""

import bisect
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools import shards
from data_tools.common.errors import UserError
from data_tools.shards import ClassCounts, Shards, check_labels


class Union:
    """What a loader and the trainer use of Shards, over several of them."""

    def __init__(self, sets: Sequence[Shards]) -> None:
        self.sets = list(sets)
        self.sizes = tuple(one.num_images for one in sets)
        self.num_images = sum(self.sizes)
        self.num_classes = sum(one.num_classes for one in sets)
        self._first_image = [0, *itertools.accumulate(self.sizes)]
        self._first_class = [0, *itertools.accumulate(one.num_classes for one in sets)]
        sizes = {one.image_size for one in sets}
        self.image_size = sizes.pop() if len(sizes) == 1 else None  # (h, w)
        self.path = " + ".join(str(one.path) for one in sets)

    def __len__(self) -> int:
        return self.num_images

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every image, int64 [N]."""
        for one in self.sets:  # a label beyond its own set would be a class of the next
            check_labels(one)
        firsts = zip(self.sets, self._first_class, strict=False)
        return np.concatenate([one.labels + first for one, first in firsts])

    def class_counts(self) -> ClassCounts:
        """As of Shards, of all sets together."""
        counts = zip(*(one.class_counts() for one in self.sets), strict=True)
        return ClassCounts(*(sum(column) for column in counts))

    def unlisted_note(self) -> str:
        """As of Shards, of all sets."""
        return "; ".join(filter(None, (one.unlisted_note() for one in self.sets)))

    def _place(self, i: int) -> tuple[int, int]:
        """The set of image i and its number there. Raises: IndexError."""
        if not 0 <= i < self.num_images:
            raise IndexError(f"{self.path}: image {i} of {self.num_images}")
        k = bisect.bisect_right(self._first_image, i) - 1
        return k, i - self._first_image[k]

    def where(self, i: int) -> str:
        """File and byte of image i, for messages."""
        k, image = self._place(i)
        return self.sets[k].where(image)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        k, image = self._place(i)
        label, encoded = self.sets[k][image]
        return label + self._first_class[k], encoded

    def bin_path(self, name: str) -> Path:
        """The verification set `<name>.bin` of the first set that has it.

        Raises: FileNotFoundError listing those there are.
        """
        for one in self.sets:
            if any(path.stem == name.removesuffix(".bin") for path in one.bin_paths()):
                return one.bin_path(name)
        there = ", ".join(path.stem for one in self.sets for path in one.bin_paths()) or "none"
        raise FileNotFoundError(f"{self.path}: no verification set {name}; there are: {there}")


def open_all(paths: str | Sequence[str]) -> Shards | Union:
    """One directory as Shards, several as their Union. Raises: as shards.open, and ValueError."""
    if isinstance(paths, str):
        return shards.open(paths)
    places = [os.path.realpath(path) for path in paths]
    twice = [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"rec names {twice[0]} twice: its people would repel themselves")
    return Union([shards.open(path) for path in paths])
