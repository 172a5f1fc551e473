"""The manifest of a checkpoint: reading, writing and checking it.

Its hash shows that it has not changed, not that it makes sense: read_manifest() checks both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_tools.common import files
from data_tools.common.errors import UserError
from recognition.checkpoint.directory import MANIFEST, Damaged, missing

FORMAT = 2
PENDING = "verification_pending"  # key: this step still has to be verified
_ROWS = r"(?:head(\d+)-)?rows-(\d{1,18})-(\d{1,18})\.safetensors"
_OTHERS = r"(?:head\d+-)?margin\.safetensors|(?:model|optimizer|encoder)\.safetensors"
# What JSON that is not a manifest raises.
_NO_MANIFEST = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


def read_manifest(path: str, of_run: bool = False) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    of_run: it must also hold everything that a run needs to resume.

    Raises:
        FileNotFoundError: not a complete checkpoint.
        Damaged: the manifest has changed.
        UserError: another version wrote it, or another program: a fact is missing or senseless.
    """
    manifest = _read_hashed(path)
    if int(manifest["format"]) != FORMAT:
        raise UserError(
            f"{path} has format {manifest['format']}, but this version reads {FORMAT}: use the "
            "version of arcline that wrote it"
        )
    _check(manifest, path, of_run)
    return manifest


def write_manifest(path: str, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json with its own hash, completely or not at all."""
    content = {**manifest, "sha256": digest(manifest)}
    files.write_text(os.path.join(path, MANIFEST), json.dumps(content, indent=1))


def amend(path: str, changes: Mapping[str, Any]) -> None:
    """Change keys of a checkpoint's manifest; None removes a key.

    The old or the new manifest exists at any moment.
    """
    changed = _read_hashed(path) | dict(changes)
    write_manifest(path, {key: value for key, value in changed.items() if value is not None})


def digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 that a manifest holds of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_hashed(path: str) -> dict[str, Any]:
    """The manifest without its own hash, which is compared."""
    name = os.path.join(path, MANIFEST)
    if missing(name):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    content = files.read_bytes(name)
    try:
        manifest = json.loads(content)
        expected = manifest.pop("sha256")
        int(manifest["format"])
    except _NO_MANIFEST as error:
        raise Damaged(f"{name} is damaged") from error
    if expected != digest(manifest):
        raise Damaged(f"{name} is damaged: its content does not match its sha256")
    return manifest


# --- The files of class rows ----------------------------------------------------------------------


class RowFile(NamedTuple):
    """A file of class rows, of the classes [start, stop)."""

    name: str
    start: int
    stop: int


def row_files(manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """The files with the class rows of a head, in the order of their classes."""
    several = len(manifest["heads"]) > 1
    rows = []
    for name in manifest["files"]:
        found = re.fullmatch(_ROWS, name)
        if found and found[1] == (str(head) if several else None):
            rows.append(RowFile(name, int(found[2]), int(found[3])))
    return sorted(rows, key=lambda file: file.start)


def all_rows(path: str, manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """As row_files(), checked.

    Raises:
        Damaged: the files do not hold every class exactly once.
    """
    rows, filled = row_files(manifest, head), 0
    for file in rows:
        if file.start != filled or file.stop <= file.start:
            raise Damaged(f"{path}: {file.name}, where the classes from {filled} on are expected")
        filled = file.stop
    if filled != manifest["heads"][head]["num_classes"]:
        raise Damaged(f"{path} lacks the classes from {filled} on")
    return rows


# --- What a manifest must hold --------------------------------------------------------------------

_Check = Callable[[Any], bool]


def _integer(least: int) -> _Check:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x < 2**62


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _list_of(check: _Check) -> _Check:
    return lambda x: isinstance(x, list) and all(map(check, x))


def _object(checks: Mapping[str, _Check]) -> _Check:
    return lambda x: isinstance(x, dict) and _first_wrong(x, checks) is None


def _window(x: Any) -> bool:  # [start, stop, why] of skipped samples
    return isinstance(x, list) and len(x) == 3 and all(map(_integer(0), x[:2])) and _text(x[2])


_FILE = _object({"bytes": _integer(0), "sha256": _text})
_HEAD = _object(
    dict.fromkeys(("num_classes", "embedding_size", "num_subcenters"), _integer(1))
    | {"step": _integer(0), "margin": _text}
    | dict.fromkeys(("row_state", "margin_state"), _list_of(_text))
)
_ALWAYS: dict[str, _Check] = {
    "step": _integer(0),
    "world": _integer(1),
    "heads": lambda x: bool(x) and _list_of(_HEAD)(x),
    "files": lambda x: isinstance(x, dict) and all(map(_FILE, x.values())),
}
_OF_A_RUN: dict[str, _Check] = {
    "samples_seen": _integer(0),
    "global_batch": _integer(1),
    "config": _object({}),
    "metrics": _object({}),
}
_SINCE: dict[str, _Check] = {  # absent from the first checkpoints of this format
    "skipped": _list_of(_window),
    "spikes": lambda x: (
        x is None or (_list_of(lambda y: isinstance(y, int | float))(x) and len(x) == 3)
    ),
}


def _check(manifest: Mapping[str, Any], source: str, of_run: bool) -> None:
    """Raises: UserError, naming the first key that is missing or senseless."""
    optional = _OF_A_RUN | _SINCE
    checks = _ALWAYS | {name: check for name, check in optional.items() if name in manifest}
    if of_run:
        checks |= _OF_A_RUN | {"config": _object({"accumulation": _integer(1)})}
    if (name := _first_wrong(manifest, checks)) is not None:
        found = f"is {str(manifest[name])[:80]}" if name in manifest else "is missing"
        raise UserError(f"{source}/{MANIFEST} was not written by arcline: {name} {found}")
    for name in manifest["files"]:
        if not re.fullmatch(f"{_ROWS}|{_OTHERS}", name):
            raise UserError(f"{source}/{MANIFEST} lists {name!r}, which no checkpoint contains")


def _first_wrong(facts: Mapping[str, Any], checks: Mapping[str, _Check]) -> str | None:
    return next((n for n, check in checks.items() if n not in facts or not check(facts[n])), None)
