"""Writing a checkpoint: complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from recognition.checkpoint import tensors
from recognition.checkpoint.directory import FORMAT, complete, digest, directory_of
from recognition.checkpoint.parts import Parts
from recognition.collectives import together


def save(run_dir: str, parts: Parts, facts: Mapping[str, Any], keep: int) -> str:
    """Write checkpoints/step-<facts["step"]> and return its path; the `keep` newest stay.

    facts: JSON for the manifest, `step` among it. Called by every rank of the heads' group.

    Raises:
        OSError: some rank could not write. No trace of the attempt stays, older checkpoints do.
    """
    group = parts.group
    path = directory_of(run_dir, facts["step"])
    partial = path + ".partial"
    together(
        group, "prepare the checkpoint", lambda: _prepare(partial) if group.rank() == 0 else None
    )
    try:
        written = together(group, "write the checkpoint", lambda: _write_parts(partial, parts))
        files = {name: entry for entries in written for name, entry in entries.items()}

        def finish() -> None:
            if group.rank() == 0:
                _finish(partial, path, files, parts, facts, keep)

        together(group, "complete the checkpoint", finish)
    except BaseException:
        if group.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _prepare(partial: str) -> None:
    root = os.path.dirname(partial)
    os.makedirs(root, exist_ok=True)
    for name in os.listdir(root):
        if name.endswith(".partial") and os.path.isdir(os.path.join(root, name)):
            shutil.rmtree(os.path.join(root, name))  # left by a killed save
    os.mkdir(partial)


def _write_parts(partial: str, parts: Parts) -> dict[str, dict[str, Any]]:
    """Write this rank's files; {name: size and hash}."""
    if not os.path.isdir(partial):
        raise OSError(f"{partial} is not there: all ranks must share the output file system")
    return {n: tensors.write(os.path.join(partial, n), held) for n, held in parts.files().items()}


def _finish(
    partial: str, path: str, files: dict, parts: Parts, facts: Mapping[str, Any], keep: int
) -> None:
    """Manifest, rename, and the end of checkpoints beyond `keep`."""
    missing = [name for name in files if not os.path.isfile(os.path.join(partial, name))]
    if missing:
        raise OSError(f"{missing[0]} is not in {partial}: all ranks must share the output")
    manifest = {
        "format": FORMAT,
        **facts,
        "heads": [part.facts() for part in parts.heads],
        "world": parts.group.size(),
        "files": files,
    }
    with open(os.path.join(partial, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    if os.path.isdir(path):  # the same step of an earlier try
        shutil.rmtree(path)
    os.rename(partial, path)
    _sync(os.path.dirname(path))
    run_dir = os.path.dirname(os.path.dirname(path))
    older = [step for step in complete(run_dir) if step <= manifest["step"]]
    for step in older[:-keep]:
        shutil.rmtree(directory_of(run_dir, step))


def _sync(directory: str) -> None:
    """Write the names in a directory through to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
