"""Embeddings of a data set on disk: files of consecutive images, each complete or absent.

    features.json               of (fingerprint of the set), images N, size D, block, network
    features-<start>-<stop>.npy float32 [stop - start, D], not normalised

Each block ends with a hash of its content (common/arrays.py), which is compared once when the
directory is opened. Embeddings are personal data: the directory and its files are their owner's.

Images count as in the set without any relabel index, so that cleaning does not make them stale.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import arrays, files
from data_tools.common.errors import UserError
from data_tools.common.text import read_json

INDEX = "features.json"
_INDEX_KEYS = {"of", "images", "size", "block", "network"}


class FeatureStore:
    """Rows of a finished directory, mapped. Raises: ValueError, FileNotFoundError naming a file."""

    def __init__(self, directory: Path, of: str | None = None, check: bool = True) -> None:
        self.path = directory
        self.index = read_index(directory)
        if of is not None and self.index["of"] != of:
            raise UserError(
                f"{directory} was computed for the set {self.index['of']}, not for {of}: "
                f"embed again"
            )
        self.num_images: int = self.index["images"]
        self.size: int = self.index["size"]
        self._block: int = self.index["block"]
        self._files = []
        for start, stop in blocks(self.num_images, self._block):
            path = block_path(directory, start, stop)
            if not files.is_file(path):
                raise FileNotFoundError(
                    f"{path} is missing: run embed again: it makes the missing files"
                )
            try:
                rows = arrays.load_hashed(path, mmap=True, check=check)
            except UserError as error:
                raise UserError(f"{error}; remove the file and run embed again") from error
            if rows.shape != (stop - start, self.size) or rows.dtype != np.float32:
                raise UserError(f"{path}: {rows.dtype} {list(rows.shape)} is not what {INDEX} says")
            self._files.append(rows)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path, None, bool]]:
        return FeatureStore, (self.path, None, False)  # checked where it was opened first

    def unit(self, images: np.ndarray) -> np.ndarray:
        """Normalised rows float32 [n, D] of images [n]. Raises: ValueError for a zero or NaN."""
        rows = np.empty((len(images), self.size), np.float32)
        block_of = images // self._block
        for b in np.unique(block_of).tolist():
            mine = np.flatnonzero(block_of == b)
            rows[mine] = self._files[b][images[mine] - b * self._block]
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
        if len(bad):
            raise UserError(
                f"{self.path}: the embedding of image {images[bad[0]]} has no direction"
            )
        return rows / norms


def read_index(directory: Path) -> dict[str, Any]:
    try:
        index = read_json(directory / INDEX)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory}: no {INDEX}: embed did not make this directory"
        ) from error
    absent = sorted(_INDEX_KEYS - index.keys()) if isinstance(index, dict) else sorted(_INDEX_KEYS)
    if absent:
        raise UserError(
            f"{directory / INDEX} is damaged: it lacks {', '.join(absent)}: embed again"
        )
    return dict(index)


def blocks(num_images: int, block: int) -> Iterator[tuple[int, int]]:
    return ((s, min(s + block, num_images)) for s in range(0, num_images, block))


def missing_blocks(directory: Path, num_images: int, block: int) -> list[tuple[int, int, int]]:
    """(number, start, stop) of each block that is not there."""
    return [
        (number, start, stop)
        for number, (start, stop) in enumerate(blocks(num_images, block))
        if not files.is_file(block_path(directory, start, stop))
    ]


def block_path(directory: Path, start: int, stop: int) -> Path:
    return directory / f"features-{start:09d}-{stop:09d}.npy"


def write_block(directory: Path, start: int, stop: int, rows: np.ndarray) -> None:
    arrays.write_hashed(block_path(directory, start, stop), rows.astype(np.float32))


def write_index(directory: Path, index: dict[str, Any]) -> None:
    files.write_text(directory / INDEX, json.dumps(index, indent=1), files.PRIVATE_FILE)
