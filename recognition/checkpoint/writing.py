"""The steps of writing a checkpoint: complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recognition.checkpoint import tensors
from recognition.checkpoint.directory import FORMAT, clear, digest, sync, write_json

Entries = dict[str, dict[str, Any]]  # file name -> its size and hash


def prepare(partial: str) -> None:
    """An empty directory to write into; what killed saves have left beside it is removed."""
    root = os.path.dirname(partial)
    os.makedirs(root, exist_ok=True)
    for name in os.listdir(root):
        if name.endswith(".partial"):
            clear(os.path.join(root, name))
    os.mkdir(partial)


def write_files(partial: str, rank: int, files: Mapping[str, Mapping[str, Tensor]]) -> Entries:
    """Write a rank's files, and last the report that it has; the entries that are in it."""
    if not os.path.isdir(partial):
        raise OSError(
            f"{partial} is not there: rank 0 could not write either and took it away, or the ranks "
            "do not share the output's file system"
        )
    entries = {n: tensors.write(os.path.join(partial, n), held) for n, held in files.items()}
    name = _report(partial, rank)
    with open(name + ".new", "w", encoding="utf-8") as file:
        json.dump(entries, file)
    os.rename(name + ".new", name)
    return entries


def reports(partial: str, world: int) -> Entries | None:
    """The entries of all ranks; None while one has not reported."""
    found: Entries = {}
    for rank in range(world):
        try:
            with open(_report(partial, rank), encoding="utf-8") as file:
                found |= json.load(file)
        except FileNotFoundError:
            return None
    return found


def commit(partial: str, path: str, world: int, facts: Mapping[str, Any], files: Entries) -> None:
    """The manifest, and then the directory's final name."""
    for rank in range(world):
        if not os.path.isfile(_report(partial, rank)):
            raise OSError(f"no files of rank {rank} in {partial}: all ranks must share the output")
        os.unlink(_report(partial, rank))
    manifest = {"format": FORMAT, **facts, "world": world, "files": files}
    manifest_path = os.path.join(partial, "manifest.json")
    write_json(manifest_path, {**manifest, "sha256": digest(manifest)})
    sync(partial)
    former = path + ".former.partial"
    if os.path.isdir(path):  # the same step of an earlier try
        os.rename(path, former)
    os.rename(partial, path)
    sync(os.path.dirname(path))
    if os.path.isdir(former):
        clear(former)


def _report(partial: str, rank: int) -> str:
    return os.path.join(partial, f"rank-{rank}.json")
