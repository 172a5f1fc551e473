"""Writes a data set directory (the format of shards.py): complete, or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.partial import PartialDirectory
from data_tools.recordio import Header, Writer
from data_tools.shards import FORMAT, INDEX, VERSION, read_index


class WrittenShard(NamedTuple):
    """What `write_shard` tells of a shard with n images."""

    entry: dict[str, Any]  # its line of index.json
    labels: np.ndarray  # int64 [n]
    offsets: np.ndarray  # int64 [n]


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

    Left by an exception, or without `finish`, it removes what it wrote; killed, it leaves
    OUT.partial, which the next one clears. OUT itself is never half there.

    Raises: FileExistsError if `out` exists (with `overwrite`: and is not a data set), or if another
    process is writing it.
    """

    def __init__(self, out: str | Path, overwrite: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self._replaced = self.out.with_name(self.out.name + ".replaced")
        self._aside = PartialDirectory(self.out)
        self.partial = self._aside.path
        try:
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
        labels = np.concatenate([shard.labels for shard in written])
        np.save(self.partial / "labels.npy", labels, allow_pickle=False)
        offsets = np.concatenate([shard.offsets for shard in written])
        np.save(self.partial / "offsets.npy", offsets, allow_pickle=False)
        names = b"".join(os.fsencode(name) + b"\n" for name in identities)
        (self.partial / "identities.txt").write_bytes(names)
        sizes, counts = np.unique(
            np.bincount(labels, minlength=len(identities)), return_counts=True
        )
        index = {
            "format": FORMAT,
            "version": VERSION,
            "images": len(labels),
            "classes": len(identities),
            "image_size": list(image_size),
            "class_sizes": {str(s): int(c) for s, c in zip(sizes, counts, strict=True)},
            **{key: self._listed(f"{key}.npy") for key in ("labels", "offsets")},
            "identities": self._listed("identities.txt"),
            "verification": [self._listed(bin.name) for bin in sorted(self.partial.glob("*.bin"))],
            **about,
            "shards": [shard.entry for shard in written],
        }
        (self.partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        _sync(
            *(p for p in self.partial.iterdir() if p.suffix not in (".rec", ".idx")), self.partial
        )
        if self.out.exists():
            self.out.rename(self._replaced)
        self._aside.rename()
        _sync(self.out.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        return index

    def _listed(self, name: str) -> dict[str, str]:
        return {"file": name, "sha256": file_sha256(self.partial / name)}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._aside.close()
        if isinstance(error, OSError) and not error.filename:  # of a write: it names no file
            raise OSError(f"{self.out}: {error}; what was written is removed") from error


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(*paths: Path) -> None:
    """Put files or directories on the disk: a rename must not outlive the data it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
