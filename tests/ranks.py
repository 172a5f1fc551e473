"""A pool of gloo workers, spawned once: run(world, function, *arguments).

The function is called on every rank of a default process group of that size, and must be
importable by name. Its results come back in rank order; an exception on any rank is raised here
with its traceback. Groups of every size are made of the same workers, because a worker costs
seconds (it imports torch), a group milliseconds.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recognition.distributed import store_exchange

_SECONDS = 240  # a rank that hangs is named before pytest ends the test


class _Failure(NamedTuple):
    error: str  # the exception's type and message
    trace: str


def run(world: int, function: Callable, *arguments: object) -> list:
    global _pool
    if _pool is None:
        _pool = _Pool()
    return _pool.run(world, function, arguments)


class _Pool:
    def __init__(self) -> None:
        # Over TCP: a limit on the size of a rank's files must not reach what the ranks agree by.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._workers = [], []
        self._world, self._group = 0, 0

    def run(self, world: int, function: Callable, arguments: tuple) -> list:
        try:
            results = self._run(world, function, arguments)
        except BaseException:
            # Ranks may now disagree about what comes next, and an answer that nobody has read, of a
            # test that a time-out ended, would be taken for that of the next call.
            self.close()
            raise
        failed = [(rank, r) for rank, r in enumerate(results) if isinstance(r, _Failure)]
        if not failed:
            return results
        if len(failed) == world and len({failure.error for _, failure in failed}) == 1:
            self._world = 0  # all have left by the same error: a new group is enough
        else:
            self.close()
        raise AssertionError(
            "".join(f"\nrank {rank} of {world}:\n{failure.trace}" for rank, failure in failed)
        )

    def _run(self, world: int, function: Callable, arguments: tuple) -> list:
        while len(self._workers) < world:
            self._add_worker()
        if world != self._world:
            self._world, self._group = world, self._group + 1
        for pipe in self._pipes[:world]:
            pipe.send((world, self._group, function, arguments))
        results: list = []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(_SECONDS):
                raise TimeoutError(
                    f"rank {rank} of {world} has not answered for {_SECONDS} s"
                    + "".join(f"\n{r.trace}" for r in results if isinstance(r, _Failure))
                )
            results.append(pipe.recv())
        return results

    def _add_worker(self) -> None:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_work, args=(len(self._workers), self._store.port, theirs), daemon=True
        )
        worker.start()
        self._pipes.append(ours)
        self._workers.append(worker)

    def close(self) -> None:
        global _pool
        _pool = None
        for worker in self._workers:
            worker.kill()
            worker.join()


_pool: _Pool | None = None


def _work(rank: int, port: int, pipe) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    mine = None
    while True:
        try:
            world, group, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if group != mine:
                if dist.is_initialized():
                    dist.destroy_process_group()
                mine = group
                # Ranks number their exchanges by the group's name, which all groups here share.
                store_exchange._Exchange._numbers.clear()
                prefixed = dist.PrefixStore(f"group-{group}", store)
                dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world)
            pipe.send(function(*arguments))
        except BaseException as error:
            pipe.send(_Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def close_all() -> None:
    if _pool is not None:
        _pool.close()
