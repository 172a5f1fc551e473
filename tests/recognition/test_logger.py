"""What a run says: JSON that others read, a resumed file without doubles."""

from __future__ import annotations

import json

from recognition.logger import Logger


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
