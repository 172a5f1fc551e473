"""Runs of commands under the preloaded library: recorded, or with a fault at one position."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_SOURCE = pathlib.Path(__file__).with_name("shim.c")
_SECONDS = 300.0  # after which a run counts as hung; a busy machine may need a minute


class Call(NamedTuple):
    """The n-th call of an operation on a path, n from 1; 0 where every one is meant."""

    operation: str
    path: str  # below the root
    occurrence: int


class Position(NamedTuple):
    """A call and what happens at it."""

    call: Call
    action: str  # "e": it fails, "k": SIGKILL after it, "s": it takes long
    value: int  # errno, or ms

    def text(self) -> str:
        operation, path, occurrence = self.call
        return f"{self.action}:{self.value}:{operation}:{occurrence}:{path}"

    def __str__(self) -> str:
        operation, path, occurrence = self.call
        what = {
            "e": errno.errorcode.get(self.value, ""), "k": "SIGKILL", "s": f"{self.value} ms",
        }[self.action]  # fmt: skip
        return f"{what} at {operation} {path} ({occurrence})"


class Outcome(NamedTuple):
    code: int | None  # exit code, negative for a signal, None for a hung run
    said: str  # stdout and stderr
    calls: list[Call]
    reached: bool  # the position, if there was one
    before: list[Call]  # the calls before the position


def build(directory: pathlib.Path) -> pathlib.Path:
    """The library, compiled. Skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the fault layer is a C library for Linux: it needs a C compiler (cc)")
    library = directory / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", str(_SOURCE), "-o", str(library), "-ldl"], check=True
    )
    return library


def environment(
    library: pathlib.Path, root: pathlib.Path, position: Position, **further: str
) -> dict[str, str]:
    """What a process needs in its environment to have a fault below `root`.

    position: occurrence 0 means every such call, and * in the path stands for anything.
    further: FAULTS_LOG, FAULTS_RANK.
    """
    return {
        "LD_PRELOAD": str(library), "FAULTS_ROOT": str(root), "FAULTS_POSITION": position.text(),
        **further,
    }  # fmt: skip


def without_flock(library: pathlib.Path, root: pathlib.Path, error: int) -> dict[str, str]:
    """As environment(): flock fails with this errno, as on a file system without locks."""
    return environment(library, root, Position(Call("flock", "*", 0), "e", error))


class Worker:
    """The process that runs commands, and the directory whose paths it watches."""

    def __init__(self, library: pathlib.Path, directory: pathlib.Path) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        self._said, self._log = directory / "said", directory / "log"
        self._runs = 0
        environment = {
            **os.environ, "LD_PRELOAD": str(library), "FAULTS_ROOT": str(self.root),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(
        self, command: str, *arguments: object, position: Position | None = None,
        record: bool = False,
    ) -> Outcome:  # fmt: skip
        """Call a command in a fork of the worker."""
        self._log.unlink(missing_ok=True)
        logged = record or position is not None
        self._runs += 1
        request = {
            "run": self._runs, "command": command,
            "arguments": [str(argument) for argument in arguments],
            "said": str(self._said), "log": str(self._log) if logged else "",
            "position": position.text() if position else "", "seconds": _SECONDS,
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = {"run": 0, "code": None}
        while answer["run"] != self._runs:  # that of a test which was interrupted may come first
            answer = json.loads(self._process.stdout.readline())
        code = answer["code"]
        lines = self._log.read_text().splitlines() if logged and self._log.exists() else []
        at = next((i for i, line in enumerate(lines) if line.startswith("!")), None)
        calls = _numbered([line for line in lines if not line.startswith(("!", "~"))])
        said = self._said.read_text(errors="replace")
        before = calls[: max(at - 1, 0)] if at is not None else calls
        return Outcome(code, said, calls, at is not None, before)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _numbered(lines: list[str]) -> list[Call]:
    seen: Counter[tuple[str, str]] = Counter()
    calls = []
    for line in lines:
        operation, path = line.split("\t", 1)
        seen[operation, path] += 1
        calls.append(Call(operation, path, seen[operation, path]))
    return calls
