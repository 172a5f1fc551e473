"""What a run says: JSON that others read, a resumed file without doubles."""

from __future__ import annotations

import json
import subprocess

import pytest

from recognition.run.logger import Logger


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_records_and_lines(tmp_path, capsys):
    with Logger(str(tmp_path), 0, 0) as logger:
        logger.record({"step": 1, "loss": 2.0, "verification": {"lfw": {"xnorm": 1.0}}}, "one")
        logger.record({"step": 2, "loss": float("nan"), "norm": float("inf")}, "two")
    assert lines(tmp_path)[1] == {"step": 2, "loss": None, "norm": None}
    out = capsys.readouterr()
    assert out.out == "one\ntwo\n" and out.err == ""
    assert list((tmp_path / "events").iterdir())


def test_other_ranks_are_silent(tmp_path, capsys):
    with Logger(str(tmp_path / "run"), 1, 0) as logger:
        logger.record({"step": 1}, "one")
        logger.say("two")
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    with Logger(str(tmp_path), 0, 0) as logger:
        for step in range(6):
            logger.record({"step": step}, "")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    with Logger(str(tmp_path), 0, 3) as logger:
        logger.record({"step": 4, "again": True}, "")
    assert lines(tmp_path) == [{"step": s} for s in range(4)] + [{"step": 4, "again": True}]
    with Logger(str(tmp_path), 0, 0):
        pass
    assert lines(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path])
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


# TensorBoard's own thread says that it ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_stops_nobody_and_no_record_is_lost(small_disk, capsys):
    filler = small_disk / "filler"
    with Logger(str(small_disk), 0, 0) as logger:
        logger.record({"step": 1, "loss": 1.0}, "")
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        for step in range(2, 302):
            logger.record({"step": step, "loss": 1.0}, "")
        assert (small_disk / "metrics.jsonl").read_bytes().count(b"\n") < 301
        filler.unlink()
        logger.record({"step": 302, "loss": 1.0}, "")
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == 1 and "No space left on device; the run goes on" in said[0]
    assert [record["step"] for record in lines(small_disk)] == list(range(1, 303))
