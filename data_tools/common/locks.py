"""One process at a time: a lock on a file, on file systems without locks too.

Where flock works, it decides, and the lock file names who holds it. Where flock is missing (Lustre
without -o flock, some NFS), a second file beside it, NAME.holder, is made exclusively and rewritten
every few seconds by a thread of the holder. Another process takes it over only if it has seen no
change for STALE_SECONDS by its own monotonic clock, or if the holder was a process of this machine
that has ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from data_tools.common import files

BEAT_SECONDS = 2.0  # between two heartbeats of a holder
STALE_SECONDS = 60.0  # without a heartbeat: the holder has ended
_POLL_SECONDS = 0.5  # between two looks at another's heartbeat
_WARN_SECONDS = 5.0  # of waiting, before the user is told
_MISSING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # flock is not there
_HOLDER = ".holder"
_RECORD_BYTES = 1024  # more than a record has


class LockHeld(FileExistsError):
    """Another process holds the lock; the message names its host and process id."""


@contextlib.contextmanager
def hold(path: str | os.PathLike[str], busy: str, remove: bool = False) -> Iterator[None]:
    """Hold the lock file at `path` while the body runs.

    busy: the error's text if another process holds it, such as "DIR is in use by another run".
    remove: leave no lock file behind. Otherwise it stays and names its last holder.

    Raises:
        LockHeld: another process has it.
        OSError: the lock file cannot be made.
    """
    path = os.fspath(path)
    own = _record()
    descriptor = _open(path)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: os.close(descriptor))
        try:
            _lock(path, descriptor, busy)
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            stack.enter_context(_held_by_heartbeat(path, own, busy, error))
        else:
            _refuse_heartbeat(path, busy)  # of a machine whose mount has no flock
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(own).encode(), 0)
        try:
            yield
        finally:
            if remove:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(path: str, descriptor: int, busy: str) -> None:
    """Lock the file that has the name `path`, which may no longer be the one that was opened.

    Raises:
        LockHeld: another process has it.
        OSError: flock fails for another reason.
    """
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(busy, _record_of_holder(path)) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        there = files.status(path)
        with files.naming(path):
            if there is not None and os.path.samestat(there, os.fstat(descriptor)):
                return
        # The holder removed the file between our open and our lock: lock the one that is there.
        again = _open(path)
        os.dup2(again, descriptor, inheritable=False)
        os.close(again)


def _record_of_holder(path: str) -> dict[str, Any]:
    """The record of the process that has the flock; {} if it writes none within a second.

    It writes its record after it has locked the file: until then, the record may be absent, half
    written, or that of the holder before it.
    """
    deadline = time.monotonic() + 1.0
    while not (record := _read(path)) or _ended_here(record):
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.02)
    return record


def _held(busy: str, record: dict[str, Any]) -> LockHeld:
    host, pid = record.get("host"), record.get("pid")
    who = f": process {pid} on {host}" if host and pid else ""
    return LockHeld(f"{busy}{who}; wait for it, or end it")


# --- Without flock --------------------------------------------------------------------------------


@contextlib.contextmanager
def _held_by_heartbeat(path: str, own: dict[str, Any], busy: str, why: OSError) -> Iterator[None]:
    """Hold NAME.holder, with a heartbeat in it.

    Raises:
        LockHeld: another process does.
    """
    try:
        descriptor = _make_holder(path, own, busy)
    except LockHeld:
        raise
    except OSError as error:
        print(
            f"warning: {path}: this file system has no locks ({why.strerror}), and a lock file "
            f"cannot be made either ({error}): make sure that no other process writes here",
            file=sys.stderr,
            flush=True,
        )
        yield
        return
    ended = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(path, descriptor, own, ended), name="lock", daemon=True
    )
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join(STALE_SECONDS)
        with contextlib.suppress(OSError):
            if _read(path + _HOLDER).get("token") == own["token"]:
                os.unlink(path + _HOLDER)
        os.close(descriptor)


def _make_holder(path: str, own: dict[str, Any], busy: str) -> int:
    """Make NAME.holder; its descriptor."""
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(path + _HOLDER, flags, 0o666)
        except FileExistsError:
            _refuse_heartbeat(path, busy)
            continue
        try:
            _write(descriptor, own)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(path + _HOLDER)
            raise
        return descriptor


def _refuse_heartbeat(path: str, busy: str) -> None:
    """Remove a NAME.holder whose process has ended.

    Raises:
        LockHeld: its process is alive.
    """
    name = path + _HOLDER
    seen = _read(name)
    began = time.monotonic()
    warned = False
    while files.exists(name) and not _ended_here(seen):
        waited = time.monotonic() - began
        if waited > STALE_SECONDS:
            break
        if waited > _WARN_SECONDS and not warned:
            warned = True
            print(
                f"{name}: waiting {STALE_SECONDS:.0f} s at most to see whether process "
                f"{seen.get('pid')} on {seen.get('host')} is alive",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL_SECONDS)
        now = _read(name)
        if now and now != seen and seen:
            raise _held(busy, now)
        seen = now or seen
    # Renaming tells two that found it stale apart: one of them gets it.
    aside = f"{name}.{uuid.uuid4().hex}{files.PARTIAL}"
    try:
        os.rename(name, aside)
    except FileNotFoundError:
        return
    taken = _read(aside)
    if taken.get("token") != seen.get("token"):  # another process was quicker, and it is its
        with contextlib.suppress(OSError):
            os.link(aside, name)
        os.unlink(aside)
        raise _held(busy, taken)
    os.unlink(aside)


def _beat(path: str, descriptor: int, own: dict[str, Any], ended: threading.Event) -> None:
    """Rewrite the record until `ended`. A process that has lost the lock ends at once: whoever
    holds it now would find its files overwritten."""
    while not ended.wait(BEAT_SECONDS):
        own["beat"] += 1
        with contextlib.suppress(OSError):  # it may work the next time
            _write(descriptor, own)
            token = _read(path + _HOLDER).get("token")
            if token not in (None, own["token"]) and not ended.is_set():
                print(
                    f"error: {path}: another process took this lock after it "
                    f"had seen no sign of this one for {STALE_SECONDS:.0f} s: this process ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def _write(descriptor: int, record: dict[str, Any]) -> None:
    os.pwrite(descriptor, json.dumps(record).encode(), 0)
    os.fsync(descriptor)


def _read(path: str) -> dict[str, Any]:
    """The record in a lock file; {} if it is absent, or is being written.

    It is opened anew each time: NFS then asks its server.
    """
    try:
        with files.naming(path), open(path, "rb") as file:
            record = json.loads(file.read(_RECORD_BYTES))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# --- Who holds it ---------------------------------------------------------------------------------


def _record() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _started(pid),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _machine() -> str | None:
    """What process ids are counted in: this start of this machine and its namespace of processes.
    None where Linux does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks since the machine was; None if it
    has ended or is not visible."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *others = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]


def _ended_here(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and has ended."""
    machine, pid = _machine(), record.get("pid")
    if machine is None or record.get("machine") != machine or not isinstance(pid, int):
        return False
    return record.get("started") is not None and _started(pid) != record["started"]
