"""One process holds a lock: with flock, and with a preloaded library that takes flock away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from data_tools.common import locks
from tests.faults.shim import without_flock

ROOT = pathlib.Path(__file__).parents[3]
_HOLDER = """
import sys
from data_tools.common import locks
locks.BEAT_SECONDS, locks.STALE_SECONDS = 0.2, float(sys.argv[2])
with locks.hold(sys.argv[1], "it is taken", remove=len(sys.argv) > 3):
    print("held", flush=True)
    sys.stdin.read()
"""
_KINDS = ["flock", "ENOLCK", "ENOSYS", "EOPNOTSUPP"]


@pytest.fixture(params=_KINDS)
def environment(request, faults_library, tmp_path):
    """What the processes of a test find: flock, or one of the ways in which it is missing."""
    if request.param == "flock":
        return {}
    return without_flock(faults_library, tmp_path, getattr(errno, request.param))


@contextlib.contextmanager
def holder(path, environment, stale=60.0, *more):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path), str(stale), *more],
        cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process):
    """Its output and exit code, after its body has ended."""
    out, err = process.communicate("", timeout=120)
    return out, err, process.returncode


def test_the_second_process_names_the_first_which_goes_on(tmp_path, environment):
    path = tmp_path / ".lock"
    with holder(path, environment) as first, holder(path, environment) as second:
        # Whichever comes first holds it: both are alike.
        pair = {process: process.stdout.readline() for process in (first, second)}
        (won,) = [process for process, said in pair.items() if said == "held\n"]
        lost = second if won is first else first
        _, err, code = end(lost)
        assert code != 0 and won.poll() is None
        assert f"Held: it is taken: process {won.pid} on {socket.gethostname()};" in err
        assert end(won)[2] == 0
    with holder(path, environment) as third:
        assert third.stdout.readline() == "held\n" and end(third)[2] == 0
    assert os.listdir(tmp_path) == [".lock"]


def test_a_holder_that_has_not_yet_written_its_name_is_named_all_the_same(tmp_path):
    """Between the lock and the record lies a moment, with the name of the holder before or none."""
    path = tmp_path / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = locks._record() | {"pid": 2**22 + 1, "started": "1"}  # of a process that has ended
    path.write_text(json.dumps(before))
    late = threading.Timer(0.2, lambda: path.write_text(json.dumps(locks._record())))
    late.start()
    with (
        pytest.raises(locks.LockHeld, match=f"process {os.getpid()} on "),
        locks.hold(path, "busy"),
    ):
        pass
    late.join()
    os.close(descriptor)


def test_a_killed_holder_of_this_machine_is_not_waited_for(tmp_path, environment):
    path = tmp_path / ".lock"
    with holder(path, environment) as first:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
        # One that would be waited for 1000 s.
        with holder(path, environment, 1000.0) as second:
            assert second.stdout.readline() == "held\n"
            assert end(second)[2] == 0


def test_a_lock_file_that_is_not_to_stay_is_removed(tmp_path, environment):
    with holder(tmp_path / ".lock", environment, 60.0, "remove") as process:
        assert process.stdout.readline() == "held\n" and os.listdir(tmp_path)
        assert end(process)[2] == 0
    assert os.listdir(tmp_path) == []


def of_another_machine(path, beat=0):
    record = {"host": "elsewhere", "pid": 1, "machine": "x", "started": "1", "token": "t"}
    (path.parent / f"{path.name}.holder").write_text(json.dumps(record | {"beat": beat}))


def test_a_holder_of_another_machine_without_a_heartbeat_is_stale(faults_library, tmp_path):
    environment = without_flock(faults_library, tmp_path, errno.ENOLCK)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / ".lock"
    of_another_machine(path)
    with holder(path, environment, 1.0) as process:
        assert process.stdout.readline() == "held\n" and end(process)[2] == 0
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_heartbeat_of_another_machine_is_believed_by_one_that_has_flock(tmp_path, monkeypatch):
    """One mount of a file system may have flock and another none."""
    path = tmp_path / ".lock"
    of_another_machine(path)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: of_another_machine(path, 1))
    with pytest.raises(locks.LockHeld, match="process 1 on elsewhere"), locks.hold(path, "taken"):
        pass
    assert (tmp_path / ".lock.holder").exists()


def test_a_holder_that_was_taken_for_dead_ends(faults_library, tmp_path):
    environment = without_flock(faults_library, tmp_path, errno.ENOLCK)
    path = tmp_path / ".lock"
    with holder(path, environment) as process:
        assert process.stdout.readline() == "held\n"
        (tmp_path / ".lock.holder").unlink()
        of_another_machine(path)
        assert process.wait(60) == 1
        assert "this process ends" in process.stderr.read()


def test_without_any_lock_there_is_a_warning(faults_library, tmp_path):
    """The name of the second lock file is longer than a file system takes."""
    environment = without_flock(faults_library, tmp_path, errno.ENOLCK)
    with holder(tmp_path / ("x" * 255), environment) as process:
        assert process.stdout.readline() == "held\n"
        _, err, code = end(process)
        assert code == 0 and "has no locks" in err and "no other process writes here" in err


def test_another_error_of_flock_is_an_error(faults_library, tmp_path):
    environment = without_flock(faults_library, tmp_path, errno.EIO)
    with holder(tmp_path / ".lock", environment) as process:
        _, err, code = end(process)
        assert code == 1 and "Input/output error" in err and ".lock" in err
