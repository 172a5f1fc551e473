"""One process of a run: its device, its place among the others, and how they reach each other."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

# Its functions have the group that exists when it is imported as a default, and torch imports it
# late (for torch.compile, among others): that group would never end. Here there is none yet.
import torch.distributed.nn  # noqa: F401
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError

_LAUNCHER_WORDS = 8  # of its command line: the interpreter's options stand before the module


class Runtime(NamedTuple):
    device: torch.device
    group: ProcessGroup
    rank: int
    world: int


@contextlib.contextmanager
def start(timeout_seconds: float = 600.0) -> Iterator[Runtime]:
    """The process group of torchrun, or of this process alone where torchrun did not start it.

    Tensors in host memory travel by gloo, tensors on a GPU by nccl. The group is left without
    ceremony when the body fails: the other ranks must not wait for one that will not come.

    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    launched = "RANK" in os.environ
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    if launched:
        _end_with_parent()
    device = _device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    meeting = _attempts_store(timeout) if launched else dist.HashStore()
    if meeting is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, timeout=timeout, store=meeting, rank=rank, world_size=world
        )
    # The group waits for its threads when its last reference goes, which may sit in a cycle. One of
    # them that still holds a tensor while the interpreter ends aborts the process.
    atexit.register(gc.collect)
    yield Runtime(device, dist.distributed_c10d._get_default_group(), rank, world)
    dist.destroy_process_group()


def store() -> dist.Store:
    """A connection of its own to the store through which the ranks of this run met."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 pays: on Ampere and newer GPUs. The small networks that one trains on a CPU gain
    nothing (PReLU and depthwise convolutions decide there), whatever its matrix units."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _attempts_store(timeout: timedelta) -> dist.Store | None:
    """What this attempt of torchrun's has to itself of a store that outlives attempts; None where
    the environment names a store of its own, or where attempts have no number of their own.

    Unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, torchrun (2.13) keeps one store for all attempts,
    and gloo finds the addresses of the attempt before. It reads the variable before it starts us,
    and on several machines it also keeps the first meeting's address when another machine has
    become the first, and counts attempts apart: there nothing but the variable helps, and preflight
    asks for it.
    """
    if not shares_store() or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", shared)


def shares_store() -> bool:
    """Whether the attempts of the torchrun that started this process meet in one store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def torchrun() -> int | None:
    """The process id of the torchrun that this process descends from; None if there is none.

    It need not be the parent: `torchrun --no-python numactl ... python launch/train.py`.
    """
    pid = os.getpid()
    with contextlib.suppress(OSError, ValueError, StopIteration):
        while pid > 1:
            status = Path(f"/proc/{pid}/status").read_text()
            pid = int(next(x for x in status.splitlines() if x.startswith("PPid:")).split()[1])
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(_is_torchrun(word) for word in words[:_LAUNCHER_WORDS]):
                return pid
    return None


def _is_torchrun(word: str) -> bool:
    modules = ("torch.distributed.run", "torch.distributed.launch")
    return (
        os.path.basename(word) == "torchrun"
        or word in modules
        or (word.endswith(tuple(f"{module.replace('.', '/')}.py" for module in modules)))
    )


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies: nobody else would end it."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig, parent = 1, os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
        print(
            f"warning: Linux does not tie this process to its launcher "
            f"({os.strerror(ctypes.get_errno())}): if torchrun is killed, end process "
            f"{os.getpid()} yourself",
            file=sys.stderr,
            flush=True,
        )
    elif os.getppid() != parent:  # it died before Linux knew
        raise SystemExit("the launcher of this process has ended")


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, there are {count}: "
            f"start at most --nproc-per-node {count}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
