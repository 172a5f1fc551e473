"""Saving beside the training: it waits for a copy of the state, threads write the files.

The threads call no collective. Rank 0's learns from small files in the directory that the others
have written theirs; the ranks agree on the outcome in the training thread, before the next save
and at the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from recognition.checkpoint.directory import PENDING, amend, directory_of, read_manifest
from recognition.checkpoint.parts import Parts
from recognition.checkpoint.retention import Keep, prune
from recognition.checkpoint.writing import (
    Entries,
    commit,
    discard,
    prepare,
    reports,
    write_files,
)
from recognition.distributed.collectives import gather_through_store, run_on_all_ranks

_COPYING = 2  # threads
_PIECE = 16 << 20  # elements that one of them copies at a time
_POLL = 0.1  # seconds between looks for the others' reports
_PATIENCE = 60.0  # seconds that a run that fails waits for the ranks to end the save in flight

Report = Callable[[int, str], None]  # (step of the checkpoint, why it could not be written)


class Saver:
    """Writes a run's checkpoints; every rank of the heads' group has one and calls it alike.

    At most one save is in flight: the next one, and finish(), wait for it. A save that fails leaves
    no trace and the older checkpoints; it is said at once on stderr by the rank that failed and
    handed to `report` on every rank once all know. Leaving the context by an exception waits
    for the save in flight, a minute at most, without a word to ranks that may be gone.

    A checkpoint that is there is not written again, and none is written over another one.

    loaded: the step that the run continues from, if it does.
    background: write while the training goes on, at the price of a copy of this rank's state in
    host memory, kept for the next save. Otherwise save() returns when the checkpoint is there.
    """

    def __init__(
        self,
        run_dir: str,
        group: ProcessGroup,
        keep: Keep,
        background: bool = True,
        report: Report = lambda step, why: None,
        loaded: int | None = None,
    ) -> None:
        self.run_dir, self.group, self.keep = run_dir, group, keep
        self.background, self.report = background, report
        # Checkpoints of which this run has the state: the one that it continues from, and its own.
        self._known = set[str]() if loaded is None else {directory_of(run_dir, loaded)}
        self._in_flight: _Save | None = None
        self._failure: str | None = None  # of the last save that has ended
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(self, parts: Parts, facts: Mapping[str, Any]) -> None:
        """Begin checkpoints/step-<facts["step"]>.

        facts: JSON for the manifest, `step` among it.
        """
        self.finish()
        step, rank = facts["step"], self.group.rank()
        path = directory_of(self.run_dir, step)

        def begin() -> bool:
            return rank == 0 and prepare(path, self._known)

        try:
            wanted = run_on_all_ranks(self.group, "prepare the checkpoint", begin)[0]
        except OSError as error:
            self._end(step, str(error))
            return
        if not wanted:
            self._failure = None
            self.note_metrics(step, facts.get("metrics", {}))
            return
        self._known.add(path)
        files = parts.files()
        if self.background:
            files = self._copied(files)
        facts = {**facts, "heads": [part.facts() for part in parts.heads]}
        self._in_flight = _Save(self.run_dir, path, self.group, files, facts, self.keep)
        if not self.background:
            self.finish()

    def finish(self) -> str | None:
        """Wait for the save in flight; why the last save, if there was one, has failed."""
        saving, self._in_flight = self._in_flight, None
        if saving is not None:
            self._end(saving.facts["step"], saving.finish())
        return self._failure

    def note_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the results of a verification to the checkpoint of `step`, which is there.

        Without them the checkpoint stays as it is, marked as not verified: that is said on stderr.
        """
        if self.group.rank() != 0 or not metrics:
            return
        path = directory_of(self.run_dir, step)
        try:
            known = read_manifest(path).get("metrics", {})
            amend(path, {"metrics": known | metrics, PENDING: None})
        except (OSError, ValueError) as error:
            print(f"warning: {path} lacks its verification: {error}", file=sys.stderr, flush=True)

    def save_now(self, parts: Parts, facts: Mapping[str, Any], waits: Sequence[float] = ()) -> str:
        """A checkpoint that the run must not end without; its path.

        waits: seconds before each further try.

        Raises:
            OSError: the last try failed too.
        """
        self.save(parts, facts)
        failure = self.finish()
        for seconds in waits:
            if failure is not None:
                time.sleep(seconds)
                self.save(parts, facts)
                failure = self.finish()
        if failure is not None:
            raise OSError(failure)
        return directory_of(self.run_dir, facts["step"])

    def _end(self, step: int, failure: str | None) -> None:
        self._failure = failure
        if failure is not None:
            self.report(step, failure)

    def _copied(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
        """The tensors in host memory of our own, kept for the next save: new pages are slow."""
        copies: dict[str, Mapping[str, Tensor]] = {}
        kept: dict[tuple[str, str], Tensor] = {}
        pieces: list[tuple[Tensor, Tensor]] = []
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                own = self._copies.get((file, name))
                if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
                    pinned = tensor.device.type == "cuda"
                    own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                kept[file, name] = own
                if tensor.device.type == "cpu" and tensor.is_contiguous():
                    parts = own.view(-1).split(_PIECE), tensor.detach().view(-1).split(_PIECE)
                    pieces += zip(*parts, strict=True)
                else:
                    own.copy_(tensor.detach(), non_blocking=True)
            copies[file] = {name: kept[file, name] for name in tensors}
        with ThreadPoolExecutor(_COPYING) as copying:  # one core does not fill the memory's bus
            list(copying.map(lambda piece: piece[0].copy_(piece[1]), pieces))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._copies = kept
        return copies

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._in_flight is not None:
            self._in_flight.leave(_PATIENCE)


class _Save:
    """A save in flight on this rank: its thread, and what came of it."""

    def __init__(
        self,
        run_dir: str,
        path: str,
        group: ProcessGroup,
        files: Mapping[str, Mapping[str, Tensor]],
        facts: Mapping[str, Any],
        keep: Keep,
    ) -> None:
        self.run_dir, self.path, self.partial = run_dir, path, path + ".partial"
        self.group, self.facts, self.keep = group, facts, keep
        self._entries: Entries = {}
        self._failure: str | None = None
        self._written = threading.Event()
        self._agreed: Entries | None = None  # of all ranks, when the training thread knows them
        self._abandoned = False
        self._wake = threading.Event()  # one of the two above has changed
        self._thread = threading.Thread(target=self._work, args=(files,), daemon=True)
        self._thread.start()

    def finish(self) -> str | None:
        """Wait for all ranks; why it failed, alike on every rank."""
        outcomes = gather_through_store(self._outcome, self.group)
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            self._abandon()
            return "cannot write the checkpoint: " + "; ".join(failures)
        self._agreed = {n: entry for entries, _ in outcomes for n, entry in entries.items()}
        self._wake.set()

        def end() -> None:
            self._thread.join()
            if self._failure:
                raise OSError(self._failure)

        try:
            run_on_all_ranks(self.group, "complete the checkpoint", end)
        except OSError as error:
            return str(error)
        return None

    def _outcome(self) -> tuple[Entries, str | None]:
        """Wait for this rank's files: their entries, and why they could not be written."""
        self._written.wait()
        return self._entries, self._failure

    def leave(self, seconds: float) -> None:
        """Wait for it without the other ranks, so long; then give it up."""
        self._thread.join(seconds)
        self._abandon()

    def _abandon(self) -> None:
        self._abandoned = True
        self._wake.set()
        self._thread.join(_PATIENCE)

    def _work(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        rank = self.group.rank()
        try:
            self._entries = write_files(self.partial, rank, files)
            self._written.set()
            if rank == 0:
                self._complete()
        except Exception as error:
            self._failure = f"rank {rank}: {error or repr(error)}"
            print(f"warning: {self.path}: {self._failure}", file=sys.stderr, flush=True)
            if not self._written.is_set():
                for name in files:  # makes room where there is none
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self.partial, name))
        finally:
            self._written.set()
            if rank == 0 and (self._abandoned or self._failure):
                with contextlib.suppress(OSError):
                    discard(self.partial)

    def _complete(self) -> None:
        """On rank 0: wait for the others' files, then make the checkpoint complete."""
        world = self.group.size()
        entries = reports(self.partial, world)
        while entries is None and not self._abandoned:
            self._wake.wait(_POLL)
            entries = self._agreed or reports(self.partial, world)
        if entries is None:
            return
        commit(self.partial, self.path, world, self.facts, entries)
        try:
            prune(self.run_dir, self.facts["step"], self.keep)
        except OSError as error:  # the checkpoint is there
            print(f"warning: an old checkpoint stays: {error}", file=sys.stderr, flush=True)
