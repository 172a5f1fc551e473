"""Tasks spread over processes, with one progress bar for all of them."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # a task calls it with the number of images it has done since

# Starting a process takes as long as packing some 500 images: it is not worth it for fewer.
ITEMS_PER_WORKER = 500
_POLL = 0.1  # seconds between two looks at the workers
_AHEAD = 2  # tasks that wait, so that no worker does


class Tasks:
    """Tasks that are made on demand, and whose number is known."""

    def __init__(self, number: int, tasks: Iterator[Any]) -> None:
        self._number, self._tasks = number, tasks

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Any]:
        return self._tasks


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    workers: int,
    total: int,
    title: str,
) -> list[Result]:
    """`[function(task, advance) for task in tasks]`, by at most that many processes.

    An iterator is asked for a task when a process will soon be free, so its tasks are never all in
    memory. Small work takes fewer processes (see ITEMS_PER_WORKER; `total` is what all tasks
    together advance by), and this process does the work of a single one. The first exception of a
    task, or an interruption, stops the others at their next `advance` and is raised here. A worker
    whose parent was killed ends at once, so nothing goes on writing.

    Raises: ChildProcessError if a worker was killed.
    """
    with _progress_bar(title, total) as show:
        if isinstance(tasks, Sized):
            workers = min(workers, len(tasks))
        workers = min(workers, total // ITEMS_PER_WORKER)
        if workers <= 1:
            finished = 0

            def advance(n: int) -> None:
                nonlocal finished
                finished += n
                show(finished)

            return [function(task, advance) for task in tasks]
        context = multiprocessing.get_context("spawn")  # fork would copy OpenCV's threads mid-work
        done, stop = context.Value("q", 0), context.Event()
        with ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(done, stop)
        ) as pool:
            submitted = (pool.submit(_call, function, task) for task in tasks)
            try:
                return _collect(submitted, workers + _AHEAD, lambda: show(done.value))
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a worker process was killed; if memory ran out, use fewer --workers"
                ) from error
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, none without rich; yields what sets how many of `total` are done."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done: progress.update(bar, completed=done)


def _collect(submitted: Iterator[Future], window: int, show: Callable[[], None]) -> list[Any]:
    """All results in order, at most `window` tasks in flight; or the first exception."""
    futures: list[Future] = []
    pending: set[Future] = set()
    while True:
        with _interrupts_held():
            fresh = list(itertools.islice(submitted, window - len(pending)))
        futures += fresh
        pending |= set(fresh)
        if not pending:
            return [future.result() for future in futures]
        finished, pending = wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED)
        show()
        for future in finished:
            future.result()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits meanwhile; processes started here never see it: they would show a traceback each
    before their initializer says that the parent stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):
    """Raised in a worker whose work is no longer wanted."""


# Set once by a worker's initializer: shared values cannot travel with the tasks.
_worker: tuple[Synchronized, Event] | None = None


def _start_worker(done: Synchronized, stop: Event) -> None:
    global _worker
    _worker = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and stops us in order
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


def _advance(n: int) -> None:
    assert _worker is not None
    done, stop = _worker
    if stop.is_set():
        raise _Stopped
    with done.get_lock():
        done.value += n


def _call(function: Callable[[Any, Advance], Any], task: Any) -> Any:
    return function(task, _advance)
