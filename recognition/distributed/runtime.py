"""One process of a run: its device, its rank, and how it finds the other processes."""

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

# Its functions take the default group at import time as a default argument, and torch imports it
# late (for torch.compile, for example): that group would never be freed. Now there is none yet.
import torch.distributed.nn  # noqa: F401
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError

_LAUNCHER_WORDS = 8  # words of its command line: the interpreter's options precede the module


class Runtime(NamedTuple):
    device: torch.device
    group: ProcessGroup
    rank: int
    world: int


@contextlib.contextmanager
def start(timeout_seconds: float = 600.0) -> Iterator[Runtime]:
    """Join torchrun's process group, or create one of this process alone without torchrun.

    gloo carries tensors in host memory, nccl tensors on a GPU. If the body fails, the group is not
    destroyed: that would make this rank wait for the others.

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
    # The group joins its threads when its last reference goes, which may be part of a cycle. A
    # thread that still holds a tensor while the interpreter ends would abort the process.
    atexit.register(gc.collect)
    yield Runtime(device, dist.distributed_c10d._get_default_group(), rank, world)
    dist.destroy_process_group()


def store() -> dist.Store:
    """A separate connection to the rendezvous store of this run."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def _attempts_store(timeout: timedelta) -> dist.Store | None:
    """A store for this attempt (restart) of torchrun alone, as a prefix of the shared one; None if
    the store is not shared, or on several machines.

    Unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, torchrun (2.13) keeps one store for all attempts,
    in which gloo would find the addresses of the previous attempt. torchrun reads the variable
    before it starts this process. On several machines it also keeps the first rendezvous' address
    after another machine has become the first, and each machine counts attempts separately: only
    the variable helps there, and preflight asks for it.
    """
    if not shares_store() or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", shared)


def shares_store() -> bool:
    """Whether all attempts of the torchrun that started this process share one store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def torchrun() -> int | None:
    """The process id of the torchrun that is an ancestor of this process; None if there is none.

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
    modules = ("torch.distributed.run", "torch.distributed.launch", "launch.arcline")
    return (
        os.path.basename(word) in ("torchrun", "arcline")
        or word in modules
        or (word.endswith(tuple(f"{module.replace('.', '/')}.py" for module in modules)))
    )


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies; nothing else would end it."""
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
    elif os.getppid() != parent:  # the launcher died before the call
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
