"""Which checkpoints of a run stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from data_tools.common.errors import UserError
from recognition.checkpoint.directory import (
    PENDING,
    Damaged,
    complete,
    directory_of,
    read_manifest,
    remove,
)


@dataclass(frozen=True)
class Keep:
    """The `newest` ones, those of every multiple of `every` steps, and the one that is best on the
    verification set `best`."""

    newest: int = 3
    every: int | None = None  # steps
    best: str | None = None


def superfluous(
    steps: Sequence[int],  # of the complete checkpoints, ascending
    scores: Mapping[int, float],  # by step, of those that were verified
    keep: Keep,
    pending: Collection[int] = (),  # that are to be verified, and are not yet
) -> list[int]:
    """The steps whose checkpoints may go. Of equally good ones the newest is the best; one that is
    not yet verified may be the best."""
    stay = {*steps[-keep.newest :], *pending}
    if keep.every:
        stay |= {step for step in steps if step % keep.every == 0}
    if keep.best and scores:
        stay.add(max(scores, key=lambda step: (scores[step], step)))
    return [step for step in steps if step not in stay]


def prune(run_dir: str, step: int, keep: Keep) -> None:
    """Remove what need not stay of the checkpoints up to `step`, the newest.

    Raises:
        OSError: one of them cannot be read, or removed.
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
