"""Look at the machines before a run: what would stop it later, or make it slow, in a few seconds.

    torchrun --nnodes 4 --nproc-per-node 8 ... launch/preflight.py RECIPE key=value ...

takes what launch/train.py takes, which also runs it at its start (preflight_seconds=0 leaves it
out). It looks at: rendezvous, network interface and its link, clocks, versions of torch, CUDA and
driver, GPUs, latency and bandwidth of an all-reduce, the output's file system (free, shared), the
data (readable, alike on every machine), file descriptors, shared memory. What would stop a run is
an error and exit code 1; what would slow it down, a warning.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from data_tools.commands import one_line
from data_tools.union import open_all
from launch import interfaces
from recognition import collectives, config, runtime
from recognition.backbones import make_backbone

_SKEW = 2.0  # seconds between clocks, from which logs and file times of machines mislead
_FAR_BELOW = 0.3  # of the link: less than this is another network, or a broken one
_PIECES, _PIECE = 24, 64 << 10  # of the data, bytes, compared between the machines
_LEAST_SHM = 64 << 20  # bytes per process; what Docker gives to all of them by default


@dataclass
class Findings:
    """What one look found: lines to read, numbers for --json, and what is wrong."""

    said: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def check(cfg: config.Config, place: runtime.Runtime, seconds: float) -> Findings:
    """Look at everything, on every rank at once; the same findings on all.

    seconds: about what it may take; the bandwidth is measured for a twentieth of it.
    """
    found = Findings()
    everybody = collectives.gather_objects(_machine(cfg), place.group)
    leaders = {facts["host"]: facts for facts in reversed(everybody)}
    hosts = list(reversed(leaders))  # in rank order
    found.numbers |= {"world": place.world, "machines": len(hosts)}
    found.said.append(f"{place.world} processes on {len(hosts)} machines have met")
    for host in hosts:
        found.said.append(f"{host}: {_in_words(leaders[host])}")
        found.warnings += [f"{host}: {words}" for words in leaders[host]["warnings"]]
        found.errors += [f"{host}: {words}" for words in leaders[host]["errors"]]
    for what in ("torch", "cuda", "driver", "code", "gpus"):
        values = {host: leaders[host][what] for host in hosts}
        if len(set(map(str, values.values()))) > 1:
            found.warnings.append(f"the machines differ in {what}: {values}")
    data = {host: leaders[host]["data"] for host in hosts}
    apart = [host for host in hosts if data[host] != data[hosts[0]]]
    if apart:
        found.errors.append(
            f"the data is not the same everywhere: {', '.join(apart)} against {hosts[0]}. "
            f"{data[apart[0]]} against {data[hosts[0]]}"
        )
    _clocks(found, place, everybody)
    _shared_output(found, cfg, place)
    _network(found, place, seconds / 20, len(hosts), leaders)
    return found


# --- One machine ----------------------------------------------------------------------------------


def _machine(cfg: config.Config) -> dict[str, Any]:
    facts: dict[str, Any] = {"host": socket.gethostname(), "warnings": [], "errors": []}
    facts["host"] += f"/{os.environ['GROUP_RANK']}" if "GROUP_RANK" in os.environ else ""
    facts |= _versions()
    facts["interface"] = interfaces.towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    several = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")
    if several and facts["interface"].name == "lo":
        facts["warnings"].append(
            "the other machines are reached by the loopback interface: all ranks are on one host"
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
        "torch": torch.__version__, "cuda": torch.version.cuda if gpus else None, "driver": driver,
        "gpus": gpus, "python": platform.python_version(), "code": _code(),
    }  # fmt: skip


def _code() -> str:
    """A hash of the sources that run here."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    digest = hashlib.sha256()
    for package in ("recognition", "data_tools", "eval", "launch"):
        for directory, names, files in sorted(os.walk(os.path.join(root, package))):
            names.sort()
            for name in sorted(name for name in files if name.endswith(".py")):
                with open(os.path.join(directory, name), "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()[:12]


def _limits(facts: dict[str, Any], processes: int) -> dict[str, Any]:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < min(hard, 4096):
        facts["warnings"].append(f"{files} file descriptors: ulimit -n {min(hard, 65536)} first")
    memory = None
    if os.path.isdir("/dev/shm"):
        memory = shutil.disk_usage("/dev/shm").free
        if memory < _LEAST_SHM * processes:
            facts["warnings"].append(
                f"{memory >> 20} MiB of shared memory for {processes} processes, nccl wants "
                f"{_LEAST_SHM * processes >> 20}: docker run --shm-size 8g, or --ipc host"
            )
    return {"files": files, "shared_memory": memory}


def _disk(cfg: config.Config, facts: dict[str, Any]) -> dict[str, Any]:
    free = shutil.disk_usage(_existing(cfg.output)).free
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
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), torch.device("meta"):
        network = make_backbone(cfg.network, cfg.embedding_size, cfg.network_args)
        classes = sum(data.num_classes for data in map(open_all, cfg.recs))
        numbers = sum(p.numel() for p in network.parameters())
        numbers += classes * cfg.num_subcenters * cfg.embedding_size
        states = 3 if cfg.optimizer == "adamw" else 2
        return numbers * states * (8 if cfg.precision == "fp64" else 4)
    return 0  # build() says what is wrong with it


def _existing(path: str) -> str:
    """The nearest directory above a path that is there."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
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


def _in_words(facts: dict[str, Any]) -> str:
    gpus = facts["gpus"]
    device = f"{len(gpus)} x {gpus[0]}, driver {facts['driver']}" if gpus else "no GPU"
    return (
        f"{device}; torch {facts['torch']}; {facts['interface']}; "
        f"{facts['free'] / 1e9:.0f} GB free for the output; data {facts['data']}; "
        f"{facts['files']} file descriptors"
    )


# --- Between machines -----------------------------------------------------------------------------


def _clocks(found: Findings, place: runtime.Runtime, everybody: list[dict[str, Any]]) -> None:
    """The spread of the clocks, read right after the same all-reduce; the least of five."""
    spreads = []
    for _ in range(5):
        collectives.sum_over_ranks(torch.zeros(1), place.group)
        times = collectives.gather_objects(time.time(), place.group)
        spreads.append((max(times) - min(times), times))
    spread, times = min(spreads)
    found.numbers["clock_spread_seconds"] = spread
    found.said.append(f"clocks within {spread:.3f} s")
    if spread > _SKEW:
        middle = statistics.median(times)
        rank = max(range(place.world), key=lambda r: abs(times[r] - middle))
        found.warnings.append(
            f"the clock of {everybody[rank]['host']} is {times[rank] - middle:+.1f} s from the "
            "others': set it by NTP, or the times in logs mislead"
        )


def _shared_output(found: Findings, cfg: config.Config, place: runtime.Runtime) -> None:
    """Whether a file that rank 0 writes beside the output is there for all."""
    token = collectives.gather_objects(uuid.uuid4().hex, place.group)[0]
    path = os.path.join(_existing(cfg.output), f".arcline-preflight-{token}")
    paths = collectives.gather_objects(path, place.group)
    failure = None
    if place.rank == 0:
        try:
            with open(path, "w"):
                pass
        except OSError as error:
            failure = one_line(error)
    failure = collectives.gather_objects(failure, place.group)[0]
    seen = collectives.gather_objects(os.path.exists(path), place.group)
    if place.rank == 0:
        with contextlib.suppress(OSError):
            os.remove(path)
    if failure:
        found.errors.append(f"output cannot be written: {failure}")
    elif not all(seen) or len(set(paths)) > 1:
        lost = [there != paths[0] or not sees for there, sees in zip(paths, seen, strict=True)]
        blind = lost.index(True)
        found.errors.append(
            f"output={cfg.output} is not shared: rank {blind} does not see what rank 0 writes"
        )


def _network(
    found: Findings,
    place: runtime.Runtime,
    seconds: float,
    machines: int,
    leaders: dict[str, dict[str, Any]],
) -> None:
    """Latency of a small all-reduce, bandwidth of growing ones; against the slowest link."""
    if place.world == 1:
        return
    latency = statistics.median(_time(place, 1) for _ in range(15))
    bytes_sent, took, spent = 1 << 16, 0.0, 0.0
    while 4 * spent < seconds and bytes_sent < 1 << 28:
        bytes_sent *= 4
        took = min(_time(place, bytes_sent // 4) for _ in range(2))
        spent += 2 * took
    # A ring moves 2 (W - 1) / W of the bytes over each process' link.
    bandwidth = bytes_sent * 2 * (place.world - 1) / place.world / took  # bytes/s
    found.numbers |= {"latency_seconds": latency, "bytes_per_second": bandwidth}
    found.said.append(
        f"all-reduce: {latency * 1e6:.0f} us for one number, {bandwidth / 1e9:.2f} GB/s "
        f"({bandwidth * 8 / 1e9:.1f} Gb/s) with {bytes_sent >> 20} MiB"
    )
    links = [facts["interface"] for facts in leaders.values() if facts["interface"].megabits]
    if machines > 1 and links:
        slowest = min(links, key=lambda link: link.megabits)
        found.warnings += far_below(bandwidth, slowest)


def far_below(bandwidth: float, link: interfaces.Interface) -> list[str]:
    """A word when an all-reduce (bytes/s) is far below the link that it should go through."""
    share = bandwidth * 8 / (link.megabits * 1e6)
    if share >= _FAR_BELOW:
        return []
    return [
        f"the all-reduce has {100 * share:.0f} % of the {link.megabits / 1000:g} Gb/s of "
        f"{link.name}: is it the right network? "
        "GLOO_SOCKET_IFNAME=, NCCL_SOCKET_IFNAME= and NCCL_IB_HCA= name it"
    ]


def _time(place: runtime.Runtime, numbers: int) -> float:
    """Seconds of an all-reduce of float32s, the same on every rank: the slowest's."""
    values = torch.ones(numbers, device=place.device)
    synchronise: Callable[[], None] = (
        torch.cuda.synchronize if place.device.type == "cuda" else lambda: None
    )
    collectives.sum_over_ranks(torch.zeros(1), place.group)  # all are here
    synchronise()
    began = time.perf_counter()
    collectives.sum_over_ranks(values, place.group)
    synchronise()
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    return collectives.largest_over_ranks(took, place.group).item()


def report(found: Findings, place: runtime.Runtime, everything: bool) -> None:
    """Rank 0 says it: all of it, or what is wrong alone."""
    if place.rank == 0:
        for line in found.said if everything else []:
            print(f"preflight: {line}", flush=True)
        for line in found.warnings:
            print(f"preflight warning: {line}", file=sys.stderr, flush=True)
    if found.errors:
        raise OSError("preflight: " + "; ".join(found.errors))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="as for launch/train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON line last, from rank 0")
    args = parser.parse_args(arguments)
    try:
        cfg = config.load(args.recipe, args.overrides)
        began = time.perf_counter()
        with runtime.start(min(cfg.collective_timeout, 60.0)) as place:
            found = check(cfg, place, args.seconds)
            found.numbers["seconds"] = time.perf_counter() - began
            report(found, place, everything=True)
            if args.json and place.rank == 0:
                print(json.dumps(found.numbers | {"warnings": found.warnings}))
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"error (rank {os.environ.get('RANK', '0')}): {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
