"""A pool of gloo workers, one per world size, spawned once: run(world, function, *arguments).

The function is called on every rank of a default process group of that size, and must be
importable by name. Its results come back in rank order; an exception on any rank is raised here
with its traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SECONDS = 240  # a rank that hangs is named before pytest ends the test
_pools: dict[int, _Pool] = {}


def run(world: int, function: Callable, *arguments: object) -> list:
    if world not in _pools:
        _pools[world] = _Pool(world)
    return _pools[world].run(function, arguments)


class _Pool:
    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        self._world = world
        # Over TCP: a limit on the size of a rank's files must not reach what the ranks agree by.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._workers = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, world, self._store.port, theirs), daemon=True
            )
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, function: Callable, arguments: tuple) -> list:
        try:
            return self._run(function, arguments)
        except BaseException:
            # Ranks may now disagree about what comes next, and an answer that nobody has read, of a
            # test that a time-out ended, would be taken for that of the next call.
            self.close()
            raise

    def _run(self, function: Callable, arguments: tuple) -> list:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_SECONDS):
                raise TimeoutError(
                    f"rank {rank} of {self._world} has not answered for {_SECONDS} s"
                    + "".join(failures)
                )
            failed, result = pipe.recv()
            results.append(result)
            if failed:
                failures.append(f"\nrank {rank} of {self._world}:\n{result}")
        if failures:
            raise AssertionError("".join(failures))
        return results

    def close(self) -> None:
        _pools.pop(self._world, None)
        for worker in self._workers:
            worker.kill()
            worker.join()


def _work(rank: int, world: int, port: int, pipe) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))


def close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()
