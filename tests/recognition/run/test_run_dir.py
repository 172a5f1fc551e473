"""A run directory: what is not ours in it, what a finished run is asked for, notes that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from recognition import checkpoint, config
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
