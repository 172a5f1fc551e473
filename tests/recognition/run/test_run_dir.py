"""A run directory: what is not ours in it, what a finished run is asked for, notes that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import pytest

from recognition import checkpoint, config
from recognition.checkpoint import manifest
from recognition.distributed import preemption
from recognition.run import build, run_dir, trainer
from tests import ranks
from tests.recognition import runs


@pytest.fixture
def keys(shards_dir, tmp_path):
    return {"rec": str(shards_dir), "precision": "fp32", "output": str(tmp_path / "run")}


def failure(keys):
    try:
        trainer.train(build.build(config.make(runs.BASE | keys), runs.here()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


_FOREIGN = {
    "config.json": '{"model_type": "bert"}',
    "metrics.jsonl": '{"step": 5, "theirs": true}\n',
    "stopped.json": '{"by": "hand"}',
    "checkpoints/step-5/weights.bin": "theirs",
}


@pytest.mark.parametrize("name", _FOREIGN)
def test_a_directory_with_foreign_files_is_refused_by_name(keys, name, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(_FOREIGN[name])
    for message in ranks.run(2, failure, keys):
        assert f"holds {name.split('/')[0]}, not written by a run of arcline" in message
    assert path.read_text() == _FOREIGN[name]
    assert len([each for each in (tmp_path / "run").rglob("*") if each.is_file()]) == 1


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_foreign_file_beside_our_checkpoints_is_refused_too(keys, name, tmp_path):
    ranks.run(1, runs.run, keys | {"max_steps": 1})
    (tmp_path / "run" / name).write_text('{"theirs": 1}\n')
    (message,) = ranks.run(1, failure, keys)
    assert f"holds {name}, not written" in message
    assert (tmp_path / "run" / name).read_text() == '{"theirs": 1}\n'


def test_paths_mean_the_same_in_another_working_directory(keys, tmp_path):
    """The run is started in one directory and resumed in another, as is one whose paths an earlier
    version recorded as they were given."""
    home, other = pathlib.Path(keys["rec"]).parent, tmp_path / "elsewhere"
    other.mkdir()
    output = os.path.relpath(keys["output"], home)
    ranks.run(1, run_in, home, keys | {"rec": "shards", "output": output}, 1)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    newest = checkpoint.newest(keys["output"])
    for recorded in (written, checkpoint.read_manifest(newest)["config"]):
        assert (recorded["rec"], recorded["output"]) == (keys["rec"], keys["output"])
    ranks.run(1, run_in, other, keys, 2)
    newest = checkpoint.newest(keys["output"])
    assert newest.endswith("step-2")
    recorded = checkpoint.read_manifest(newest)["config"]
    manifest.amend(newest, {"config": recorded | {"rec": "shards", "output": output}})
    ranks.run(1, run_in, other, keys, 3)
    newest = checkpoint.newest(keys["output"])
    assert newest.endswith("step-3")
    assert checkpoint.read_manifest(newest)["config"]["rec"] == keys["rec"]


def run_in(working_directory, keys, steps):
    """Train to a step and save, started from a working directory."""
    former = os.getcwd()
    os.chdir(working_directory)
    try:
        state = build.build(config.make(runs.BASE | keys | {"max_steps": steps}), runs.here())
        trainer.train(state)
    finally:
        os.chdir(former)


def test_all_paths_are_recorded_as_absolute_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config.make({"rec": ["a", "b/../c", str(tmp_path / "d")], "teacher": "t.onnx"})
    run_dir.write_config(dataclasses.replace(cfg, output="run"), {"world": 1})
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["rec"] == [str(tmp_path / name) for name in "acd"]
    assert written["teacher"] == str(tmp_path / "t.onnx") and written["init_from"] is None
    assert cfg.rec == ["a", "b/../c", str(tmp_path / "d")]  # messages say what the user gave


def test_what_runs_leave_is_ours(keys, tmp_path):
    """Killed before a first checkpoint, and with files of people beside them."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    ranks.run(1, runs.run, keys | {"max_steps": 1})
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_dir.refuse_foreign_files(keys["output"])
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "lo')
    run_dir.refuse_foreign_files(keys["output"])
    ranks.run(1, runs.run, keys | {"max_steps": 1})
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_finished_run_is_not_asked_for_what_it_would_ignore(keys, tmp_path, capfd):
    keys |= {"max_steps": 1}
    ranks.run(1, runs.run, keys)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")}
    (message,) = ranks.run(1, failure, keys | {"margin": "cosface", "lr": 0.5})
    assert "is complete after 1 steps" in message and "margin arcface -> cosface" in message
    assert "lr 0.05 -> 0.5" in message and "would be ignored" in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")}
    assert ranks.run(1, failure, keys) == [""]  # the same command once more
    assert ranks.run(1, failure, keys | {"margin": "cosface", "max_steps": 2}) == [""]


def test_the_start_of_a_run_is_not_asked_for_again(keys, tmp_path):
    ranks.run(1, runs.run, keys, 1)
    other = keys | {"output": str(tmp_path / "other")}
    ranks.run(1, runs.run, other, 1)
    for key in ("init_from", "init_head"):
        (message,) = ranks.run(1, failure, keys | {key: other["output"]})
        assert f"{key}={other['output']} would be ignored" in message


def test_a_note_that_cannot_be_written_leaves_the_exit_code(tmp_path, capsys):
    (tmp_path / "stopped.json").mkdir()
    stopped = preemption.stopped(str(tmp_path), 0, signal.SIGTERM, 3)
    assert preemption.exit_code_of(stopped) == preemption.EXIT_CODE
    assert "stopped.json was not written" in capsys.readouterr().err


def test_a_network_keeps_its_arguments(tmp_path, shards_dir):
    keys = {
        "rec": str(shards_dir), "output": str(tmp_path / "run"), "network": "r18",
        "network_args": {"dropout": 0.25}, "precision": "fp32",
    }  # fmt: skip
    ranks.run(1, save_untrained, keys)
    module, _ = checkpoint.load_backbone(keys["output"])
    assert module.dropout.p == 0.25
    written = os.path.join(checkpoint.newest(keys["output"]), "manifest.json")
    assert json.loads(open(written).read())["config"]["network_args"] == {"dropout": 0.25}


def save_untrained(keys):
    runs.save_here(build.build(config.make(runs.BASE | keys), runs.here()))
