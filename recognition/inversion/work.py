"""A run of inversions: batches distributed over the processes, and files to resume from.

    OUT/
        settings.json                  the network, the identities and the settings
        images/<id>.png                a face for each identity
        grid.png                       the first 64 of them
        progress/batch-00000.png       a batch before its last step
        state/batch-00000-step-500.safetensors   the two newest states of an unfinished batch
        state/batch-00000.json         the last terms of a finished batch
        report.json                    the measurements

Batch k goes to process k mod W. A batch does not depend on the others, beyond the rounding of the
common loss in a closed set on several processes.

Letters: W processes.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
from recognition.inversion.descent import InversionBatch, Terms, descend, finite_terms
from recognition.inversion.identity import ClosedSet, Identity
from recognition.inversion.settings import Request, Settings
from recognition.run.run_dir import OWNED_SECONDS, lock_run_dir

DIRECTORIES = ("images", "state", "progress")
_REMEDY = "remove it and start again"  # of a damaged file that an inversion wrote
_TELL_EVERY = 50  # steps between two lines of the log
_SAVED = 2  # states that are kept of a batch


def batches(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """int64 ids [n] cut into batches of at most `size`."""
    return [ids[at : at + size] for at in range(0, len(ids), size)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    files.write_text(path, text, files.PRIVATE_FILE)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """An object that write_json wrote. Raises: ValueError naming a file without all of `keys`."""
    content = read_json_file(path, _REMEDY)
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        wanted = ", ".join(keys) or "settings"
        raise UserError(f"{path} is damaged (it does not hold {wanted}): {_REMEDY}")
    return content


def check_settings(out: Path, facts: Mapping[str, Any]) -> None:
    """Raises: ValueError if `out` holds other files, or an inversion with other facts."""
    path = out / "settings.json"
    if not files.is_file(path):
        partial = re.compile(rf"\.settings\.json\..*{re.escape(files.PARTIAL)}")
        ours = {".lock", *DIRECTORIES}  # made before settings.json
        others = [n for n in files.names(out) if n not in ours and not partial.fullmatch(n)]
        if others:
            raise UserError(
                f"{out} is not the directory of an inversion: it holds {', '.join(others[:4])}; "
                "choose another --out, an empty or a new one"
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
            f"{out} holds another inversion ({'; '.join(differ)[:600]}): choose another --out, or "
            "repeat the old arguments to resume it (RUN/checkpoints/step-N always names the same "
            "network)"
        )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of settings.json, with the entries of nested objects as `object.entry`."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        prefix = "" if key == "settings" else f"{key}."
        entries = value.items() if isinstance(value, dict) else [(None, value)]
        flat |= {key if entry is None else f"{prefix}{entry}": one for entry, one in entries}
    return flat


@contextlib.contextmanager
def directory(out: Path, facts: Mapping[str, Any], runtime: Runtime) -> Iterator[None]:
    """Hold the run directory, which is made for `facts` or was made for the same ones.

    Raises:
        ValueError: it was made for other facts, or the processes have different arguments.
        OSError: another run holds it, or it cannot be written.
    """
    store_exchange.check_same(runtime.group, **facts)
    check_settings(out, facts)
    with contextlib.ExitStack() as held:

        def take() -> None:
            if runtime.rank == 0:
                files.make_private(out)
                held.enter_context(lock_run_dir(str(out)))
                for name in DIRECTORIES:
                    files.make_private(out / name)
                write_json(out / "settings.json", facts)

        store_exchange.run_on_all_ranks(runtime.group, f"use {out}", take, OWNED_SECONDS)
        yield


def synthesise(
    network: nn.Module,
    identity: Identity,
    batches: Sequence[np.ndarray],  # their ids
    names: Mapping[int, str],  # of the PNG files, without .png
    settings: Settings,
    request: Request,
    runtime: Runtime,
) -> None:
    """Make every image that is not there yet. All processes return together.

    Raises:
        ValueError, OSError: as descend, Batch.load and writing.
    """
    group, world, out = runtime.group, runtime.world, request.out
    for first in range(0, len(batches), world):
        number = first + runtime.rank
        ids = batches[number] if number < len(batches) else np.zeros(0, np.int64)
        made_by = _world_that_made(out, number, [names[int(i)] for i in ids])
        due = len(ids) > 0 and made_by is None
        if identity.in_step:
            # The common loss depends on all batches of a round: those that this number of
            # processes made are made again together with the one that is missing.
            due = any(collectives.gather_objects(due, group)) and (due or made_by == world)
        steps = _saved(out, number) if due else {}
        counts, begin = [0] * world, max(steps, default=0)
        if identity.in_step:
            everywhere = collectives.gather_objects((len(ids) if due else 0, set(steps)), group)
            counts = [rows for rows, _ in everywhere]
            saved = [found for rows, found in everywhere if rows]
            begin = max(set.intersection(*saved), default=0) if saved else 0
        if due:
            batch = InversionBatch.start(settings, number, ids, runtime.device)
            if begin:
                batch.load(str(steps[begin]), begin)
                print(f"batch {number} resumes at step {begin}", file=sys.stderr, flush=True)
            terms = _finish(network, identity, batch, settings, request, counts, len(batches))
            for i, pixels in zip(ids, pictures.as_pixels(batch.images), strict=True):
                pictures.write(_image(out, names[int(i)]), pixels)
        elif isinstance(identity, ClosedSet) and any(counts):
            for _ in range(begin, settings.steps):
                identity.take_part(counts)
        if identity.in_step:
            collectives.gather_objects(None, group)  # all batches of the round are done, or none
        if due:
            write_json(_result(out, number), {"ids": ids.tolist(), "terms": terms, "world": world})
            _forget(out, number, 0)
    collectives.gather_objects(None, group)  # until all processes are here


def _finish(
    network: nn.Module,
    identity: Identity,
    batch: InversionBatch,
    settings: Settings,
    request: Request,
    counts: Sequence[int],
    total: int,
) -> Terms:
    """Take a batch to its last step, with log lines, pictures and saved states; the last terms."""
    began, before = time.perf_counter(), batch.step
    stem = f"batch-{batch.number:05d}"
    last: Terms = {}
    for parts in descend(network, identity, batch, settings, counts):
        if batch.step % _TELL_EVERY == 0 or batch.step == settings.steps:
            last = finite_terms(parts, batch)
            left = (time.perf_counter() - began) / (batch.step - before)
            left = int(left * (settings.steps - batch.step))
            print(
                f"batch {batch.number + 1}/{total}  step {batch.step}/{settings.steps}  "
                + "  ".join(f"{name} {value:.4g}" for name, value in last.items())
                + f"  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}",
                file=sys.stderr,
                flush=True,
            )
        if batch.step % request.picture_every == 0:
            picture = pictures.grid(pictures.as_pixels(batch.images))
            pictures.write(request.out / "progress" / f"{stem}.png", picture)
        if batch.step % request.save_every == 0 and batch.step < settings.steps:
            path = request.out / "state" / f"{stem}-step-{batch.step}.safetensors"
            batch.save(str(path))
            _forget(request.out, batch.number, _SAVED)
    return last


def terms_of(out: Path, count: int) -> dict[str, float]:
    """The terms of the loss after the last step, means over the batches."""
    every = [_read_result(out, number)["terms"] for number in range(count)]
    return {name: float(np.mean([terms[name] for terms in every])) for name in every[0]}


def _world_that_made(out: Path, number: int, names: Sequence[str]) -> int | None:
    """How many processes made a batch; None if it or one of its images is not there."""
    paths = [_result(out, number), *(_image(out, name) for name in names)]
    return _read_result(out, number)["world"] if all(map(files.is_file, paths)) else None


def _image(out: Path, name: str) -> Path:
    return out / "images" / f"{name}.png"


def _result(out: Path, number: int) -> Path:
    """The file that says that a batch is done."""
    return out / "state" / f"batch-{number:05d}.json"


def _read_result(out: Path, number: int) -> dict[str, Any]:
    return read_json(_result(out, number), "terms", "world")


def _saved(out: Path, number: int) -> dict[int, Path]:
    """{step: file} of a batch that is not done."""
    pattern = re.compile(rf"batch-{number:05d}-step-(\d+)\.safetensors")
    names = files.names(out / "state")
    return {int(m[1]): out / "state" / name for name in names if (m := pattern.fullmatch(name))}


def _forget(out: Path, number: int, keep: int) -> None:
    saved = _saved(out, number)
    for step in sorted(saved)[: max(len(saved) - keep, 0)]:
        saved[step].unlink()
