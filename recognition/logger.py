"""What a run says: one readable line, one JSON object and TensorBoard scalars from the same
record."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from recognition.losses.margin import Histogram, Statistics


class Logger:
    """metrics.jsonl, TensorBoard events and the console of rank 0; silent on the other ranks.

    A resumed run continues the files: what they say of steps after `step`, which are about to be
    done again, is removed.
    """

    def __init__(self, run_dir: str, rank: int, step: int) -> None:
        self._file = self._writer = None
        if rank == 0:
            os.makedirs(run_dir, exist_ok=True)
            path = os.path.join(run_dir, "metrics.jsonl")
            _forget_after(path, step)
            self._file = open(path, "a", encoding="utf-8")
            self._writer = SummaryWriter(os.path.join(run_dir, "events"), purge_step=step + 1)

    def record(
        self,
        record: Mapping[str, Any],
        line: str,
        histograms: Mapping[str, Histogram] | None = None,
    ) -> None:
        """One object of metrics.jsonl, its numbers to TensorBoard, and `line` on the console.

        `step` must be there; nested objects become names with slashes in TensorBoard. Histograms
        go to TensorBoard alone, as head/<name>.
        """
        if self._file is None or self._writer is None:
            return
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()
        for name, value in _flat(record):
            if name not in ("step", "epoch"):
                self._writer.add_scalar(name, value, record["step"])
        for name, histogram in (histograms or {}).items():
            _add_histogram(self._writer, f"head/{name}", histogram, record["step"])
        self.say(line)

    def say(self, line: str) -> None:
        if self._file is not None:
            print(line, flush=True)

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None and self._writer is not None:
            self._file.close()
            self._writer.close()


def as_numbers(statistics: Statistics) -> dict[str, float]:
    """What is one number of the statistics. One host synchronisation for each."""
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
    """Drop the records after `step` (all, at 0), and a line that a killed run left unfinished."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                if 0 < step >= json.loads(line)["step"] and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    with open(path + ".new", "w", encoding="utf-8") as out:
        out.writelines(kept)
    os.replace(path + ".new", path)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for numbers that JSON does not have."""
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
