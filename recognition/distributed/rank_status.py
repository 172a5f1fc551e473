"""Where each rank is, in words, and who holds up whom."""

from __future__ import annotations

import linecache
import os
from types import FrameType
from typing import NamedTuple

SILENT = 4.0  # seconds without a word, after which a rank is not heard of any more
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
# What a line of ours is about, by its file; the first that fits.
_DOES = {
    "data_tools/": "waits for data",
    "recognition/distributed/collectives.py": "waits for the other ranks",
    "recognition/checkpoint/": "saves",
    "eval/": "verifies",
}


class Place(NamedTuple):
    """Where a rank is, as it told the others."""

    rank: int
    step: int
    does: str
    since: float  # seconds in this step
    age: float  # seconds since it told so
    host: str = ""

    def __str__(self) -> str:
        silent = f", not heard of for {self.age:.0f} s" if self.age > SILENT else ""
        return (
            f"rank {self.rank} on {self.host} {self.does} in step {self.step} "
            f"for {self.since + self.age:.0f} s{silent}"
        )


def suspects(places: list[Place]) -> tuple[list[Place], list[Place]]:
    """Those that hold up the others, and the others: who is not heard of, then who is behind, then
    who does something else than wait for other ranks."""
    waiting = _DOES["recognition/distributed/collectives.py"]
    for holds_up in (
        lambda place: place.age > SILENT,
        lambda place: place.step < max(p.step for p in places),
        lambda place: waiting not in place.does and "averages" not in place.does,
    ):
        first = [place for place in places if holds_up(place)]
        if first:
            return first, [place for place in places if place not in first]
    return [], places


def what_it_does(frame: FrameType | None) -> str:
    """In words, by the innermost line of ours: file, line, function and text."""
    while frame is not None and not _ours(frame):
        frame = frame.f_back
    if frame is None:
        return "is outside of the run"
    path = frame.f_code.co_filename.removeprefix(_ROOT)
    does = next((words for start, words in _DOES.items() if path.startswith(start)), "computes")
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    if text.endswith(".backward()"):
        does = "computes or averages gradients"
    return f"{does} ({path}:{frame.f_lineno}, {frame.f_code.co_name}: {text})"


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_ROOT) and "site-packages" not in (
        frame.f_code.co_filename
    )
