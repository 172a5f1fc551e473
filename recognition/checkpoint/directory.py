"""The directory of a run's checkpoints: which are complete, and what their manifests say.

An error of the file system is never read as "no checkpoint": it is raised, with the path.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_tools.common import files
from data_tools.common.errors import UserError
from recognition.checkpoint.manifest import check, check_of_run

FORMAT = 2
_DIRECTORY = "checkpoints"
MANIFEST = "manifest.json"
PENDING = "verification_pending"  # of a manifest: this step is to be verified, and is not yet
# A checkpoint by its final name; whole, but not renamed to it; what it replaced.
_COPIES = ("", ".partial", ".former.partial")
_ROWS = r"(?:head(\d+)-)?rows-(\d+)-(\d+)\.safetensors"

# What JSON that is no manifest raises.
_NO_MANIFEST = (
    ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError,
)  # fmt: skip


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


def root_of(run_dir: str) -> str:
    """The directory of a run's checkpoints."""
    return os.path.join(run_dir, _DIRECTORY)


def complete(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending.

    Raises:
        OSError: the directory, or a manifest in it, cannot be read.
    """
    steps = [step for step, kind, _ in _found(run_dir) if kind == ""]
    return sorted(step for step in steps if has_manifest(directory_of(run_dir, step)))


def copies(run_dir: str) -> list[str]:
    """What may be a complete checkpoint, the newest first and of a step the likeliest first.

    A save that was killed between its manifest and its rename leaves all of it as step-N.partial;
    older versions also left the one that was replaced, step-N.former.partial. A step-N that holds
    files and no manifest is listed, too: something has happened to it.

    Raises:
        OSError: as complete().
    """
    found = []
    for step, kind, path in _found(run_dir):
        if kind and (os.path.islink(path) or not files.is_dir(path)):
            continue  # we make neither
        if has_manifest(path) or (kind == "" and files.is_dir(path) and listing(path)):
            found.append((-step, _COPIES.index(kind), path))
    return [path for _, _, path in sorted(found)]


def named_damaged(run_dir: str) -> list[str]:
    """The checkpoints that were set aside."""
    root = root_of(run_dir)
    names = listing(root)
    return [os.path.join(root, n) for n in names if re.fullmatch(r"step-\d+\.damaged(-\d+)?", n)]


def _found(run_dir: str) -> list[tuple[int, str, str]]:
    """(step, what follows "step-N" in the name, path) of a run's checkpoints, whole or not."""
    root = root_of(run_dir)
    found = []
    for name in listing(root):
        match = re.fullmatch(r"step-(\d+)(.*)", name)
        if match and match[2] in _COPIES:
            found.append((int(match[1]), match[2], os.path.join(root, name)))
    return found


def has_manifest(path: str) -> bool:
    """Whether there is a manifest in a checkpoint directory. Raises: OSError, as missing()."""
    name = os.path.join(path, MANIFEST)
    return not missing(name) and files.is_file(name)


def missing(path: str) -> bool:
    """Whether a file or directory is absent.

    Network file systems sometimes say so for a moment of one that is there: the directory's
    listing must agree.

    Raises:
        OSError: it is not known.
    """
    if files.exists(path):
        return False
    directory, name = os.path.split(os.path.abspath(path))
    if name in files.names(directory) and not os.path.islink(path) and not files.exists(path):
        raise OSError(errno.ESTALE, "its directory lists it, and it cannot be opened", path)
    return not files.exists(path)


def listing(path: str) -> list[str]:
    """The names in a directory, sorted; [] if it is absent. Raises: OSError, as missing()."""
    names = files.names(path)
    if not names and not missing(path) and files.is_dir(path):
        names = files.names(path)  # once more: it is there
    return names


def newest(run_dir: str) -> str | None:
    """The newest complete checkpoint of a run directory, None where there is none.

    Raises:
        OSError: as complete().
    """
    steps = complete(run_dir)
    if steps:
        return directory_of(run_dir, steps[-1])
    return next((path for path in copies(run_dir) if has_manifest(path)), None)


def find(path: str) -> str:
    """The checkpoint at `path`: itself, or the newest of a run directory.

    Raises:
        FileNotFoundError: it is neither.
        OSError: it cannot be read.
    """
    found = path if has_manifest(path) else newest(path)
    if found is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a run directory with one")
    return found


def read_manifest(path: str) -> dict[str, Any]:
    """The facts of a checkpoint directory.

    Raises:
        FileNotFoundError: not a complete checkpoint.
        OSError: it cannot be read.
        Damaged: the manifest has changed.
        UserError: written by a newer version, or not by us: a fact is missing or makes no sense.
    """
    manifest = _read_checked(path)
    version = int(manifest["format"])
    if version > FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}")
    manifest = manifest if version == FORMAT else _from_format_1(manifest)
    check(manifest, path)
    return manifest


def _read_checked(path: str) -> dict[str, Any]:
    """The manifest as it is written, without its own hash, which is right. Raises: as
    read_manifest()."""
    name = os.path.join(path, MANIFEST)
    if missing(name):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    content = files.read_bytes(name)
    try:
        manifest = json.loads(content)
        own = manifest.pop("sha256")
        int(manifest["format"])
    except _NO_MANIFEST as error:
        raise Damaged(f"{name} is damaged") from error
    if own != digest(manifest):
        raise Damaged(f"{name} is damaged: its sha256 is not its own")
    return manifest


def amend(path: str, changes: Mapping[str, Any]) -> None:
    """Change facts of a checkpoint's manifest; None takes one out. The old or the new manifest is
    there at any moment.

    Raises:
        OSError, Damaged: it cannot be read or written.
    """
    manifest = {k: v for k, v in (_read_checked(path) | dict(changes)).items() if v is not None}
    write_manifest(path, manifest)


def write_manifest(path: str, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json with its own hash: all of it or nothing. Raises: OSError."""
    content = {**manifest, "sha256": digest(manifest)}
    write_json(os.path.join(path, MANIFEST), content)


def read_manifest_of_run(path: str) -> dict[str, Any]:
    """As read_manifest(), with all that a run needs to go on; and its errors, for that too."""
    manifest = read_manifest(path)
    check_of_run(manifest, path)
    return manifest


def row_files(manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """The files with the class rows of a head, in the order of their classes."""
    several = len(manifest["heads"]) > 1
    rows = []
    for name in manifest["files"]:
        found = re.fullmatch(_ROWS, name)
        if found and found[1] == (str(head) if several else None):
            rows.append(RowFile(name, int(found[2]), int(found[3])))
    return sorted(rows, key=lambda file: file.start)


def all_rows(path: str, manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """As row_files(), for those that read them all.

    Raises:
        Damaged: they do not hold every class once.
    """
    rows, filled = row_files(manifest, head), 0
    for file in rows:
        if file.start != filled or file.stop <= file.start:
            raise Damaged(f"{path}: {file.name}, where the classes from {filled} on are due")
        filled = file.stop
    if filled != manifest["heads"][head]["num_classes"]:
        raise Damaged(f"{path} lacks the classes {filled} and more")
    return rows


def digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 that a manifest carries of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def older(path: str) -> str:
    """What to say after the damage of a checkpoint: which one is before it, where one is."""
    run_dir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    found = re.match(r"step-(\d+)", os.path.basename(os.path.abspath(path)))
    earlier: list[int] = []
    with contextlib.suppress(OSError):  # the damage is what has to be said
        earlier = [step for step in complete(run_dir) if found and step < int(found[1])]
    return f"; the one before it is {directory_of(run_dir, earlier[-1])}" if earlier else ""


def final_name(path: str) -> str:
    """The name that a complete copy of a checkpoint is to have: step-N."""
    directory, name = os.path.split(path)
    return os.path.join(directory, name.split(".")[0])


def set_aside(path: str) -> str:
    """Rename a damaged checkpoint so that no run continues from it; its new name."""
    name = final_name(path)
    aside, count = f"{name}.damaged", 1
    while os.path.lexists(aside):
        count += 1
        aside = f"{name}.damaged-{count}"
    os.rename(path, aside)
    return aside


def take(path: str) -> str:
    """Give a complete copy of a checkpoint its final name, if it has another; that name.

    Raises:
        FileExistsError: there is a complete one already.
    """
    name = final_name(path)
    if path == name:
        return path
    if os.path.lexists(name):
        if has_manifest(name):
            raise FileExistsError(f"{name} is there already, beside {path}")
        set_aside(name)
    os.rename(path, name)
    sync(os.path.dirname(name))
    return name


def remove(path: str) -> None:
    """Remove a checkpoint; one that is half removed does not look complete."""
    going = path + ".removed.partial"
    os.rename(path, going)
    clear(going)


def clear(path: str) -> None:
    """Remove what lies there; of a link the link alone."""
    if files.is_dir(path) and not os.path.islink(path):
        files.remove_tree(path)
    else:
        os.unlink(path)


def write_json(path: str, content: Any) -> None:
    """Write it, all of it or nothing, and through to the disk."""
    files.write_text(path, json.dumps(content, indent=1))


sync = files.sync_directory


def _from_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """The facts of the one head stood among the others; the first had no state of the loss."""
    keys = ("num_classes", "embedding_size", "num_subcenters", "row_state")
    head = {key: manifest[key] for key in keys if key in manifest}
    head |= {"step": manifest.get("head_step"), "margin_state": manifest.get("margin_state", [])}
    return manifest | {"heads": [head | {"margin": manifest.get("margin")}]}
