"""The tables of docs/head.md: what a GPU holds and sends at 1 to 1024 GPUs, from the planner."""

from __future__ import annotations

from launch.planner.predict import Prediction, plan
from recognition import config

_WORLDS = (1, 8, 64, 1024)
_CLASSES = {1_000_000: 1.0, 10_000_000: 0.1, 29_000_000: 0.1, 100_000_000: 0.1}  # sample rate
_GB = 1e9
_BANDWIDTH = 25.0  # GB/s of a GPU


def memory() -> str:
    """GB of the head / GB in all / ms on the wire, of a GPU, by classes and GPUs."""
    rows = [["classes", *(f"{w} GPU" if w == 1 else str(w) for w in _WORLDS)]]
    for num_classes, rate in _CLASSES.items():
        cells = [_cell(_plan(num_classes, rate, world)) for world in _WORLDS]
        rows.append([f"{num_classes / 1e6:g} M", *cells])
    return _table(rows)


def wire() -> str:
    """MB that a GPU sends in a step, by collective and GPUs, for 10 M classes."""
    plans = [_plan(10_000_000, 0.1, world) for world in _WORLDS]
    rows = [["collective", *(f"{w} GPU" if w == 1 else str(w) for w in _WORLDS)]]
    for part in plans[0].wire:
        rows.append([part, *(f"{p.wire[part] / 1e6:.3f}" for p in plans)])
    return _table(rows)


def _plan(num_classes: int, rate: float, world: int) -> Prediction:
    keys = {"rec": "-", "network": "r100", "precision": "bf16", "batch_size": 128}
    return plan(config.make(keys | {"sample_rate": rate}), num_classes, world)


def _cell(found: Prediction) -> str:
    head = sum(size for part, size in found.gpu.items() if not part.startswith("backbone"))
    milliseconds = 1e3 * sum(found.wire.values()) / _BANDWIDTH / _GB
    return f"{_short(head / _GB)} / {_short(found.total / _GB)} / {milliseconds:.0f}"


def _short(gigabytes: float) -> str:
    return f"{gigabytes:.1f}" if gigabytes < 20 else f"{gigabytes:.0f}"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
