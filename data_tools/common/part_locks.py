"""The locks of the parts in which several machines write one directory."""

import re
from pathlib import Path

from data_tools.common import files, locks


def part_lock(out: Path, number: int) -> Path:
    """The lock file that a process holds while it writes part `number` of `out`."""
    return out.with_name(f".{out.name}.part-{number}.lock")


def running_parts(out: Path) -> list[int]:
    """The parts that other processes are writing now."""
    return [number for number, _ in _running(out)]


def refuse_running(out: Path) -> None:
    """Raises: FileExistsError: a part of `out` is being written; it names the process."""
    for _, error in _running(out):
        raise error


def _running(out: Path) -> list[tuple[int, locks.LockHeld]]:
    found = []
    for path in files.ending(out.parent, ".lock"):
        name = re.fullmatch(re.escape(f".{out.name}.part-") + r"(\d+)\.lock", path.name)
        if name is None:
            continue
        try:
            with locks.hold(path, f"{out}: part {name[1]} of it is being written", remove=True):
                pass
        except locks.LockHeld as error:
            found.append((int(name[1]), error))
    return found
