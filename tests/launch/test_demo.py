"""launch/demo.py as a person runs it, on a small folder of faces and few steps."""

import json
import os
import sys

import numpy as np
import pytest

from data_tools.synthetic.generate import FaceOptions, synthesize
from launch import demo
from tests.conftest import command


def demonstrated(tmp_path, steps):
    """What is typed, its output directory and what it said last, judged."""
    faces, out = tmp_path / "faces", tmp_path / "out"
    synthesize(faces, FaceOptions(12, 6))
    words = ["-m", "launch.demo", "--data", faces, "--out", out, "--steps", steps, "--json"]
    first = command(*words)
    done = json.loads(first.stdout.splitlines()[-1])
    assert done["run"] == str(out / "run")
    assert done["onnx"] == str(out / "run" / "model.onnx") and os.path.isfile(done["onnx"])
    assert done["report"] == str(out / "run" / "report.html") and os.path.isfile(done["report"])
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    scores = [
        record["verification"]["heldout"]["accuracy_mean"]
        for record in map(json.loads, lines)
        if "verification" in record
    ]
    assert (done["accuracy_before"], done["accuracy_after"]) == (scores[0], scores[-1])
    index = json.loads((out / "shards" / "index.json").read_text())
    assert (index["classes"], index["held_out"]["identities"]) == (9, 3)
    assert index["held_out"]["pairs"] == 2 * 3 * 15 // 20 * 20  # 15 pairs of each of 3 people
    assert "80 pairs made, not 2000" in first.stderr
    (results,) = json.loads((out / "run" / "report.json").read_text())["models"].values()
    assert [(x["name"], x["metrics"]["pairs"]) for x in results] == [("heldout", 80)]
    return words, out, done


def test_a_small_folder(tmp_path):
    demonstrated(tmp_path, 1)


@pytest.mark.long
def test_the_same_again(tmp_path):
    words, out, done = demonstrated(tmp_path, 3)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    checkpoints = os.listdir(out / "run" / "checkpoints")

    again = command(*words)
    assert f"reused {out / 'shards'}" in again.stdout
    assert "already complete: 3 of 3 steps" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1]) == done
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == stamps
    assert os.listdir(out / "run" / "checkpoints") == checkpoints


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([20] * 1000, 200),  # the share
        ([6] * 12, 3),
        ([2] * 40, 10),  # one pair of each: ten are needed
        ([2] * 8, 6),  # too few in any case: all but two, and pack says the rest
        ([5, 5, 5, 5], 2),
    ],
)
def test_enough_people_are_held_out(tmp_path, sizes, held_out):
    for k, size in enumerate(sizes):
        (tmp_path / f"{k}").mkdir()
        for j in range(size):
            (tmp_path / f"{k}" / f"{j}.jpg").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.txt").touch()
    assert demo._num_held_out(tmp_path) == held_out


def test_uneven_sizes_leave_room_for_an_unlucky_draw(tmp_path):
    sizes = np.array([1] * 300 + [4] * 60)
    for k, size in enumerate(sizes):
        (tmp_path / f"{k}").mkdir()
        for j in range(size):
            (tmp_path / f"{k}" / f"{j}.jpg").touch()
    number = demo._num_held_out(tmp_path)
    rng = np.random.default_rng(0)
    pairs = sizes * (sizes - 1) // 2
    drawn = [rng.permutation(pairs)[:number].sum() for _ in range(500)]
    assert np.mean(np.array(drawn) >= 10) > 0.97


def test_commands_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    line = [sys.executable, "-m", "eval", "lfw", "a b"]
    monkeypatch.chdir(tmp_path)
    assert demo._shown(line) == ".venv/bin/python -m eval lfw 'a b'"
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert demo._shown(line) == f"{sys.executable} -m eval lfw 'a b'"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "absent"], 1, "absent: expected a directory of identities"),
        (["--data", "few"], 1, "2 folders with images; at least 4 people"),
        (["--steps", "0"], 2, "--steps 0: must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, code, message, monkeypatch, capsys):
    for k in range(2):
        (tmp_path / "few" / f"{k}").mkdir(parents=True)
        (tmp_path / "few" / f"{k}" / "a.jpg").touch()
    words = [str(tmp_path / word) if word in ("absent", "few") else word for word in words]
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out"), *words])
    try:
        ended = demo.main()
    except SystemExit as exit:  # of argparse
        ended = exit.code
    said = capsys.readouterr().err
    assert ended == code and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
