"""The log of a run: one record becomes a console line, a JSON object and TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_tools.common import files
from recognition.losses.margin import Histogram, Statistics


class Logger:
    """Writes metrics.jsonl, TensorBoard events and the console on rank 0; other ranks log nothing.

    A resumed run appends to the files after removing the records of steps after `step`, which are
    about to be repeated. If the files cannot be written (a full disk), the run warns and continues:
    metrics.jsonl receives the records once it is writable again, TensorBoard loses them.
    """

    def __init__(self, run_dir: str, rank: int, step: int) -> None:
        self._file: IO[bytes] | None = None
        self._writer: SummaryWriter | None = None
        self._events, self._purge = os.path.join(run_dir, "events"), step + 1
        self._waiting = b""  # records of metrics.jsonl that are not written yet
        self._failing = False
        if rank == 0:
            os.makedirs(run_dir, exist_ok=True)
            path = os.path.join(run_dir, "metrics.jsonl")
            _forget_after(path, step)
            self._file = open(path, "ab", buffering=0)

    def record(
        self,
        record: Mapping[str, Any],
        line: str,
        histograms: Mapping[str, Histogram] | None = None,
    ) -> None:
        """Write the record to metrics.jsonl, its numbers to TensorBoard and `line` to the console.

        The record must have a `step`; nested objects become names with slashes in TensorBoard.
        Histograms go to TensorBoard only, as head/<name>.
        """
        if self._file is None:
            return
        self._waiting += json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            self._write(self._file)
            self._show(record, histograms or {})
        except OSError as error:
            if not self._failing:
                self.say(f"warning: {os.path.dirname(self._events)}: {error}; the run goes on")
            self._failing = True
        else:
            self._failing = False
        self.say(line)

    def _write(self, file: IO[bytes]) -> None:
        while self._waiting:
            self._waiting = self._waiting[file.write(self._waiting) :]

    def _show(self, record: Mapping[str, Any], histograms: Mapping[str, Histogram]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(self._events, purge_step=self._purge)
        try:
            for name, value in _flat(record):
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(name, value, record["step"])
            for name, histogram in histograms.items():
                _add_histogram(self._writer, f"head/{name}", histogram, record["step"])
        except OSError:  # raised in the writer's thread, which has ended
            self._writer, self._purge = None, record["step"]
            raise

    def say(self, line: str) -> None:
        if self._file is not None:
            print(line, flush=True)

    def __enter__(self) -> Logger:
        if self._file is not None:
            self._excepthook = threading.excepthook
            threading.excepthook = self._quiet_writer
        return self

    def _quiet_writer(self, failed: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread: record() receives the same error
        and reports it on one line."""
        if not (
            isinstance(failed.exc_value, OSError)
            and type(failed.thread).__name__ == "_AsyncWriterThread"
        ):
            self._excepthook(failed)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            self._write(self._file)
            self._file.close()
            if self._writer is not None:
                self._writer.close()
        except OSError as lost:
            lines = self._waiting.count(b"\n")
            self.say(f"warning: {self._events}: {lost}; {lines} records of metrics.jsonl are lost")
        finally:
            threading.excepthook = self._excepthook


def as_numbers(statistics: Statistics) -> dict[str, float]:
    """The scalar statistics. One host synchronisation for each."""
    return {name: x.item() for name, x in statistics.items() if isinstance(x, Tensor)}


def histograms(statistics: Statistics) -> dict[str, Histogram]:
    return {name: x for name, x in statistics.items() if isinstance(x, Histogram)}


def _add_histogram(writer: SummaryWriter, name: str, histogram: Histogram, step: int) -> None:
    edges, counts = (part.double().cpu() for part in histogram)
    num, middles = counts.sum().item(), (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        name,
        min=edges[0].item(),
        max=edges[-1].item(),
        num=num,
        sum=(counts * middles).sum().item(),
        sum_squares=(counts * middles.square()).sum().item(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _forget_after(path: str, step: int) -> None:
    """Remove the records after `step` (all of them at step 0), and an incomplete last line that a
    killed run left. Needs no disk space."""
    if not files.exists(path):
        return
    end = size = 0
    with files.naming(path), open(path, "rb") as lines:
        for line in lines:
            size += len(line)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if 0 < step >= json.loads(line)["step"] and line.endswith(b"\n"):
                    end = size
    os.truncate(path, end)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null in place of inf and nan, which JSON lacks."""
    return {
        name: _finite(value)
        if isinstance(value, Mapping)
        else (None if isinstance(value, float) and not math.isfinite(value) else value)
        for name, value in record.items()
    }


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            pairs.append((prefix + name, float(value)))
    return pairs
