"""Which single faults a recorded run can have."""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Iterable

from tests.faults.shim import Call, Position

# With what an operation fails: what disks and network file systems answer.
ERRORS = {
    "stat": (errno.ESTALE, errno.EIO),
    "access": (errno.ESTALE,),
    "fstat": (errno.ESTALE,),
    "open": (errno.EIO, errno.ESTALE, errno.EMFILE),
    "opendir": (errno.EIO, errno.ESTALE),
    "readdir": (errno.EIO,),
    "read": (errno.EIO, errno.ESTALE),
    "mmap": (errno.ENOMEM,),
    "create": (errno.ENOSPC, errno.EACCES),
    "write": (errno.ENOSPC, errno.EIO),
    "truncate": (errno.ENOSPC,),
    "fsync": (errno.EIO, errno.ENOSPC),
    "mkdir": (errno.ENOSPC,),
    "rename": (errno.EIO, errno.ENOSPC),
    "link": (errno.EIO,),
    "unlink": (errno.EIO,),
    "rmdir": (errno.EIO,),
    "chmod": (errno.EPERM,),
    "flock": (errno.ENOLCK, errno.EIO),
    "pdeathsig": (errno.EPERM,),
}
# After which the state on the disk is another one: a kill there is a fault of its own.
CHANGES = {"create", "write", "truncate", "fsync", "mkdir", "rename", "link", "unlink", "rmdir"}
# Operations that the quick part takes as one: they fail alike, mostly in one line of code.
_ALIKE = {
    "access": "stat", "opendir": "open", "readdir": "open", "read": "open",
    "mmap": "open", "create": "write", "truncate": "write", "mkdir": "write", "chmod": "write",
    "rmdir": "unlink",
}  # fmt: skip
_PARTIAL = re.compile(r"(^|/)\.[^/]+-#\.partial$")  # a file before it takes its name
# Calls on one open file: of a long row of them the first, the second and the last are tried.
_ROWS = {"read", "write", "fsync", "readdir", "fstat"}


def calls(*recordings: Iterable[Call]) -> list[Call]:
    """The calls that all recorded runs have in common, in order."""
    first, *others = recordings
    seen = [set(other) for other in others]
    return [call for call in first if all(call in other for other in seen)]


def every(recorded: list[Call]) -> list[Position]:
    """Every distinct call and path, with each of its errors, and a kill where it changes something.

    A call that comes again on the same path is another position; of the many reads or writes of one
    file the first two and the last are. Positions that differ in nothing but the number or the
    digest in a path are equivalent, and one of them is tried: the same call with the same fault on
    a path of the same kind, where the last call that changed the disk and the two calls before it
    are the same as well. The second shard of a set that is packed is such a case, and the tenth
    picture that is read.
    """
    last = Counter((call.operation, call.path) for call in recorded)
    chosen: dict[tuple[object, ...], Position] = {}
    change: tuple[str, str] | None = None
    before: list[tuple[str, str]] = []
    for call in recorded:
        what = (call.operation, kind(call.path))
        if (
            call.operation not in _ROWS
            or call.occurrence <= 2
            or call.occurrence == last[call.operation, call.path]
        ):
            for position in _faults(call):
                fault = (position.action, position.value)
                chosen.setdefault((fault, what, change, *before), position)
        if call.operation in CHANGES:
            change = what
        if before[-1:] != [what]:
            before = [*before[-1:], what]
    return list(chosen.values())


def one_of_a_kind(recorded: list[Call], seen: set[tuple[str, str]]) -> list[Position]:
    """Of each kind of operation on each kind of file that is not in `seen` one position, which then
    is: an error at the first call and a kill after the last in turn, of a rename both.

    The files that are written under another name first, all in one function, are of one kind until
    they take their names. An fstat is left out: Python's open() does without it.
    """
    found: dict[tuple[str, str], list[Call]] = {}
    for call in recorded:
        if call.operation == "fstat":
            continue
        operation = _ALIKE.get(call.operation, call.operation)
        where = "partial" if _PARTIAL.search(call.path) else kind(call.path)
        found.setdefault((operation, where), []).append(call)
    chosen = []
    for number, key in enumerate(key for key in found if key not in seen):
        # Of operations that fail alike one after the other: an open here, a read there.
        operations = list(dict.fromkeys(call.operation for call in found[key]))
        operation = operations[number // 2 % len(operations)]
        first = next(call for call in found[key] if call.operation == operation)
        last = found[key][-1]
        kill = Position(last, "k", 0)
        if key[0] == "rename":
            chosen += [_faults(first)[0], kill]
        elif number % 2 and last.operation in CHANGES:
            chosen.append(kill)
        else:
            chosen.append(_faults(first)[0])
    seen.update(found)
    return chosen


def slow(recorded: list[Call], milliseconds: int) -> list[Position]:
    """Each file's last fsync takes long."""
    last = {call.path: call for call in recorded if call.operation == "fsync"}
    return [Position(call, "s", milliseconds) for call in last.values()]


def _faults(call: Call) -> list[Position]:
    faults = [Position(call, "e", number) for number in ERRORS[call.operation]]
    return faults + [Position(call, "k", 0)] * (call.operation in CHANGES)


def kind(path: str) -> str:
    """The path without what tells files of one kind apart: numbers, digests, names of files. Those
    of a data set that is only read are of one kind."""
    if re.match(r"(set|faces)/", path):
        return re.match(r"\w+", path)[0]
    parts = [re.sub(r"[0-9a-f]{12,}|\d+|#", "N", part) for part in path.split("/")]
    if parts[0] == "run" and parts[-2:-1] == ["events"]:
        return "run/events/*"
    if len(parts) > 1:
        found = re.search(r"\.(rec|idx|safetensors|json)", parts[-1])
        parts[-1] = "*" + (found[0].replace("idx", "rec") if found else "")
    return "/".join(parts)
