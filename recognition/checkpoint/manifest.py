"""What a manifest must say, whoever wrote it: its hash shows that it has not changed, not that it
makes sense."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from data_tools.common.errors import UserError

_ROWS = r"(?:head\d+-)?rows-\d{1,18}-\d{1,18}\.safetensors"
_OTHERS = r"(?:head\d+-)?margin\.safetensors|(?:model|optimizer|encoder)\.safetensors"
_MOST = 2**62


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x < _MOST


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _numbers(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(each, int | float) for each in x)


def _file(x: Any) -> bool:
    return isinstance(x, dict) and _fits(x, {"bytes": _whole(0), "sha256": _text}) is None


def _window(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 3 and all(map(_whole(0), x[:2])) and _text(x[2])


def _head(x: Any) -> bool:
    return isinstance(x, dict) and _fits(x, _HEAD) is None


_HEAD: dict[str, Callable[[Any], bool]] = {
    "num_classes": _whole(1),
    "embedding_size": _whole(1),
    "num_subcenters": _whole(1),
    "step": _whole(0),
    "row_state": lambda x: isinstance(x, list) and all(map(_text, x)),
    "margin_state": lambda x: isinstance(x, list) and all(map(_text, x)),
    "margin": lambda x: x is None or _text(x),
}
_ALWAYS: dict[str, Callable[[Any], bool]] = {
    "step": _whole(0),
    "world": _whole(1),
    "heads": lambda x: isinstance(x, list) and bool(x) and all(map(_head, x)),
    "files": lambda x: isinstance(x, dict) and all(map(_file, x.values())),
}
_OF_A_RUN: dict[str, Callable[[Any], bool]] = {
    "samples_seen": _whole(0),
    "global_batch": _whole(1),
    "config": lambda x: isinstance(x, dict),
    "metrics": lambda x: isinstance(x, dict),
    "skipped": lambda x: isinstance(x, list) and all(map(_window, x)),
    "spikes": lambda x: x is None or (_numbers(x) and len(x) == 3),
}


def check(manifest: Mapping[str, Any], source: str) -> None:
    """Raises: ValueError, naming the fact that is missing or makes no sense."""
    there = {name: test for name, test in _OF_A_RUN.items() if name in manifest}
    _refuse(_fits(manifest, _ALWAYS | there), manifest, source)
    for listed in manifest["files"]:
        if not re.fullmatch(f"{_ROWS}|{_OTHERS}", listed):
            raise UserError(
                f"{source}/manifest.json lists {listed!r}, which is no file of a checkpoint"
            )


def check_of_run(manifest: Mapping[str, Any], source: str) -> None:
    """As check(), and all that a run needs to go on. Raises: ValueError."""
    older = {"skipped", "spikes"} - set(manifest)  # which once were not written
    needed = {name: test for name, test in _OF_A_RUN.items() if name not in older}
    needed["config"] = lambda x: isinstance(x, dict) and _whole(1)(x.get("accumulation"))
    _refuse(_fits(manifest, needed), manifest, source)


def _fits(facts: Mapping[str, Any], tests: Mapping[str, Callable[[Any], bool]]) -> str | None:
    """The first fact that is missing or fails its test."""
    return next((n for n, fits in tests.items() if n not in facts or not fits(facts[n])), None)


def _refuse(name: str | None, manifest: Mapping[str, Any], source: str) -> None:
    if name is not None:
        said = f"{name} is {str(manifest[name])[:80]}" if name in manifest else f"{name} is missing"
        raise UserError(f"{source}/manifest.json was not written by a run of ours: {said}")
