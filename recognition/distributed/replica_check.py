"""Checks of debug=true: replicated tensors are compared, and trained images are recorded."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data_tools.load.loader import Batch
from recognition.distributed import collectives


def check_equal(tensors: Mapping[str, Tensor], group: ProcessGroup, step: int) -> None:
    """Compare each tensor bit by bit across the ranks. One all-gather of 8 bytes per tensor.

    Raises:
        RuntimeError: on all ranks; it names the tensors that differ, and on which ranks.
    """
    sums_here = torch.tensor([_crc32(tensor) for tensor in tensors.values()], dtype=torch.int64)
    every = collectives.gather_parts(sums_here[None], [1] * group.size(), group)  # [W, names]
    found = []
    for name, sums in zip(tensors, every.T.tolist(), strict=True):
        most = Counter(sums).most_common(1)[0][0]
        apart = [rank for rank, value in enumerate(sums) if value != most]
        if apart:
            found.append(f"{name} on rank {', '.join(map(str, apart))}")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise RuntimeError(
            f"after step {step} the ranks do not hold the same: {'; '.join(found[:5])}{more}. No "
            "step from the last good checkpoint on can be trusted"
        )


def _crc32(tensor: Tensor) -> int:
    on_host = tensor.detach().cpu().contiguous()
    return zlib.crc32(on_host.reshape(-1).view(torch.uint8).numpy().data) if on_host.numel() else 0


class SampleRecord:
    """Records which images this rank trained on, in <run>/samples/<start>-rank-<r>.jsonl.

    start: rank 0's clock when the processes started, in ns. Steps that are repeated after a resume
    appear again in the files of the later start.
    """

    def __init__(self, run_dir: str, group: ProcessGroup) -> None:
        directory = os.path.join(run_dir, "samples")
        os.makedirs(directory, exist_ok=True)
        earlier = [
            int(name.partition("-")[0]) + 1 for name in os.listdir(directory) if "-rank-" in name
        ]
        now = max(earlier, default=0), time.time_ns()  # the clock may have been set back since
        start = collectives.gather_objects(max(now), group)[0]
        path = os.path.join(directory, f"{start:020d}-rank-{group.rank()}.jsonl")
        self._file = open(path, "w", encoding="utf-8", buffering=1)

    def note(self, step: int, ids: np.ndarray) -> None:
        """Record the images of a micro-step of the step that follows `step` completed steps."""
        self._file.write(json.dumps([step + 1, ids.tolist()]) + "\n")

    def of(self, batches: Iterator[Batch], step: Callable[[], int]) -> Iterator[Batch]:
        """The same batches, each recorded as it is yielded; step() returns the completed steps."""
        for batch in batches:
            self.note(step(), batch.ids)
            yield batch

    def close(self) -> None:
        self._file.close()
