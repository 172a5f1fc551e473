"""Writes a data set directory (the format of shards.py): complete, or not at all."""

import json
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.journal import (
    Journal,
    WrittenShard,
    is_of_plan,
    num_finished,
    remove_journal,
)
from data_tools.common.messages import count
from data_tools.common.part_locks import refuse_running
from data_tools.common.partial_directory import (
    MARKER,
    PartialDirectory,
    check_ours,
    is_empty,
    is_marked,
    mark,
    remove,
    unmark,
)
from data_tools.recordio import LABEL_AT, Header, Writer
from data_tools.relabel import NAME as RELABEL
from data_tools.shards import FORMAT, INDEX, VERSION, content_sha256, read_index

_REPLACED = ".replaced"
_SUFFIXES = ("rec", "idx")
_BIN = ".bin"


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
        "sha256": {"rec": files.sha256(rec), "idx": files.sha256(idx)},
    }
    _sync(rec, idx)
    return WrittenShard(entry, np.array(labels, np.int64), np.array(offsets, np.int64))


class ShardWriter:
    """Builds a data set aside, in `OUT.partial`, and gives it its name when it is whole.

    with ShardWriter(out) as writer:
        written = [write_shard(writer.partial, name, images) ...]
        writer.finish(written, identities, image_size, about)

    Stopped by Ctrl-C, a full disk, a killed worker or a kill, it keeps OUT.partial if a shard of it
    is finished: the next one with the same plan reuses its whole shards. Left without `finish`, by
    a UserError, or before a shard is finished, it removes what it wrote. OUT itself is never half
    there.

    Raises:
        FileExistsError: `out` exists (with `overwrite`: and is not a data set, or holds files that
            pack did not write); another process is writing it; or OUT.partial or OUT.replaced is
            not ours. All of them are then as they were.
    """

    def __init__(
        self,
        out: str | Path,
        overwrite: bool = False,
        plan: dict[str, Any] | None = None,  # what is packed, and how; None: no shard is kept
        num_shards: int = 0,  # in all, with a plan
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._replaced = self.out.with_name(self.out.name + _REPLACED)
        self._shards = num_shards
        if not self._was_interrupted():
            self._check_free(overwrite)  # before anything is touched
        self._aside = PartialDirectory(self.out, clear=False)
        self.partial = self._aside.path
        try:
            refuse_running(self.out)
            if self._was_interrupted():
                self._replaced.rename(self.out)
                unmark(self.out)
            self._check_free(overwrite)
            if not self._is_free():
                check_ours(self._replaced)  # its name is needed when this one is finished
            _remove_replaced(self.out)  # of a pack that was killed before or during its removal
            if not is_of_plan(self.partial, plan):
                self._clear()
            self.journal = Journal(self.partial, plan)
            self._resumes = num_finished(self.partial) > 0
        except BaseException:
            self._aside.close(keep=not self._aside.is_new)
            raise

    def _was_interrupted(self) -> bool:
        """Whether a process was killed between the two renames of `finish`."""
        return is_marked(self._replaced) and self._is_free()

    def _clear(self) -> None:
        if left := num_finished(self.partial):
            print(
                f"warning: {count(left, 'shard')} that a pack with another source or other options "
                f"had finished in {self.partial} {'is' if left == 1 else 'are'} removed",
                file=sys.stderr,
            )
        self._aside.clear()

    def _is_free(self) -> bool:
        return files.is_free(self.out)

    def _check_free(self, overwrite: bool) -> None:
        if self._is_free():
            return
        if not overwrite:
            raise FileExistsError(f"{self.out} exists; --overwrite replaces it")
        try:
            index = read_index(self.out)
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise FileExistsError(
                f"{self.out} is not a data set that pack made ({error}); it is left alone: remove "
                f"it yourself, or choose another name"
            ) from error
        others = set(files.names(self.out)) - _written_names(index)
        if foreign := sorted(name for name in others if not name.endswith(_BIN)):
            raise FileExistsError(
                f"{self.out} holds {foreign[0]}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                + ", which pack did not write; --overwrite would remove it: move it away first"
            )

    def finish(
        self,
        written: list[WrittenShard],
        identities: list[str],
        image_size: tuple[int, int],
        about: dict[str, Any],
    ) -> dict[str, Any]:
        """The index written, `about` joined to it; the directory now has its name."""
        index = write_index(self.partial, written, identities, image_size, about)
        old = not self._is_free()
        if old:
            mark(self.out)
            self.out.rename(self._replaced)
        try:
            self._aside.rename(unmark_it=False)
        except BaseException:
            if old and not files.exists(self.out):
                self._replaced.rename(self.out)
                unmark(self.out)
            raise
        remove_journal(self.out)  # not before the rename: killed in between, it is needed
        unmark(self.out)
        files.sync_directory(self.out.parent)
        _remove_replaced(self.out)
        return index

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failed = error is not None and not isinstance(error, UserError)
        finished = self._num_finished()
        kept = finished != 0 and (failed or self._resumes)
        self._aside.close(keep=kept)
        if not isinstance(error, (OSError, KeyboardInterrupt)):
            return
        if self._aside.renamed:
            then = "the data set is complete, though"
        elif kept:
            shards = "the shards" if finished is None else f"{finished} of {self._shards} shards"
            then = (
                f"{shards} that are finished are kept in {self.partial}: the same command goes on "
                f"from there; to start afresh, remove that directory"
            )
        else:
            then = "no shard was finished, and what was written is removed"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(then) from error
        raise type(error)(f"{self.out}: {error}; {then}") from error

    def _num_finished(self) -> int | None:
        """None if it cannot be told."""
        try:
            return num_finished(self.partial)
        except OSError:
            return None


def _written_names(index: dict[str, Any]) -> set[str]:
    """The names that pack, and the cleaning of a set, may have put into its directory."""
    names = {INDEX, "skipped.txt", "split", RELABEL, MARKER, "journal"}
    listed = [index[key] for key in ("labels", "offsets", "identities")] + index["verification"]
    names |= {entry["file"] for entry in listed}
    names |= {index["held_out"]["names"]} if "names" in index.get("held_out", {}) else set()
    return names | {f"{shard['name']}.{kind}" for shard in index["shards"] for kind in _SUFFIXES}


def tidy(out: Path) -> None:
    """Remove what a pack that was killed after its last rename has left in and beside `out`."""
    if is_marked(out):
        remove_journal(out)
        unmark(out)
    _remove_replaced(out)


def _remove_replaced(out: Path) -> None:
    """Remove the old data set; the verification sets that a user had put into it move to `out`."""
    replaced = out.with_name(out.name + _REPLACED)
    if is_empty(replaced):  # a removal was killed after it had removed the marker
        replaced.rmdir()
    if not is_marked(replaced):
        return
    if files.exists(replaced / INDEX):  # nothing is removed yet
        written = _written_names(read_index(replaced))
        there = files.names(out)
        for name in files.names(replaced):
            if name.endswith(_BIN) and name not in written and name not in there:
                (replaced / name).rename(out / name)
    remove(replaced)


def write_index(
    directory: Path,
    written: list[WrittenShard],
    identities: list[str],
    image_size: tuple[int, int],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Complete a directory of shards: columns, names, index.json; all of it on the disk."""

    def listed(name: str) -> dict[str, str]:
        return {"file": name, "sha256": files.sha256(directory / name)}

    labels = np.concatenate([shard.labels for shard in written])
    offsets = np.concatenate([shard.offsets for shard in written])
    for name, column in (("labels", labels), ("offsets", offsets)):
        with files.replacing(directory / f"{name}.npy") as file:
            np.save(files.Plain(file), column, allow_pickle=False)
    names = b"".join(os.fsencode(name) + b"\n" for name in identities)
    files.write_bytes(directory / "identities.txt", names)
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
        "verification": [listed(bin.name) for bin in files.ending(directory, ".bin")],
        **about,
        "shards": [shard.entry for shard in written],
    }
    index["content"] = content_sha256(index)
    _sync(*(path for path in directory.iterdir() if path.suffix in (".bin", ".txt")))
    files.write_text(directory / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def renumber(directory: Path, shard: WrittenShard, new_class: np.ndarray) -> WrittenShard:
    """The shard with class new_class[c] in place of c, its label fields overwritten in the file."""
    labels = new_class[shard.labels]
    rec = directory / f"{shard.entry['name']}.rec"
    with files.naming(rec), open(rec, "r+b") as file:
        for offset, label in zip(shard.offsets.tolist(), labels.tolist(), strict=True):
            file.seek(offset + LABEL_AT)
            file.write(struct.pack("<f", label))
    sha256 = {**shard.entry["sha256"], "rec": files.sha256(rec)}
    _sync(rec)
    return WrittenShard({**shard.entry, "sha256": sha256}, labels, shard.offsets)


def _sync(*paths: Path) -> None:
    """Put files on the disk: a rename must not outlive the data it names."""
    for path in paths:
        files.sync(path)
