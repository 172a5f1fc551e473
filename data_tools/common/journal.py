"""What a pack has finished, beside what it writes: the same command resumes from there.

    OUT.partial/journal/plan.json     what is packed, and how
    OUT.partial/journal/<shard>.npz   labels, offsets, entry, counts, what was skipped

A shard is recorded once its files are on the disk; it is reused only if its sha256 is still the
recorded one. The shards of a resumed pack are those of an uninterrupted one, byte for byte.

Damage is told apart from a disk that fails: a record that is absent or damaged costs its shard, but
an I/O error ends the pack with the path, and nothing is removed.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.common import files

_DIRECTORY = "journal"
_PLAN = "plan.json"


class WrittenShard(NamedTuple):
    """A finished shard with n images."""

    entry: dict[str, Any]  # its line of index.json
    labels: np.ndarray  # int64 [n]
    offsets: np.ndarray  # int64 [n]


class Finished(NamedTuple):
    """A shard and the counts that belong to it."""

    shard: WrittenShard
    resized: int  # images
    skipped: list[tuple[str, str]]  # (where, why)
    several: int = 0  # images in which a detector found more than one face


class Journal:
    """The journal of a directory that is being written. Without a plan nothing is kept."""

    def __init__(self, partial: Path, plan: dict[str, Any] | None) -> None:
        self._path = partial / _DIRECTORY
        self.used = plan is not None
        if self.used and not is_of_plan(partial, plan):
            self._path.mkdir()
            files.write_bytes(self._path / _PLAN, json.dumps(plan).encode())

    def find(self, name: str, directory: Path) -> Finished | None:
        """The shard of that name in `directory` if it was finished and is still whole.

        Raises: OSError if its files are there and cannot be read.
        """
        finished = self._read(name)
        if finished is None:
            return None
        for suffix, sha256 in finished.shard.entry["sha256"].items():
            path = directory / f"{name}.{suffix}"
            if not files.exists(path) or files.sha256(path) != sha256:
                return None
        return finished

    def _read(self, name: str) -> Finished | None:
        path = self._path / f"{name}.npz"
        if not files.exists(path):
            return None
        content = files.read_bytes(path)
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                shard = WrittenShard(about["entry"], saved["labels"], saved["offsets"])
            skipped = [(where, why) for where, why in about["skipped"]]
            return Finished(shard, about["resized"], skipped, about["several"])
        except Exception:  # the bytes were read: whatever zip, npy or JSON find in them is damage
            return None

    def add(self, finished: Finished) -> None:
        """Record a shard. Raises: OSError naming the file."""
        if not self.used:
            return
        entry, labels, offsets = finished.shard
        about = {"entry": entry, **finished._asdict()}
        del about["shard"]
        content = io.BytesIO()
        np.savez(content, labels=labels, offsets=offsets, about=np.array(json.dumps(about)))
        files.write_bytes(self._path / f"{entry['name']}.npz", content.getvalue())


def recorded(partial: Path) -> list[str]:
    """The names of the shards that are recorded. Raises: OSError: as num_finished()."""
    names = files.names(partial / _DIRECTORY)
    return [name.removesuffix(".npz") for name in names if name.endswith(".npz")]


def num_finished(partial: Path) -> int:
    """How many shards are recorded. Raises: OSError if the directory cannot be read."""
    return len(recorded(partial))


def remove_journal(directory: Path) -> None:
    """Remove the journal from a data set that has its name."""
    if files.exists(directory / _DIRECTORY):
        files.remove_tree(directory / _DIRECTORY)


def is_of_plan(partial: Path, plan: dict[str, Any] | None) -> bool:
    """Whether the directory was left by a pack of this plan.

    Raises: OSError if there is a plan that cannot be read.
    """
    path = partial / _DIRECTORY / _PLAN
    if plan is None or not files.exists(path):
        return False
    content = files.read_bytes(path)
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return bool(found == json.loads(json.dumps(plan)))
