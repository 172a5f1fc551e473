"""The run directory: initial weights, its lock, config.json, and the traceback of a failed rank."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from data_tools.common import files, locks
from data_tools.common.errors import UserError
from recognition import checkpoint
from recognition.config import Config
from recognition.weights import foreign as convert

# How long lock_run_dir() may take: without flock it waits for a sign of a holder elsewhere.
OWNED_SECONDS = 2 * locks.STALE_SECONDS
_SOURCE_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def initial_weights(path: str, color_order: str | None = None) -> Mapping[str, Tensor]:
    """The backbone's initial state, from a run or checkpoint directory or from a published file.

    color_order: channel order that the file's network expects; None: the usual one of its format.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file does not hold named tensors.
    """
    if files.is_dir(path):
        return checkpoint.load_backbone(path)[0].state_dict()
    if not files.is_file(path):
        raise FileNotFoundError(f"init_from={path}: no such file or directory")
    try:
        return convert.read_weights(path, color_order)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


@contextlib.contextmanager
def lock_run_dir(output: str) -> Iterator[None]:
    """Lock the run directory while the body runs: two runs would overwrite each other's files.

    Raises:
        OSError: another process holds it; the message names its host and process id.
    """
    os.makedirs(output, exist_ok=True)
    busy = f"{output} is in use by another run"
    with locks.hold(os.path.join(output, ".lock"), busy):
        yield


def refuse_foreign_files(output: str) -> None:
    """Refuse an output directory in which the run would overwrite files that no run wrote.

    Raises:
        FileExistsError: there are such files; the message names them.
        OSError: a file cannot be read.
    """
    paths = {name: os.path.join(output, name) for name in _WRITTEN}
    starts = {name: _start_of(path) for name, path in paths.items() if files.exists(path)}
    foreign = [name for name, start in starts.items() if not _WRITTEN[name](start)]
    has_run = "config.json" in starts or checkpoint.newest(output)
    if not (foreign or has_run or checkpoint.named_damaged(output)):
        # They look like files of a run, but nothing else here belongs to one. A list of skipped
        # samples may be given to a new run, which reads it first.
        foreign = [name for name, start in starts.items() if start and name != "skipped.json"]
        foreign += ["checkpoints"] * bool(files.names(os.path.join(output, "checkpoints")))
    if foreign:
        raise FileExistsError(
            f"output={output} holds {', '.join(foreign)}, not written by a run of arcline, and a "
            "run would overwrite it: choose another output=, or move it away"
        )


def _start_of(path: str) -> bytes:
    with files.naming(path), open(path, "rb") as file:
        return file.read(1 << 20)


def _is_object(text: bytes, *keys: str) -> bool:
    """Whether `text` is a JSON object that has these keys."""
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)


def _is_metrics(start: bytes) -> bool:
    line, newline, _ = start.partition(b"\n")
    if not newline:  # the run was killed while it wrote its first record
        return b'{"step"'.startswith(line[:7])
    return _is_object(line, "step")


# The files that a run overwrites, and how to tell from their first MiB that a run wrote them. An
# empty file may be overwritten.
_WRITTEN: dict[str, Callable[[bytes], bool]] = {
    "config.json": lambda x: not x or _is_object(x, "rec", "network", "margin", "output"),
    "metrics.jsonl": _is_metrics,
    "stopped.json": lambda x: not x or _is_object(x, "step", "signal"),
    "skipped.json": lambda x: x[:1] in (b"", b"["),
}


def write_config(cfg: Config, facts: Mapping[str, Any]) -> None:
    """Write config.json: every resolved key, paths as absolute ones, and `facts` (world,
    precision, data, ...)."""
    os.makedirs(cfg.output, exist_ok=True)
    path = os.path.join(cfg.output, "config.json")
    text = json.dumps({**cfg.recorded(), **facts}, indent=1)
    if files.exists(path) and files.read_bytes(path) == text.encode():
        return  # so that a restart works on a full disk
    files.write_text(path, text)


def commit() -> str | None:
    """The git commit of the running code, with '+' appended if the working tree differs."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=_SOURCE_DIR,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def record_failure(error: BaseException, directory: str, rank: int) -> None:
    """Print the full traceback of the error and its causes on stderr, and append it to
    error-rank-<rank>.txt in `directory` unless that is "". Never fails."""
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, end="", flush=True)
    if not directory:
        return
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with (
        contextlib.suppress(OSError),
        open(os.path.join(directory, f"error-rank-{rank}.txt"), "a", encoding="utf-8") as file,
    ):
        file.write(f"{now}, process {os.getpid()}\n{text}\n")
