"""The checkpoints of a run on disk: their names, which are complete, and how they are renamed.

No error of the file system is read as "absent": it is raised as an OSError that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from data_tools.common import files

MANIFEST = "manifest.json"
# What follows "step-N" in the name of a complete checkpoint: nothing; a save that was killed before
# its rename; what an older version moved aside to replace it. The likeliest first.
_COPIES = ("", ".partial", ".former.partial")


class Damaged(OSError):
    """A checkpoint is not what was written: a file is missing or has changed."""


def root_of(run_dir: str) -> str:
    return os.path.join(run_dir, "checkpoints")


def directory_of(run_dir: str, step: int) -> str:
    return os.path.join(root_of(run_dir), f"step-{step}")


# --- What is there --------------------------------------------------------------------------------


def complete(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    steps = [step for step, kind, _ in _found(run_dir) if kind == ""]
    return sorted(step for step in steps if has_manifest(directory_of(run_dir, step)))


def copies(run_dir: str) -> list[str]:
    """Directories that may be a complete checkpoint: the newest first, the likeliest of each step.

    A step-N that holds files but no manifest is listed too: something has happened to it.
    """
    found = []
    for step, kind, path in _found(run_dir):
        if kind and (os.path.islink(path) or not files.is_dir(path)):
            continue  # no run makes either
        if has_manifest(path) or (kind == "" and files.is_dir(path) and listing(path)):
            found.append((-step, _COPIES.index(kind), path))
    return [path for _, _, path in sorted(found)]


def named_damaged(run_dir: str) -> list[str]:
    """The checkpoints that were renamed as damaged."""
    root = root_of(run_dir)
    names = listing(root)
    return [os.path.join(root, n) for n in names if re.fullmatch(r"step-\d+\.damaged(-\d+)?", n)]


def newest(run_dir: str) -> str | None:
    """The newest complete checkpoint of a run directory, None if it has none."""
    steps = complete(run_dir)
    if steps:
        return directory_of(run_dir, steps[-1])
    return next((path for path in copies(run_dir) if has_manifest(path)), None)


def find(path: str) -> str:
    """The checkpoint at `path`: itself, or the newest one of a run directory.

    Raises:
        FileNotFoundError: it is neither.
    """
    found = path if has_manifest(path) else newest(path)
    if found is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a run directory with one")
    return found


def predecessor(path: str) -> str:
    """A note to append to the error of a damaged checkpoint: which one precedes it, if any."""
    run_dir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    found = re.match(r"step-(\d+)", os.path.basename(os.path.abspath(path)))
    earlier: list[int] = []
    with contextlib.suppress(OSError):  # the damage matters more
        earlier = [step for step in complete(run_dir) if found and step < int(found[1])]
    return f"; the one before it is {directory_of(run_dir, earlier[-1])}" if earlier else ""


@contextlib.contextmanager
def naming_predecessor(path: str) -> Iterator[None]:
    """Append predecessor(path) to a Damaged error of the body."""
    try:
        yield
    except Damaged as error:
        raise Damaged(f"{error}{predecessor(path)}") from error


def has_manifest(path: str) -> bool:
    """Whether a checkpoint directory has a manifest."""
    name = os.path.join(path, MANIFEST)
    return not missing(name) and files.is_file(name)


def missing(path: str) -> bool:
    """Whether a file or directory is absent.

    Network file systems sometimes report an existing file as absent for a moment, so the
    directory's listing must agree.
    """
    if files.exists(path):
        return False
    directory, name = os.path.split(os.path.abspath(path))
    if name in files.names(directory) and not os.path.islink(path) and not files.exists(path):
        raise OSError(errno.ESTALE, "its directory lists it, but it cannot be opened", path)
    return not files.exists(path)


def listing(path: str) -> list[str]:
    """The sorted names in a directory; [] if it is absent.

    Raises:
        NotADirectoryError: a file, or a link to nothing, has the name.
    """
    names = files.names(path)
    if not names and not files.is_dir(path) and (files.is_link(path) or not missing(path)):
        raise NotADirectoryError(
            errno.ENOTDIR, "must be a directory, but a file or a link to nothing is there", path
        )
    return names or files.names(path)  # again, if it exists after all


def _found(run_dir: str) -> list[tuple[int, str, str]]:
    """(step, what follows "step-N" in the name, path) of a run's checkpoints, complete or not."""
    root = root_of(run_dir)
    found = []
    for name in listing(root):
        match = re.fullmatch(r"step-(\d+)(.*)", name)
        if match and match[2] in _COPIES:
            found.append((int(match[1]), match[2], os.path.join(root, name)))
    return found


# --- Renaming and removing ------------------------------------------------------------------------


def final_name(path: str) -> str:
    """The name of a checkpoint without a suffix: step-N."""
    directory, name = os.path.split(path)
    return os.path.join(directory, name.split(".")[0])


def mark_damaged(path: str) -> str:
    """Rename a damaged checkpoint so that no run resumes from it; returns its new name."""
    name = final_name(path)
    damaged, count = f"{name}.damaged", 1
    while os.path.lexists(damaged):
        count += 1
        damaged = f"{name}.damaged-{count}"
    os.rename(path, damaged)
    return damaged


def give_final_name(path: str) -> str:
    """Rename a complete copy of a checkpoint to step-N, if needed; returns that name.

    Raises:
        FileExistsError: there is a complete one already.
    """
    name = final_name(path)
    if path == name:
        return path
    if os.path.lexists(name):
        if has_manifest(name):
            raise FileExistsError(f"{name} already exists beside {path}")
        mark_damaged(name)
    os.rename(path, name)
    files.sync_directory(os.path.dirname(name))
    return name


def remove(path: str) -> None:
    """Remove a checkpoint; a half-removed one does not look complete."""
    going = path + ".removed.partial"
    os.rename(path, going)
    clear(going)


def clear(path: str) -> None:
    """Remove a file or a directory tree; of a link only the link."""
    if files.is_dir(path) and not os.path.islink(path):
        files.remove_tree(path)
    else:
        os.unlink(path)
