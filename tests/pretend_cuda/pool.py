"""Processes with the pretend device, started once per world size: run(world, function, *arguments).

They are processes of their own because the device must be there before torch is imported. Rank r
has cuda:r. The function is called on every rank, inside a default process group of gloo, and must
be importable by name; results are plain Python or CPU tensors and come back in rank order. An
exception on any rank is raised here with its traceback.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from typing import Any

import pytest

from tests.pretend_cuda import shim

_SECONDS = 240  # a rank that hangs is named before pytest ends the test
_pools: dict[int, _Pool] = {}


def run(world: int, function: Callable, *arguments: object) -> list:
    if (reason := shim.why_unavailable()) is not None:
        pytest.skip(reason)
    if world not in _pools:
        _pools[world] = _Pool(world)
    return _pools[world].run(function, arguments)


def close_all() -> None:
    for world in list(_pools):
        _pools.pop(world).close()


class _Pool:
    def __init__(self, world: int) -> None:
        library = shim.build()
        self._world = world
        self._dir = tempfile.TemporaryDirectory()
        store = os.path.join(self._dir.name, "store")
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(shim.ROOT),
            "TRITON_INTERPRET": "1",
        }  # fmt: skip
        self._processes, self._connections = [], list[Connection]()
        listeners = []
        for rank in range(world):
            address = os.path.join(self._dir.name, f"rank-{rank}")
            listener = Listener(address, family="AF_UNIX")
            listener._listener._socket.settimeout(_SECONDS)  # type: ignore[attr-defined]
            listeners.append(listener)
            words = ["-m", "tests.pretend_cuda.worker", str(library), address]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, *words, str(rank), str(world), store],
                    cwd=pathlib.Path(shim.ROOT), env=environment,
                )
            )  # fmt: skip
        for listener in listeners:
            with listener:
                self._connections.append(listener.accept())
        for connection in self._connections:
            self._receive(connection)

    def run(self, function: Callable, arguments: tuple) -> list:
        try:
            for connection in self._connections:
                connection.send((function, arguments))
            results, failures = [], []
            for rank, connection in enumerate(self._connections):
                failed, result = self._receive(connection)
                results.append(result)
                if failed:
                    failures.append(f"\nrank {rank} of {self._world}:\n{result}")
        except BaseException:
            _pools.pop(self._world, None)  # an answer that nobody has read may be under way
            self.close()
            raise
        if failures:
            if self._world > 1:  # the others may be waiting for it
                _pools.pop(self._world, None)
                self.close()
            raise AssertionError("".join(failures))
        return results

    def _receive(self, connection: Connection) -> Any:
        if not connection.poll(_SECONDS):
            raise TimeoutError(f"a process of the pretend device does not answer in {_SECONDS} s")
        return connection.recv()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            process.kill()
            process.wait()
        self._dir.cleanup()
