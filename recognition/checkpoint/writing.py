"""The steps of writing a checkpoint: complete or absent, and never over another one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from data_tools.common import files
from data_tools.common.errors import UserError
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import (
    FORMAT,
    Damaged,
    clear,
    final_name,
    has_manifest,
    listing,
    read_manifest,
    sync,
    take,
    write_manifest,
)

Entries = dict[str, dict[str, Any]]  # file name -> its size and hash
_LEFT_OVER = r"step-\d+(\.former|\.removed)?\.partial"


def prepare(path: str, same: Collection[str] = ()) -> bool:
    """Make PATH.partial, an empty directory to write a checkpoint into; whether one is to be
    written.

    What killed saves have left is removed, unless it is complete and its step is not there yet:
    then it gets its name.

    same: checkpoints that hold what would be written.

    Raises:
        FileExistsError: `path` is complete already, and is none of those.
        OSError: the directory cannot be read or written.
    """
    root = os.path.dirname(path)
    os.makedirs(root, exist_ok=True)
    _tidy(root)
    if has_manifest(path):
        if path not in same:
            raise FileExistsError(
                f"{path} is there already and this run has not continued from it: it is left as "
                "it is. Choose another output="
            )
        sync(root)
        return False
    os.mkdir(path + ".partial")
    return True


def _tidy(root: str) -> None:
    for name in reversed(listing(root)):  # step-N.partial before step-N.former.partial
        if re.fullmatch(_LEFT_OVER, name):
            path = os.path.join(root, name)
            if ".removed" not in name and _is_complete(path) and not has_manifest(final_name(path)):
                take(path)
            else:
                clear(path)


def _is_complete(path: str) -> bool:
    """Whether all files of a checkpoint of the step in its name are there, as they were written.
    Raises: OSError, where that cannot be told."""
    if os.path.islink(path) or not files.is_dir(path) or not has_manifest(path):
        return False
    try:
        manifest = read_manifest(path)
    except (Damaged, UserError):
        return False
    name = os.path.basename(final_name(path))
    return name == f"step-{manifest['step']}" and tensors.is_intact(path, manifest)


def discard(partial: str) -> None:
    """Remove what a failed save has written, unless it is complete."""
    if not has_manifest(partial):
        shutil.rmtree(partial, ignore_errors=True)


def write_files(partial: str, rank: int, held: Mapping[str, Mapping[str, Tensor]]) -> Entries:
    """Write a rank's files, and last the report that it has; the entries that are in it."""
    if not files.is_dir(partial):
        raise OSError(
            f"{partial} is not there: rank 0 could not write either and took it away, or the ranks "
            "do not share the output's file system"
        )
    entries = {n: tensors.write(os.path.join(partial, n), own) for n, own in held.items()}
    name = _report(partial, rank)
    with files.naming(name), open(name + ".new", "w", encoding="utf-8") as file:
        json.dump(entries, file)
    os.rename(name + ".new", name)
    return entries


def reports(partial: str, world: int) -> Entries | None:
    """The entries of all ranks; None while one has not reported."""
    found: Entries = {}
    for rank in range(world):
        try:
            found |= json.loads(files.read_bytes(_report(partial, rank)))
        except FileNotFoundError:
            return None
    return found


def commit(partial: str, path: str, world: int, facts: Mapping[str, Any], entries: Entries) -> None:
    """The manifest, and then the directory's final name.

    Raises:
        FileExistsError: a complete checkpoint has that name.
        OSError: it cannot be written.
    """
    for rank in range(world):
        if not files.is_file(_report(partial, rank)):
            raise OSError(f"no files of rank {rank} in {partial}: all ranks must share the output")
        os.unlink(_report(partial, rank))
    write_manifest(partial, {"format": FORMAT, **facts, "world": world, "files": entries})
    sync(partial)
    take(partial)


def _report(partial: str, rank: int) -> str:
    return os.path.join(partial, f"rank-{rank}.json")
