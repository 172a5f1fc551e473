"""A run of inversions: batches dealt out to the processes, files that it goes on from.

    OUT/
        settings.json                  what was asked, of which network
        images/<id>.png                a face for each identity
        grid.png                       the first 64 of them
        progress/batch-00000.png       a batch on its way
        state/batch-00000-step-500.safetensors   the two newest of a batch that is not done
        state/batch-00000.json         its last terms: it is done
        report.json                    what was measured

Batch k goes to process k mod W. What a batch becomes does not depend on the others but, in a closed
set of several processes, in the roundings of the common loss.

Letters: W processes.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import read_json as read_json_file
from recognition.distributed import collectives, store_exchange
from recognition.distributed.runtime import Runtime
from recognition.inversion import pictures
from recognition.inversion.descent import Batch, Terms, descend
from recognition.inversion.identity import ClosedSet, Identity
from recognition.inversion.settings import Settings
from recognition.run.run_dir import OWNED_SECONDS, lock_run_dir

_OURS = {".lock", "images", "state", "progress"}  # before settings.json


@dataclass(frozen=True)
class Every:
    """Steps between two of each."""

    save: int = 500
    picture: int = 1000
    tell: int = 50


def batches(ids: np.ndarray, rounds: np.ndarray, size: int) -> list[np.ndarray]:
    """int64 ids [n] cut into batches of at most `size`; none holds ids of two `rounds` [n], so that
    a round of different identities gives batches of different identities."""
    parts = []
    for value in np.unique(rounds):
        own = ids[rounds == value]
        parts += [own[at : at + size] for at in range(0, len(own), size)]
    return parts


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    files.write_text(path, text, files.PRIVATE_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """What write_json wrote. Raises: ValueError naming a damaged file."""
    content = read_json_file(path, "remove it and start again")
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no object): remove it and start again")
    return content


def check_settings(out: Path, facts: Mapping[str, Any]) -> None:
    """Raises: ValueError where `out` holds other things, or was made for other facts, naming
    them."""
    path = out / "settings.json"
    if not files.is_file(path):
        others = (
            sorted(p.name for p in out.iterdir() if not _is_ours(p.name))
            if files.is_dir(out)
            else []
        )
        if others:
            raise UserError(
                f"{out} is no directory of an inversion, it holds {', '.join(others[:4])}: choose "
                "another --out, an empty or a new one"
            )
        return
    known, asked = _flat(read_json(path)), _flat(json.loads(json.dumps(facts)))
    if known.get("network.sha256") == asked.get("network.sha256"):
        asked["network.path"] = known.get("network.path")  # a checkpoint, by any of its names
    differ = [
        f"{key} {known.get(key)!r} there, {asked.get(key)!r} now"
        for key in {**known, **asked}
        if known.get(key) != asked.get(key)
    ]
    if differ:
        raise UserError(
            f"{out} holds another inversion ({'; '.join(differ)[:600]}): choose another --out, "
            "or ask for the same to go on with it (RUN/checkpoints/step-N names a network for good)"
        )


def _is_ours(name: str) -> bool:
    return name in _OURS or (name.startswith(".settings.json.") and name.endswith(files.PARTIAL))


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an inversion was made for, entry by entry."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        prefix = "" if key == "settings" else f"{key}."
        entries = value.items() if isinstance(value, dict) else [(None, value)]
        flat |= {key if entry is None else f"{prefix}{entry}": one for entry, one in entries}
    return flat


@contextlib.contextmanager
def directory(out: Path, facts: Mapping[str, Any], runtime: Runtime) -> Iterator[None]:
    """Hold the run directory, made for `facts` or found with the same.

    Raises:
        ValueError: it is there with other facts, or the processes were asked for different things.
        OSError: another run holds it, or it cannot be written.
    """
    store_exchange.check_same(runtime.group, **facts)
    check_settings(out, facts)
    with contextlib.ExitStack() as held:

        def take() -> None:
            if runtime.rank == 0:
                files.make_private(out)
                held.enter_context(lock_run_dir(str(out)))
                for name in ("images", "state", "progress"):
                    files.make_private(out / name)
                write_json(out / "settings.json", facts)

        store_exchange.run_on_all_ranks(runtime.group, f"use {out}", take, OWNED_SECONDS)
        yield


def synthesise(
    network: nn.Module,
    identity: Identity,
    work: Sequence[np.ndarray],  # the batches' ids
    names: Mapping[int, str],  # of the PNG files, without .png
    settings: Settings,
    out: Path,
    runtime: Runtime,
    every: Every = Every(),  # noqa: B008, frozen
) -> None:
    """Make every image that is not there yet. All processes leave it together.

    Raises:
        ValueError, OSError: as descend, Batch.load and writing.
    """
    group, world = runtime.group, runtime.world
    for first in range(0, len(work), world):
        number = first + runtime.rank
        left = number < len(work)
        by = _done_by(out, number)
        if (
            left
            and by is not None
            and not all(
                files.is_file(out / "images" / f"{names[int(i)]}.png") for i in work[number]
            )
        ):
            by = None  # an image was taken away
        if identity.in_step:
            there = collectives.gather_objects((left, by), group)
            if by == world and any(one and other is None for one, other in there):
                by = None  # once more, so that the others have the company that they had
        batch, steps = None, {}
        if left and by is None:
            batch = Batch.start(settings, number, work[number], runtime.device)
            steps = _saved(out, number)
        counts, begin = [0] * world, 0
        if identity.in_step:
            everywhere = collectives.gather_objects(
                (len(batch.ids) if batch else 0, set(steps)), group
            )
            counts = [rows for rows, _ in everywhere]
            common = [found for rows, found in everywhere if rows]
            shared = set.intersection(*common) if common else set()
            steps = {step: path for step, path in steps.items() if step in shared}
            begin = max(shared, default=0)
        if batch is not None:
            if steps:
                batch.load(str(steps[max(steps)]), max(steps))
            last = _finish(network, identity, batch, names, settings, out, counts, every, len(work))
        elif isinstance(identity, ClosedSet) and any(counts):
            for _ in range(begin, settings.steps):
                identity.take_part(counts)
        if identity.in_step:
            collectives.gather_objects(None, group)  # all are done, or none is
        if batch is not None:
            done = {"ids": batch.ids.tolist(), "terms": last, "world": world}
            write_json(_done(out, number), done)
            _forget(out, number, 0)
    collectives.gather_objects(None, group)  # until all have come so far


def _finish(
    network: nn.Module, identity: Identity, batch: Batch, names: Mapping[int, str],
    settings: Settings, out: Path, counts: Sequence[int], every: Every, total: int,
) -> Terms:  # fmt: skip
    """The batch to its end and into its files; the last terms."""
    began, before = time.perf_counter(), batch.step
    last: Terms = {}
    if before:
        print(f"batch {batch.number} goes on at step {before}", file=sys.stderr, flush=True)

    def after(batch: Batch, terms: Terms | None) -> None:
        if terms is not None:
            last.update(terms)
            left = (time.perf_counter() - began) / (batch.step - before)
            left *= settings.steps - batch.step
            print(_line(batch, total, settings.steps, terms, left), file=sys.stderr, flush=True)
        if batch.step % every.picture == 0:
            picture = pictures.grid(pictures.as_pixels(batch.images))
            pictures.write(out / "progress" / f"batch-{batch.number:05d}.png", picture)
        if batch.step % every.save == 0 and batch.step < settings.steps:
            path = out / "state" / f"batch-{batch.number:05d}-step-{batch.step}.safetensors"
            batch.save(str(path))
            _forget(out, batch.number, 2)

    descend(network, identity, batch, settings, counts, after, every.tell)
    for i, pixels in zip(batch.ids, pictures.as_pixels(batch.images), strict=True):
        pictures.write(out / "images" / f"{names[int(i)]}.png", pixels)
    return last


def terms_of(out: Path, count: int) -> dict[str, float]:
    """The terms of the loss at the end, means over the batches."""
    every = [_what_was_done(out, k)["terms"] for k in range(count)]
    return {name: float(np.mean([terms[name] for terms in every])) for name in every[0]}


def _done_by(out: Path, number: int) -> int | None:
    """Of how many processes the run was that made this batch; None: it is not done."""
    return _what_was_done(out, number)["world"] if files.is_file(_done(out, number)) else None


def _what_was_done(out: Path, number: int) -> dict[str, Any]:
    """Raises: ValueError naming a damaged file."""
    content = read_json(_done(out, number))
    if not {"world", "terms"} <= content.keys():
        raise UserError(f"{_done(out, number)} is damaged (no terms): remove it and start again")
    return content


def _done(out: Path, number: int) -> Path:
    return out / "state" / f"batch-{number:05d}.json"


def _saved(out: Path, number: int) -> dict[int, Path]:
    """{step: file} of a batch that is not done."""
    pattern = re.compile(rf"batch-{number:05d}-step-(\d+)\.safetensors")
    return {
        int(found[1]): path
        for path in (out / "state").iterdir()
        if (found := pattern.fullmatch(path.name))
    }


def _forget(out: Path, number: int, keep: int) -> None:
    saved = _saved(out, number)
    for step in sorted(saved)[: max(len(saved) - keep, 0)]:
        saved[step].unlink()


def _line(batch: Batch, total: int, steps: int, terms: Terms, left: float) -> str:
    values = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
    return (
        f"batch {batch.number + 1}/{total}  step {batch.step}/{steps}  {values}  "
        f"left {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
    )
