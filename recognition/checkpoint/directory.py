"""The directory of a run's checkpoints: which are complete, and what their manifests say."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

FORMAT = 2
_DIRECTORY = "checkpoints"
_ROWS = r"(?:head(\d+)-)?rows-(\d+)-(\d+)\.safetensors"
_NAMES = re.compile(
    rf"{_ROWS}|(head\d+-)?margin\.safetensors|(model|optimizer|encoder)\.safetensors"
)


class RowFile(NamedTuple):
    """A file of class rows, of the classes [start, stop)."""

    name: str
    start: int
    stop: int


def directory_of(run_dir: str, step: int) -> str:
    """Where a run keeps its checkpoint of a step."""
    return os.path.join(run_dir, _DIRECTORY, f"step-{step}")


def complete(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    root = os.path.join(run_dir, _DIRECTORY)
    names = os.listdir(root) if os.path.isdir(root) else []
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
    return sorted(
        s for s in steps if os.path.isfile(os.path.join(directory_of(run_dir, s), "manifest.json"))
    )


def newest(run_dir: str) -> str | None:
    """The newest complete checkpoint of a run directory, None where there is none."""
    steps = complete(run_dir)
    return directory_of(run_dir, steps[-1]) if steps else None


def read_manifest(path: str) -> dict[str, Any]:
    """The facts of a checkpoint directory.

    Raises:
        FileNotFoundError: not a complete checkpoint.
        OSError: the manifest is damaged.
        ValueError: written by a newer version.
    """
    name = os.path.join(path, "manifest.json")
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no manifest.json")
    try:
        with open(name, encoding="utf-8") as file:
            manifest = json.load(file)
        own = manifest.pop("sha256")
        version = manifest["format"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise OSError(f"{name} is damaged{older(path)}") from error
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}")
    if own != digest(manifest):
        raise OSError(f"{name} is damaged: its sha256 is not its own{older(path)}")
    return manifest if version == FORMAT else _from_format_1(manifest)


def row_files(manifest: Mapping[str, Any], head: int = 0) -> list[RowFile]:
    """The files with the class rows of a head, in the order of their classes."""
    several = len(manifest["heads"]) > 1
    files = []
    for name in manifest["files"]:
        found = re.fullmatch(_ROWS, name)
        if found and found[1] == (str(head) if several else None):
            files.append(RowFile(name, int(found[2]), int(found[3])))
    return sorted(files, key=lambda file: file.start)


def digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 that a manifest carries of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def older(path: str) -> str:
    """How to go on from the checkpoint before a damaged one, where there is one."""
    root, name = os.path.split(os.path.abspath(path))
    earlier = [s for s in complete(os.path.dirname(root)) if f"step-{s}" != name]
    if not earlier:
        return ""
    return f"; remove {path} to continue from {os.path.join(root, f'step-{earlier[-1]}')}"


def _from_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """The facts of the one head stood among the others; the first had no state of the loss."""
    keys = ("num_classes", "embedding_size", "num_subcenters", "row_state")
    head = {key: manifest[key] for key in keys if key in manifest}
    head |= {"step": manifest.get("head_step"), "margin_state": manifest.get("margin_state", [])}
    return manifest | {"heads": [head | {"margin": manifest.get("margin")}]}
