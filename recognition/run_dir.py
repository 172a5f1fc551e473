"""A run directory around training: what to start from, who writes there, what was asked."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from data_tools.common.errors import UserError
from recognition import checkpoint, convert
from recognition.config import Config

_SOURCE_DIR = os.path.dirname(os.path.abspath(__file__))


def initial_weights(path: str, color_order: str | None = None) -> Mapping[str, Tensor]:
    """The backbone's state to start from: a run or checkpoint directory, or a published file.

    color_order: of a file's training images, where it is not the one that its kind has.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file holds something else than tensors by name.
    """
    if os.path.isdir(path):
        return checkpoint.load_backbone(path)[0].state_dict()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"init_from={path}: no such file or directory")
    try:
        return convert.read_weights(path, color_order)
    except ValueError as error:
        raise UserError(f"init_from: {error}") from error


@contextlib.contextmanager
def owned(output: str) -> Iterator[None]:
    """Hold the run directory: two runs at once would overwrite one another's files.

    Raises:
        OSError: another process holds it.
    """
    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{output} is in use by another run: wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks: Lustre, some NFS
        yield


def write_config(cfg: Config, facts: Mapping[str, Any]) -> None:
    """config.json of the run: every key as resolved, and `facts` (world, precision, data...)."""
    os.makedirs(cfg.output, exist_ok=True)
    path = os.path.join(cfg.output, "config.json")
    text = json.dumps({**dataclasses.asdict(cfg), **facts}, indent=1)
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if file.read() == text:  # a restart needs no room on a full disk
            return
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def commit() -> str | None:
    """The git commit of the code that runs, with '+' after it where files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=_SOURCE_DIR, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
