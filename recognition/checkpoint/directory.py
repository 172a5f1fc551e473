"""The directory of a run's checkpoints: which are complete, and what their manifests say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_tools.common.errors import UserError
from recognition.checkpoint.manifest import check, check_of_run

FORMAT = 2
_DIRECTORY = "checkpoints"
_ROWS = r"(?:head(\d+)-)?rows-(\d+)-(\d+)\.safetensors"


class Damaged(OSError):
    """A checkpoint is not what was written: a file of it is missing or has changed."""


class RowFile(NamedTuple):
    """A file of class rows, of the classes [start, stop)."""

    name: str
    start: int
    stop: int


def directory_of(run_dir: str, step: int) -> str:
    """Where a run keeps its checkpoint of a step."""
    return os.path.join(run_dir, _DIRECTORY, f"step-{step}")


def complete(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    root = os.path.join(run_dir, _DIRECTORY)
    names = os.listdir(root) if os.path.isdir(root) else []
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
    return sorted(
        s for s in steps if os.path.isfile(os.path.join(directory_of(run_dir, s), "manifest.json"))
    )


def newest(run_dir: str) -> str | None:
    """The newest complete checkpoint of a run directory, None where there is none."""
    steps = complete(run_dir)
    return directory_of(run_dir, steps[-1]) if steps else None


def find(path: str) -> str:
    """The checkpoint at `path`: itself, or the newest of a run directory.

    Raises:
        FileNotFoundError: it is neither.
    """
    found = path if os.path.isfile(os.path.join(path, "manifest.json")) else newest(path)
    if found is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a run directory with one")
    return found


def read_manifest(path: str) -> dict[str, Any]:
    """The facts of a checkpoint directory.

    Raises:
        FileNotFoundError: not a complete checkpoint.
        Damaged: the manifest has changed.
        ValueError: written by a newer version, or not by us: a fact is missing or makes no sense.
    """
    name = os.path.join(path, "manifest.json")
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no manifest.json")
    try:
        with open(name, encoding="utf-8") as file:
            manifest = json.load(file)
        own = manifest.pop("sha256")
        version = int(manifest["format"])
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Damaged(f"{name} is damaged") from error
    if own != digest(manifest):
        raise Damaged(f"{name} is damaged: its sha256 is not its own")
    if version > FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}")
    manifest = manifest if version == FORMAT else _from_format_1(manifest)
    check(manifest, path)
    return manifest


def read_manifest_of_run(path: str) -> dict[str, Any]:
    """As read_manifest(), with all that a run needs to go on; and its errors, for that too."""
    manifest = read_manifest(path)
    check_of_run(manifest, path)
    return manifest


def row_files(manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """The files with the class rows of a head, in the order of their classes."""
    several = len(manifest["heads"]) > 1
    files = []
    for name in manifest["files"]:
        found = re.fullmatch(_ROWS, name)
        if found and found[1] == (str(head) if several else None):
            files.append(RowFile(name, int(found[2]), int(found[3])))
    return sorted(files, key=lambda file: file.start)


def all_rows(path: str, manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """As row_files(), for those that read them all.

    Raises:
        Damaged: they do not hold every class once.
    """
    files, filled = row_files(manifest, head), 0
    for file in files:
        if file.start != filled or file.stop <= file.start:
            raise Damaged(f"{path}: {file.name}, where the classes from {filled} on are due")
        filled = file.stop
    if filled != manifest["heads"][head]["num_classes"]:
        raise Damaged(f"{path} lacks the classes {filled} and more")
    return files


def digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 that a manifest carries of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def older(path: str) -> str:
    """What to say after the damage of a checkpoint: which one is before it, where one is."""
    run_dir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    found = re.fullmatch(r"step-(\d+)", os.path.basename(os.path.abspath(path)))
    earlier = [step for step in complete(run_dir) if found and step < int(found[1])]
    return f"; the one before it is {directory_of(run_dir, earlier[-1])}" if earlier else ""


def set_aside(path: str) -> str:
    """Rename a damaged checkpoint so that no run continues from it; its new name."""
    aside, count = f"{path}.damaged", 1
    while os.path.exists(aside):
        count += 1
        aside = f"{path}.damaged-{count}"
    os.rename(path, aside)
    return aside


def remove(path: str) -> None:
    """Remove a checkpoint; one that is half removed does not look complete."""
    going = path + ".removed.partial"
    os.rename(path, going)
    clear(going)


def clear(path: str) -> None:
    """Remove what lies there; of a link the link alone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def write_json(path: str, content: Any) -> None:
    """Write it to a new file, and through to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync(path: str) -> None:
    """Write the names in a directory through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _from_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """The facts of the one head stood among the others; the first had no state of the loss."""
    keys = ("num_classes", "embedding_size", "num_subcenters", "row_state")
    head = {key: manifest[key] for key in keys if key in manifest}
    head |= {"step": manifest.get("head_step"), "margin_state": manifest.get("margin_state", [])}
    return manifest | {"heads": [head | {"margin": manifest.get("margin")}]}
