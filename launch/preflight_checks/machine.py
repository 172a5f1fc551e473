"""What preflight sees of one machine: versions, limits, disk, data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
from typing import Any

import torch

from data_tools.common import files
from data_tools.common.errors import one_line
from data_tools.union import open_all
from launch.preflight_checks import interfaces
from recognition import config
from recognition.backbones import make_backbone, shapes_alone
from recognition.distributed import runtime

_PIECES, _PIECE = 24, 64 << 10  # of the data, bytes, compared between the machines
_LEAST_SHM = 64 << 20  # bytes per process; what Docker gives to all of them by default


def local_facts(cfg: config.Config) -> dict[str, Any]:
    """What this process sees: versions, interface, limits, disk, data; and what is wrong."""
    facts: dict[str, Any] = {"host": socket.gethostname(), "warnings": [], "errors": []}
    facts["host"] += f"/{os.environ['GROUP_RANK']}" if "GROUP_RANK" in os.environ else ""
    facts |= _versions()
    facts["interface"] = interfaces.towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    several = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")
    if several and facts["interface"].name == "lo":
        facts["warnings"].append(
            "the other machines are reached by the loopback interface: all ranks are on one host"
        )
    if several and runtime.shares_store() and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        facts["warnings"].append(
            "restarts may fail: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )
    facts |= _limits(facts, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        facts["data"], shards = _data(cfg)
    except (OSError, ValueError) as error:
        facts["data"], shards = None, 0
        facts["errors"].append(one_line(error))
    if shards and facts["files"] < 2 * shards + 256:
        facts["warnings"].append(
            f"{facts['files']} file descriptors for {shards} shards: ulimit -n {2 * shards + 1024}"
        )
    facts |= _disk(cfg, facts)
    return facts


def _versions() -> dict[str, Any]:
    driver = None
    with contextlib.suppress(OSError), open("/sys/module/nvidia/version") as file:
        driver = file.read().strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpus else None,
        "driver": driver,
        "gpus": gpus,
        "python": platform.python_version(),
        "code": _code(),
    }


def _code() -> str:
    """A hash of the sources that run here."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    digest = hashlib.sha256()
    for package in ("recognition", "data_tools", "eval", "launch"):
        for directory, names, found in sorted(os.walk(os.path.join(root, package))):
            names.sort()
            for name in sorted(name for name in found if name.endswith(".py")):
                with open(os.path.join(directory, name), "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()[:12]


def _limits(facts: dict[str, Any], processes: int) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(hard, 4096):
        facts["warnings"].append(f"{soft} file descriptors: ulimit -n {min(hard, 65536)} first")
    memory = None
    if files.is_dir("/dev/shm"):
        memory = shutil.disk_usage("/dev/shm").free
        if memory < _LEAST_SHM * processes:
            facts["warnings"].append(
                f"{memory >> 20} MiB of shared memory for {processes} processes, nccl wants "
                f"{_LEAST_SHM * processes >> 20}: docker run --shm-size 8g, or --ipc host"
            )
    return {"files": soft, "shared_memory": memory}


def _disk(cfg: config.Config, facts: dict[str, Any]) -> dict[str, Any]:
    free = shutil.disk_usage(existing(cfg.output)).free
    needed = _checkpoint_bytes(cfg)
    most = needed * (cfg.keep_checkpoints + 1)  # one more while it is written
    if needed > free:
        facts["errors"].append(
            f"{cfg.output} has {free / 1e9:.1f} GB free and one checkpoint takes about "
            f"{needed / 1e9:.1f} GB"
        )
    elif most > free:
        facts["warnings"].append(
            f"{cfg.output} has {free / 1e9:.1f} GB free, keep_checkpoints={cfg.keep_checkpoints} "
            f"takes about {most / 1e9:.1f} GB"
        )
    return {"free": free}


def _checkpoint_bytes(cfg: config.Config) -> int:
    """About what a checkpoint takes: parameters, class rows, and one or two states of each."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), shapes_alone():
        network = make_backbone(cfg.network, cfg.embedding_size, cfg.network_args)
        classes = sum(data.num_classes for data in map(open_all, cfg.recs))
        numbers = sum(p.numel() for p in network.parameters())
        numbers += classes * cfg.num_subcenters * cfg.embedding_size
        states = 3 if cfg.optimizer == "adamw" else 2
        return numbers * states * (8 if cfg.precision == "fp64" else 4)
    return 0  # build() says what is wrong with it


def existing(path: str) -> str:
    """The nearest directory above a path that is there."""
    path = os.path.abspath(path)
    while not files.is_dir(path):
        path = os.path.dirname(path)
    return path


def _data(cfg: config.Config) -> tuple[str, int]:
    """In words, with a hash of sizes and of pieces all over the files; and how many files."""
    digest, count, total = hashlib.sha256(), 0, 0
    for rec in cfg.recs:
        open_all(rec)  # says what is wrong with it
        names = sorted(name for name in os.listdir(rec) if name.endswith((".rec", ".idx", ".json")))
        sizes = [os.path.getsize(os.path.join(rec, name)) for name in names]
        digest.update(json.dumps([names, sizes]).encode())
        count, total = count + len(names), total + sum(sizes)
        for i in range(min(_PIECES, len(names))):
            at = i * len(names) // min(_PIECES, len(names))
            name, size = names[at], sizes[at]
            with open(os.path.join(rec, name), "rb") as file:
                for place in (0, size // 2, max(size - _PIECE, 0)):
                    file.seek(place)
                    digest.update(file.read(_PIECE))
    return f"{count} files, {total} bytes, {digest.hexdigest()[:16]}", count


def in_words(facts: dict[str, Any]) -> str:
    gpus = facts["gpus"]
    device = f"{len(gpus)} x {gpus[0]}, driver {facts['driver']}" if gpus else "no GPU"
    return (
        f"{device}; torch {facts['torch']}; {facts['interface']}; "
        f"{facts['free'] / 1e9:.0f} GB free for the output; data {facts['data']}; "
        f"{facts['files']} file descriptors"
    )
