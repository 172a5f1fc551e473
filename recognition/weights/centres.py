"""The class centres of a trained head as NumPy arrays, for the cleaning of a data set.

Letters: C classes, K sub-centres, D embedding size.
"""

from pathlib import Path

import numpy as np
from safetensors import safe_open

from data_tools.common.errors import UserError
from data_tools.common.messages import count
from recognition import checkpoint
from recognition.checkpoint.tensors import readable


class Centres:
    """The rows [C, K, D] of a head of a checkpoint, read by range."""

    def __init__(self, run: Path, head: int = 0) -> None:
        found = checkpoint.find(str(run))
        self.path = Path(found)
        manifest = checkpoint.read_manifest(found)
        if not 0 <= head < len(manifest["heads"]):
            heads = count(len(manifest["heads"]), "head")
            raise UserError(f"--head {head}: {found} has {heads}, counted from 0")
        facts = manifest["heads"][head]
        self.num_classes: int = facts["num_classes"]
        self.num_subcenters: int = facts["num_subcenters"]
        self.size: int = facts["embedding_size"]
        self._files = checkpoint.row_files(manifest, head)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Normalised centres float32 [stop - start, K, D].

        Raises:
            Damaged: a file holds no rows of the head's shape.
            OSError: a file cannot be read.
        """
        rows = np.empty((stop - start, self.num_subcenters, self.size), np.float32)
        filled = 0
        for name, first, last in self._files:
            low, high = max(start, first), min(stop, last)
            if low < high:
                part = self._read(name, low - first, high - first)
                rows[low - start : high - start] = part.reshape(high - low, -1, self.size)
                filled += high - low
        if filled != stop - start:
            raise UserError(f"{self.path} lacks some of the classes {start} to {stop - 1}")
        return rows / np.linalg.norm(rows, axis=2, keepdims=True)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a file, [stop - start, K, D] or, where K is 1, [stop - start, D]."""
        with readable(str(self.path), name), safe_open(self.path / name, "np") as file:
            part: np.ndarray = file.get_slice("weight")[start:stop]
        if part.size != (stop - start) * self.num_subcenters * self.size:
            raise checkpoint.Damaged(
                f"{self.path / name} is damaged: its rows {start} to {stop} have the shape "
                f"{list(part.shape)}, the head has {count(self.num_subcenters, 'sub-centre')} of "
                f"{count(self.size, 'number')}"
            )
        return part
