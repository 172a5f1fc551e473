"""What preflight sees between machines: clocks, a shared output, the network."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from data_tools.common import files
from data_tools.common.errors import one_line
from launch.preflight_checks import interfaces
from launch.preflight_checks.machine import existing
from recognition import config
from recognition.distributed import collectives, runtime

_SKEW = 2.0  # seconds between clocks, from which logs and file times of machines mislead
_FAR_BELOW = 0.3  # of the link: less than this is another network, or a broken one


@dataclass
class Findings:
    """What one look found: lines to read, numbers for --json, and what is wrong."""

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def clocks(found: Findings, place: runtime.Runtime, everybody: list[dict[str, Any]]) -> None:
    """The spread of the clocks, read right after the same all-reduce; the least of five."""
    spreads = []
    for _ in range(5):
        collectives.sum_over_ranks(torch.zeros(1), place.group)
        times = collectives.gather_objects(time.time(), place.group)
        spreads.append((max(times) - min(times), times))
    spread, times = min(spreads)
    found.numbers["clock_spread_seconds"] = spread
    found.lines.append(f"clocks within {spread:.3f} s")
    if spread > _SKEW:
        middle = statistics.median(times)
        rank = max(range(place.world), key=lambda r: abs(times[r] - middle))
        found.warnings.append(
            f"the clock of {everybody[rank]['host']} is {times[rank] - middle:+.1f} s from the "
            "others': set it by NTP, or the times in logs mislead"
        )


def shared_output(found: Findings, cfg: config.Config, place: runtime.Runtime) -> None:
    """Whether a file that rank 0 writes beside the output is there for all."""
    token = collectives.gather_objects(uuid.uuid4().hex, place.group)[0]
    path = os.path.join(existing(cfg.output), f".arcline-preflight-{token}")
    paths = collectives.gather_objects(path, place.group)
    failure = None
    if place.rank == 0:
        try:
            with open(path, "w"):
                pass
        except OSError as error:
            failure = one_line(error)
    failure = collectives.gather_objects(failure, place.group)[0]
    seen = collectives.gather_objects(files.exists(path), place.group)
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


def network(
    found: Findings,
    place: runtime.Runtime,
    seconds: float,
    machines: int,
    leaders: dict[str, dict[str, Any]],
) -> None:
    """Latency of a small all-reduce, bandwidth of growing ones; against the slowest link."""
    if place.world == 1:
        return
    latency = statistics.median(_seconds_of(place, 1) for _ in range(15))
    bytes_sent, took, spent = 1 << 16, 0.0, 0.0
    while 4 * spent < seconds and bytes_sent < 1 << 28:
        bytes_sent *= 4
        took = min(_seconds_of(place, bytes_sent // 4) for _ in range(2))
        spent += 2 * took
    # A ring moves 2 (W - 1) / W of the bytes over each process' link.
    bandwidth = bytes_sent * 2 * (place.world - 1) / place.world / took  # bytes/s
    found.numbers |= {"latency_seconds": latency, "bytes_per_second": bandwidth}
    found.lines.append(
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


def _seconds_of(place: runtime.Runtime, numbers: int) -> float:
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
