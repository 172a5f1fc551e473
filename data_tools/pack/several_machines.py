"""Packing on several machines that share a file system: `--part I/N`, then `--finish`.

Part I of N writes every N-th shard into OUT.partial and records it in the journal there, as an
ordinary pack does; `--finish` is the ordinary pack that finds all its shards finished. A part holds
a lock of its own while it runs, and the lock of OUT only while it makes the directory: parts run at
the same time, but neither beside an ordinary pack nor beside `--finish`.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.common import files, locks
from data_tools.common.errors import UserError
from data_tools.common.journal import Journal, is_of_plan, num_finished, recorded
from data_tools.common.messages import count
from data_tools.common.part_locks import part_lock, running_parts
from data_tools.common.partial_directory import PartialDirectory
from data_tools.common.text import read_json

_NUMBERS = "parts.json"  # in OUT.partial: how many parts there are
_WAIT = 60.0  # seconds for the lock of OUT, which another part holds for moments only
_POLL = 0.2
_SHOWN = 20  # parts in a message


class Part(NamedTuple):
    """One of `of` parts, counted from 1."""

    number: int
    of: int

    def has(self, shard: int) -> bool:
        """Whether the shard of this number, counted over all sets that pack writes, is its own."""
        return shard % self.of == self.number - 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Of "I/N". Raises: UserError: it is none of 1/N to N/N."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {text}: expected I/N, a part from 1 to N of N: --part 2/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@contextlib.contextmanager
def writing(out: Path, part: Part, plan: dict[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """OUT.partial and its journal, which other parts write as well, while the body runs.

    Raises:
        FileExistsError: OUT exists; this part or an ordinary pack is running; or what is there is
            of another source, other options or another number of parts.
    """
    out = Path(os.path.abspath(out))
    if not files.is_free(out):
        raise FileExistsError(f"{out} exists: choose another name, or remove it")
    with contextlib.ExitStack() as stack:
        aside = _directory(out)
        try:
            busy = f"{aside.path}: part {part} of it is being written"
            stack.enter_context(locks.hold(part_lock(out, part.number), busy, remove=True))
            if not is_of_plan(aside.path, plan):
                _check_unused(out, aside.path, part)
                aside.clear()
            journal = Journal(aside.path, plan)
            _check_number(aside.path, part)
        finally:
            aside.close(keep=True)  # the lock of OUT: the other parts make theirs now
        yield aside.path, journal


def _directory(out: Path) -> PartialDirectory:
    """OUT.partial, as soon as no other part is at this point."""
    end = time.monotonic() + _WAIT
    while True:
        try:
            return PartialDirectory(out, clear=False)
        except locks.LockHeld:
            if time.monotonic() > end:
                raise
        time.sleep(_POLL)


def _check_unused(out: Path, partial: Path, part: Part) -> None:
    """Raises: FileExistsError: the directory of another plan holds shards, or is in use."""
    if others := [other for other in running_parts(out) if other != part.number]:
        raise FileExistsError(
            f"{partial}: part {others[0]} packs another source or with other options there: give "
            f"all parts the same command but for --part"
        )
    if num_finished(partial):
        raise FileExistsError(
            f"{partial} holds shards of another source or other options: finish that pack, or "
            f"remove the directory"
        )


def _check_number(partial: Path, part: Part) -> None:
    place = partial / _NUMBERS
    if files.exists(place):
        number = read_json(place, f"remove {partial} and pack again").get("parts")
        if number != part.of:
            raise FileExistsError(
                f"{partial} is being packed in {number} parts: --part I/{number}, not {part}"
            )
    else:
        files.write_bytes(place, json.dumps({"parts": part.of}).encode())


def number_of_parts(partial: Path) -> int:
    """Into how many parts OUT.partial was divided; 0 if no part was started."""
    place = partial / _NUMBERS
    if not files.exists(place):
        return 0
    return int(read_json(place, f"remove {partial} and pack again")["parts"])


def check_begun(out: Path, plan: dict[str, Any], names: list[str]) -> None:
    """Looks at the journal before --finish touches anything.

    names: of all shards, in the order in which Part.has() counts them.

    Raises: UserError: nothing of this plan is there, or shards are missing; it names their parts.
    """
    partial = out.with_name(out.name + files.PARTIAL)
    if not files.exists(partial):
        raise UserError(f"{partial}: nothing to finish: run the parts first (--part I/N)")
    if not is_of_plan(partial, plan):
        raise UserError(
            f"{partial} holds shards of another source or other options: give --finish the command "
            f"of its parts"
        )
    there = set(recorded(partial))
    parts = number_of_parts(partial)
    missing = [number for number, name in enumerate(names) if name not in there]
    if missing:
        raise UserError(f"{partial}: {missing_text(missing, parts)}")


def missing_text(missing: list[int], parts: int) -> str:
    """What to do about shards, by number, that are not finished."""
    if not parts:
        return f"{count(len(missing), 'shard')} not finished: run the command without --finish"
    numbers = sorted({shard % parts + 1 for shard in missing})
    named = ", ".join(f"{number}/{parts}" for number in numbers[:_SHOWN])
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return (
        f"{count(len(missing), 'shard')} of {count(len(numbers), 'part')} not finished: run --part "
        f"{named}{more} again, then --finish"
    )


def forget(partial: Path) -> None:
    """Remove the note on parts, before OUT.partial becomes OUT."""
    (partial / _NUMBERS).unlink(missing_ok=True)
