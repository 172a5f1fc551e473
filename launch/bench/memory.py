"""The most memory that a process held: the resident set on a CPU, what torch reserved on a GPU."""

from __future__ import annotations

import ctypes
import gc

import torch


def reset_peak(device: torch.device) -> int:
    """Bytes held now; the high-water mark begins anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    ctypes.CDLL(None).malloc_trim(0)  # or what is freed but kept would serve the next unseen
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def read_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
