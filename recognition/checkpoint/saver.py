"""Saving while the training continues: it waits for a copy of the state, threads write the files.

The threads call no collective. Rank 0's thread learns from small files in the directory that the
other ranks have written theirs. The ranks agree on the outcome in the training thread, before the
next save and at the end.
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

from recognition.checkpoint.directory import directory_of
from recognition.checkpoint.manifest import PENDING, amend, read_manifest
from recognition.checkpoint.parts import Parts
from recognition.checkpoint.writing import (
    Entries,
    Keep,
    complete_save,
    discard,
    prepare,
    prune,
    reports,
    write_files,
)
from recognition.distributed.store_exchange import gather_through_store, run_on_all_ranks

_COPYING_THREADS = 2
_COPIED_ELEMENTS = 16 << 20  # that a thread copies at a time
_POLL_SECONDS = 0.1  # between two looks for the reports of the other ranks
_LEAVE_SECONDS = 60.0  # that a failing run waits for its save in flight

Report = Callable[[int, str], None]  # (step of the checkpoint, why it could not be written)


class Saver:
    """Writes a run's checkpoints. Every rank of the heads' group has one and calls it alike.

    At most one save is in flight: the next one, and finish(), wait for it. A save that fails
    leaves no files, and the older checkpoints stay. The rank that failed reports it at once on
    stderr, and every rank passes it to `report` once all know. If the context ends by an exception,
    it waits for the save in flight for up to a minute, without contacting ranks that may be gone.

    An existing checkpoint is neither written again nor overwritten.

    loaded: the step that the run resumed from, if it did.
    background: write while the training continues, which takes a copy of this rank's state in host
    memory. Otherwise save() returns when the checkpoint is written.
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
        # Checkpoints whose state this run has: the one it resumed from, and those it wrote.
        self._known = set[str]() if loaded is None else {directory_of(run_dir, loaded)}
        self._in_flight: _Save | None = None
        self._failure: str | None = None  # of the last save that ended
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(self, parts: Parts, facts: Mapping[str, Any]) -> None:
        """Begin to write checkpoints/step-<facts["step"]>. facts: JSON for the manifest."""
        self.finish()
        step, is_first = facts["step"], self.group.rank() == 0
        path = directory_of(self.run_dir, step)

        def begin() -> bool:
            return is_first and prepare(path, self._known)

        try:
            is_new = run_on_all_ranks(self.group, "prepare the checkpoint", begin)[0]
        except OSError as error:
            self._end(step, str(error))
            return
        if not is_new:
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
        """Wait for the save in flight. Returns why the last save failed, None if it did not."""
        saving, self._in_flight = self._in_flight, None
        if saving is not None:
            self._end(saving.facts["step"], saving.finish())
        return self._failure

    def note_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a verification's results to the existing checkpoint of `step`.

        If that fails, the checkpoint stays marked as not verified, and stderr gets a warning.
        """
        if self.group.rank() != 0 or not metrics:
            return
        path = directory_of(self.run_dir, step)
        try:
            known = read_manifest(path).get("metrics", {})
            amend(path, {"metrics": known | metrics, PENDING: None})
        except (OSError, ValueError) as error:
            _warn(f"{path} lacks its verification: {error}")

    def save_now(self, parts: Parts, facts: Mapping[str, Any], waits: Sequence[float] = ()) -> str:
        """Write a checkpoint that the run must not end without; returns its path.

        waits: seconds before each retry.

        Raises:
            OSError: the last attempt failed too.
        """
        for seconds in (0.0, *waits):
            time.sleep(seconds)
            self.save(parts, facts)
            if self.finish() is None:
                return directory_of(self.run_dir, facts["step"])
        raise OSError(self._failure)

    def _end(self, step: int, failure: str | None) -> None:
        self._failure = failure
        if failure is not None:
            self.report(step, failure)

    def _copied(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
        """Copies of the tensors in host memory, which is reused by the next save: new pages are
        slow."""
        copies: dict[str, Mapping[str, Tensor]] = {}
        kept: dict[tuple[str, str], Tensor] = {}
        pieces: list[tuple[Tensor, Tensor]] = []
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                copy = self._copies.get((file, name))
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    pinned = tensor.device.type == "cuda"
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                kept[file, name] = copy
                if tensor.device.type == "cpu" and tensor.is_contiguous():
                    both = (x.view(-1).split(_COPIED_ELEMENTS) for x in (copy, tensor.detach()))
                    pieces += zip(*both, strict=True)
                else:
                    copy.copy_(tensor.detach(), non_blocking=True)
            copies[file] = {name: kept[file, name] for name in tensors}
        with ThreadPoolExecutor(_COPYING_THREADS) as pool:  # one core does not fill the memory bus
            list(pool.map(lambda piece: piece[0].copy_(piece[1]), pieces))
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
            self._in_flight.leave()


class _Save:
    """A save in flight on this rank: its thread and its outcome."""

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
        self._all_entries: Entries | None = None  # of all ranks, set by the training thread
        self._abandoned = False
        self._wake = threading.Event()  # one of the two above has changed
        self._thread = threading.Thread(target=self._work, args=(files,), daemon=True)
        self._thread.start()

    def finish(self) -> str | None:
        """Wait for all ranks. Returns why the save failed, the same on all; None if it did not."""

        def outcome() -> tuple[Entries, str | None]:
            self._written.wait()
            return self._entries, self._failure

        outcomes = gather_through_store(outcome, self.group)
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            self._abandon()
            return "cannot write the checkpoint: " + "; ".join(failures)
        self._all_entries = {n: entry for entries, _ in outcomes for n, entry in entries.items()}
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

    def leave(self) -> None:
        """Wait for the save without contacting the other ranks, then abandon it."""
        self._thread.join(_LEAVE_SECONDS)
        self._abandon()

    def _abandon(self) -> None:
        self._abandoned = True
        self._wake.set()
        self._thread.join(_LEAVE_SECONDS)

    def _work(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        rank = self.group.rank()
        try:
            self._entries = write_files(self.partial, rank, files)
            self._written.set()
            if rank == 0:
                self._complete()
        except Exception as error:
            self._failure = f"rank {rank}: {error or repr(error)}"
            _warn(f"{self.path}: {self._failure}")
            if not self._written.is_set():
                for name in files:  # make room on a full disk
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self.partial, name))
        finally:
            self._written.set()
            if rank == 0 and (self._abandoned or self._failure):
                with contextlib.suppress(OSError):
                    discard(self.partial)

    def _complete(self) -> None:
        """On rank 0: wait for the files of the other ranks, then complete the checkpoint."""
        world = self.group.size()
        entries = reports(self.partial, world)
        while entries is None and not self._abandoned:
            self._wake.wait(_POLL_SECONDS)
            entries = self._all_entries or reports(self.partial, world)
        if entries is None:
            return
        complete_save(self.partial, world, self.facts, entries)
        try:
            prune(self.run_dir, self.facts["step"], self.keep)
        except OSError as error:  # the new checkpoint is complete
            _warn(f"an old checkpoint was not removed: {error}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
