"""What a pack has finished, beside what it writes: a killed one goes on from there.

    OUT.partial/journal/plan.json     what is packed, and how
    OUT.partial/journal/<shard>.npz   labels, offsets, entry, resized images, what was skipped

A shard is written down when its files are on the disk; it is taken over only if its sha256 is still
the one written down. The shards of a resumed pack are those of an unbroken one, byte for byte.
"""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_DIRECTORY = "journal"
_PLAN = "plan.json"


class WrittenShard(NamedTuple):
    """A finished shard with n images."""

    entry: dict[str, Any]  # its line of index.json
    labels: np.ndarray  # int64 [n]
    offsets: np.ndarray  # int64 [n]


class Finished(NamedTuple):
    """A shard, and what there is to say of it."""

    shard: WrittenShard
    resized: int  # images
    skipped: list[tuple[str, str]]  # (where, why)


class Journal:
    """Of a directory that is being written. Without a plan nothing is kept."""

    def __init__(self, partial: Path, plan: dict[str, Any] | None) -> None:
        self._partial = partial
        self._path = partial / _DIRECTORY
        self.used = plan is not None
        if self.used and not is_of_plan(partial, plan):
            self._path.mkdir()
            _write_whole(self._path / _PLAN, json.dumps(plan).encode())

    def find(self, name: str) -> Finished | None:
        """The shard of that name if it was finished and is still whole."""
        try:
            with np.load(self._path / f"{name}.npz", allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                shard = WrittenShard(about["entry"], saved["labels"], saved["offsets"])
            for suffix, sha256 in shard.entry["sha256"].items():
                if file_sha256(self._partial / f"{name}.{suffix}") != sha256:
                    return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return Finished(shard, about["resized"], [(where, why) for where, why in about["skipped"]])

    def add(self, finished: Finished) -> None:
        if not self.used:
            return
        entry, labels, offsets = finished.shard
        about = {"entry": entry, "resized": finished.resized, "skipped": finished.skipped}
        path = self._path / f"{entry['name']}.npz"
        aside = path.with_suffix(".new.npz")
        np.savez(aside, labels=labels, offsets=offsets, about=np.array(json.dumps(about)))
        aside.replace(path)

    def remove(self) -> None:
        if self.used:
            shutil.rmtree(self._path)


def is_of_plan(partial: Path, plan: dict[str, Any] | None) -> bool:
    """Whether the directory was left by a pack of this plan."""
    try:
        return plan is not None and json.loads(
            (partial / _DIRECTORY / _PLAN).read_bytes()
        ) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        return False


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(content)
    aside.replace(path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
