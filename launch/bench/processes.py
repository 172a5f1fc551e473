"""A function on every rank of a fresh process group on this machine, for figures of one run."""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  before there is a group: runtime.py says why
import torch.multiprocessing as mp
from torch.distributed import ProcessGroup

from recognition.distributed import collectives


def run_on_ranks(world: int, device: str, function: Callable, *arguments: Any) -> Any:
    """What function(rank, device, *arguments) gives on rank 0; it must be importable by name.

    device: "cpu" (gloo, one thread a process) or "cuda" (nccl beside gloo, a GPU a process).

    Raises:
        OSError: a process failed; with its traceback.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        queue = context.SimpleQueue()
        store = os.path.join(directory, "store")
        processes = [
            context.Process(
                target=_work, args=(queue, store, rank, world, device, function, arguments)
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            while queue.empty():
                if any(process.exitcode for process in processes):
                    raise OSError(f"{function.__name__}: a process was killed")
                time.sleep(0.05)
            failed, answer = queue.get()
            if failed:
                raise OSError(answer)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
    return answer


def slowest(seconds: float, group: ProcessGroup) -> float:
    """The largest over the ranks, once all have come here."""
    duration = torch.tensor([seconds], dtype=torch.float64)  # in host memory: gloo, beside the GPU
    return float(collectives.largest_over_ranks(duration, group))


def _work(
    queue: Any, store: str, rank: int, world: int, name: str, function: Callable, arguments: tuple
) -> None:
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
        answer = function(rank, device, *arguments)
        slowest(0.0, collectives.world_group())
        if rank == 0:
            queue.put((False, answer))
        dist.destroy_process_group()
        gc.collect()  # as in runtime.py: no thread of the group may outlive the interpreter
    except BaseException:
        queue.put((True, traceback.format_exc()))
