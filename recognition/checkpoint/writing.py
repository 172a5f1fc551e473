"""Writing a checkpoint: complete or absent, never over another one; and which old ones to keep."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.files import sync_directory
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import (
    Damaged,
    clear,
    complete,
    directory_of,
    final_name,
    give_final_name,
    has_manifest,
    listing,
    remove,
)
from recognition.checkpoint.manifest import FORMAT, PENDING, read_manifest, write_manifest

Entries = dict[str, dict[str, Any]]  # file name -> its size and hash
_LEFT_OVER = r"step-\d+(\.former|\.removed)?\.partial"


def prepare(path: str, same: Collection[str] = ()) -> bool:
    """Make PATH.partial, an empty directory to write a checkpoint into.

    Returns False if the checkpoint exists already. What killed saves left behind is removed, or
    gets its final name if it is complete and its step has no checkpoint yet.

    same: checkpoints that hold what would be written.

    Raises:
        FileExistsError: `path` is complete already, but not one of `same`.
    """
    root = os.path.dirname(path)
    os.makedirs(root, exist_ok=True)
    for name in reversed(listing(root)):  # step-N.partial before step-N.former.partial
        if re.fullmatch(_LEFT_OVER, name):
            left = os.path.join(root, name)
            if ".removed" not in name and _is_intact(left) and not has_manifest(final_name(left)):
                give_final_name(left)
            else:
                clear(left)
    if has_manifest(path):
        if path not in same:
            raise FileExistsError(
                f"{path} already exists and this run did not resume from it, so it is not "
                "overwritten: choose another output="
            )
        sync_directory(root)
        return False
    os.mkdir(path + ".partial")
    return True


def _is_intact(path: str) -> bool:
    """Whether a directory holds all files of a checkpoint of the step in its name, unchanged."""
    if os.path.islink(path) or not files.is_dir(path) or not has_manifest(path):
        return False
    try:
        manifest = read_manifest(path)
    except (Damaged, UserError):
        return False
    name = os.path.basename(final_name(path))
    return name == f"step-{manifest['step']}" and not tensors.problems(path, manifest)


def discard(partial: str) -> None:
    """Remove what a failed save wrote, unless it is complete."""
    if not has_manifest(partial):
        shutil.rmtree(partial, ignore_errors=True)


def write_files(partial: str, rank: int, held: Mapping[str, Mapping[str, Tensor]]) -> Entries:
    """Write a rank's files, and last its report, which holds the entries returned."""
    if not files.is_dir(partial):
        raise OSError(
            f"{partial} is gone: either rank 0 failed to write and removed it, or the ranks do not "
            "share the file system of output="
        )
    entries = {n: tensors.write(os.path.join(partial, n), local) for n, local in held.items()}
    name = _report(partial, rank)
    with files.naming(name), open(name + ".new", "w", encoding="utf-8") as file:
        json.dump(entries, file)
    os.rename(name + ".new", name)
    return entries


def reports(partial: str, world: int) -> Entries | None:
    """The entries of all ranks; None as long as a rank has not reported."""
    found: Entries = {}
    for rank in range(world):
        try:
            found |= json.loads(files.read_bytes(_report(partial, rank)))
        except FileNotFoundError:
            return None
    return found


def complete_save(partial: str, world: int, facts: Mapping[str, Any], entries: Entries) -> None:
    """Write the manifest, then give the directory its final name.

    Raises:
        FileExistsError: a complete checkpoint has that name.
        OSError: it cannot be written.
    """
    for rank in range(world):
        if not files.is_file(_report(partial, rank)):
            raise OSError(f"no files of rank {rank} in {partial}: all ranks must share output=")
        os.unlink(_report(partial, rank))
    write_manifest(partial, {"format": FORMAT, **facts, "world": world, "files": entries})
    sync_directory(partial)
    give_final_name(partial)


def _report(partial: str, rank: int) -> str:
    return os.path.join(partial, f"rank-{rank}.json")


# --- Which checkpoints to keep --------------------------------------------------------------------


@dataclass(frozen=True)
class Keep:
    """Keep the `newest` checkpoints, every multiple of `every` steps, and the one with the best
    accuracy on the verification set `best`."""

    newest: int = 3
    every: int | None = None  # steps
    best: str | None = None


def superfluous(
    steps: Sequence[int],  # of the complete checkpoints, ascending
    scores: Mapping[int, float],  # by step, of the verified ones
    keep: Keep,
    pending: Collection[int] = (),  # steps that still have to be verified
) -> list[int]:
    """The steps whose checkpoints may be removed.

    The newest of equally good ones is the best. One that is not yet verified may be the best.
    """
    kept = {*steps[-keep.newest :], *pending}
    if keep.every:
        kept |= {step for step in steps if step % keep.every == 0}
    if keep.best and scores:
        kept.add(max(scores, key=lambda step: (scores[step], step)))
    return [step for step in steps if step not in kept]


def prune(run_dir: str, step: int, keep: Keep) -> None:
    """Remove the superfluous checkpoints up to `step`, the newest one.

    Raises:
        OSError: one of them cannot be read or removed.
    """
    steps = [s for s in complete(run_dir) if s <= step]
    scores, pending = {}, set()
    for each in steps:
        try:
            manifest = read_manifest(directory_of(run_dir, each))
        except (Damaged, UserError):
            continue  # it cannot be the best
        if manifest.get(PENDING):
            pending.add(each)
        if keep.best in manifest.get("metrics", {}):
            scores[each] = float(manifest["metrics"][keep.best])
    for each in superfluous(steps, scores, keep, pending):
        remove(directory_of(run_dir, each))
