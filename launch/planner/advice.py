"""What would make a run fit that does not: for launch/plan.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from recognition.config import Config

_PAIRS = 4  # pairs of keys to suggest at most


def advice(
    cfg: Config, gpus: int, memory: float, total: Callable[[Config, int], float]
) -> list[str]:
    """What would make the run fit into `memory` bytes: each key that does it alone, else pairs of
    them, and the number of GPUs; [] if it fits. total: bytes of a GPU for a recipe on so many."""
    if total(cfg, gpus) <= memory:
        return []

    def fits(keys: dict[str, Any]) -> bool:
        return total(dataclasses.replace(cfg, **keys), gpus) <= memory

    of_head, of_network = _of_head(cfg), _of_network(cfg, gpus)
    tried = [*of_head, *of_network]
    fitting = [_typed(keys) for keys in tried if fits(keys)]
    if not fitting:
        fitting = [
            _typed(one | other)
            for one, other in itertools.product(of_head, of_network)
            if not ("update_in_backward" in one and "accumulation" in other) and fits(one | other)
        ][:_PAIRS]
    more = (gpus * 2**k for k in range(1, 8))
    enough = next((many for many in more if total(cfg, many) <= memory), None)
    fitting += [] if enough is None else [f"--gpus {enough}"]
    return fitting or ["nothing of these alone: a smaller network or batch, and more GPUs"]


def _of_head(cfg: Config) -> list[dict[str, Any]]:
    """Keys that make the head smaller."""
    keys: list[dict[str, Any]] = []
    if not cfg.update_in_backward and cfg.accumulation == 1 and cfg.precision != "fp16":
        keys.append({"update_in_backward": True})
    keys += [{"sample_rate": rate} for rate in (0.3, 0.1) if rate < cfg.sample_rate]
    return keys + [{"head_storage": "host"}] * (cfg.head_storage == "device")


def _of_network(cfg: Config, gpus: int) -> list[dict[str, Any]]:
    """Keys that make the network's activations smaller, of the same global batch."""
    keys: list[dict[str, Any]] = []
    if cfg.network.startswith("vit") and not cfg.network_args.get("checkpointing"):
        keys.append({"network_args": {**cfg.network_args, "checkpointing": True}})
    if cfg.update_in_backward:  # which cannot be with accumulation
        return keys
    for factor in (2, 4, 8):
        less: dict[str, Any] = {"accumulation": factor * cfg.accumulation}
        rows, rest = divmod(cfg.global_batch(gpus), gpus * less["accumulation"])
        if cfg.global_batch_size is None:
            less["batch_size"] = rows
        if rows and not rest:
            keys.append(less)
    return keys


def _typed(keys: Mapping[str, Any]) -> str:
    """As a person types them."""
    written = []
    for key, value in keys.items():
        entries = {f"{key}.{k}": v for k, v in value.items()} if key == "network_args" else {}
        for name, one in (entries or {key: value}).items():
            written.append(f"{name}={str(one).lower() if isinstance(one, bool) else one}")
    return " ".join(written)
