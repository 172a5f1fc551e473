"""Writes a data set directory (the format of shards.py): complete, or not at all."""

import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.journal import Journal, WrittenShard, file_sha256, is_of_plan
from data_tools.partial import PartialDirectory
from data_tools.recordio import LABEL_AT, Header, Writer
from data_tools.shards import FORMAT, INDEX, VERSION, read_index


def write_shard(directory: Path, name: str, images: Iterable[tuple[int, bytes]]) -> WrittenShard:
    """Write (class, encoded) images as `name`.rec and .idx, on the disk when this returns."""
    rec, idx = directory / f"{name}.rec", directory / f"{name}.idx"
    labels, offsets = [], []
    with Writer(idx, rec) as writer:
        for key, (label, encoded) in enumerate(images):
            labels.append(label)
            offsets.append(writer.offset)
            writer.write(key, Header(0, float(label), key, 0), encoded)
    entry = {
        "name": name,
        "images": len(labels),
        "bytes": writer.offset,
        "sha256": {"rec": file_sha256(rec), "idx": file_sha256(idx)},
    }
    _sync(rec, idx)
    return WrittenShard(entry, np.array(labels, np.int64), np.array(offsets, np.int64))


class ShardWriter:
    """Builds a data set aside, in `OUT.partial`, and gives it its name when it is whole.

    with ShardWriter(out) as writer:
        written = [write_shard(writer.partial, name, images) ...]
        writer.finish(written, identities, image_size, about)

    Left by an exception, or without `finish`, it removes what it wrote; killed, or left because a
    worker was, it leaves OUT.partial, whose whole shards the next one takes over if it has the same
    plan. OUT itself is never half there.

    Raises: FileExistsError if `out` exists (with `overwrite`: and is not a data set), or if another
    process is writing it.
    """

    def __init__(
        self, out: str | Path, overwrite: bool = False, plan: dict[str, Any] | None = None
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._replaced = self.out.with_name(self.out.name + ".replaced")
        self._aside = PartialDirectory(self.out, lambda path: is_of_plan(path, plan))
        self.partial = self._aside.path
        try:
            self.journal = Journal(self.partial, plan)
            if self._replaced.exists() and self._is_free():
                self._replaced.rename(self.out)  # killed between the two renames of `finish`
            self._check_free(overwrite)
            if self._replaced.exists():  # killed before or during its removal
                shutil.rmtree(self._replaced)
        except BaseException:
            self._aside.close()
            raise

    def _is_free(self) -> bool:
        return not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))

    def _check_free(self, overwrite: bool) -> None:
        if self._is_free():
            return
        if not overwrite:
            raise FileExistsError(f"{self.out} exists; --overwrite replaces it")
        try:
            read_index(self.out)
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"{self.out} is not a data set that pack made ({error}); it is left alone: remove "
                f"it yourself, or choose another name"
            ) from error

    def finish(
        self,
        written: list[WrittenShard],
        identities: list[str],
        image_size: tuple[int, int],
        about: dict[str, Any],
    ) -> dict[str, Any]:
        """The index written, `about` joined to it; the directory now has its name."""
        self.journal.remove()
        index = write_index(self.partial, written, identities, image_size, about)
        if self.out.exists():
            self.out.rename(self._replaced)
        self._aside.rename()
        _sync(self.out.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        return index

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        killed = isinstance(error, ChildProcessError) and self.journal.used
        self._aside.close(keep=killed)
        if killed:
            raise ChildProcessError(
                f"{self.out}: {error}; the same command goes on from what {self.partial} has"
            ) from error
        if isinstance(error, OSError) and not error.filename:  # of a write: it names no file
            raise OSError(f"{self.out}: {error}; what was written is removed") from error


def write_index(
    directory: Path,
    written: list[WrittenShard],
    identities: list[str],
    image_size: tuple[int, int],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Complete a directory of shards: columns, names, index.json; all of it on the disk."""

    def listed(name: str) -> dict[str, str]:
        return {"file": name, "sha256": file_sha256(directory / name)}

    labels = np.concatenate([shard.labels for shard in written])
    np.save(directory / "labels.npy", labels, allow_pickle=False)
    offsets = np.concatenate([shard.offsets for shard in written])
    np.save(directory / "offsets.npy", offsets, allow_pickle=False)
    names = b"".join(os.fsencode(name) + b"\n" for name in identities)
    (directory / "identities.txt").write_bytes(names)
    sizes, counts = np.unique(np.bincount(labels, minlength=len(identities)), return_counts=True)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "images": len(labels),
        "classes": len(identities),
        "image_size": list(image_size),
        "class_sizes": {str(s): int(c) for s, c in zip(sizes, counts, strict=True)},
        **{key: listed(f"{key}.npy") for key in ("labels", "offsets")},
        "identities": listed("identities.txt"),
        "verification": [listed(bin.name) for bin in sorted(directory.glob("*.bin"))],
        **about,
        "shards": [shard.entry for shard in written],
    }
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    files = [p for p in directory.iterdir() if p.is_file() and p.suffix not in (".rec", ".idx")]
    _sync(*files, directory)
    return index


def renumber(directory: Path, shard: WrittenShard, new_class: np.ndarray) -> WrittenShard:
    """The shard with class new_class[c] in place of c, its label fields overwritten in the file."""
    labels = new_class[shard.labels]
    rec = directory / f"{shard.entry['name']}.rec"
    with open(rec, "r+b") as file:
        for offset, label in zip(shard.offsets.tolist(), labels.tolist(), strict=True):
            file.seek(offset + LABEL_AT)
            file.write(struct.pack("<f", label))
    sha256 = {**shard.entry["sha256"], "rec": file_sha256(rec)}
    _sync(rec)
    return WrittenShard({**shard.entry, "sha256": sha256}, labels, shard.offsets)


def _sync(*paths: Path) -> None:
    """Put files or directories on the disk: a rename must not outlive the data it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
