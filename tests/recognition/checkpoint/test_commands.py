"""python -m recognition.checkpoint inspect | verify | merge | export."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from recognition import checkpoint
from recognition.checkpoint import __main__ as program
from recognition.checkpoint import inspect_command, verify_command, writing
from tests import ranks
from tests.conftest import run
from tests.recognition import runs


@pytest.fixture(scope="module")
def trained(shards_dir, tmp_path_factory):
    """A run on three ranks with checkpoints of the steps 1 and 2; 16 classes: 6 + 5 + 5."""
    keys = {
        "rec": str(shards_dir), "precision": "fp32", "max_steps": 2, "checkpoint_every": 1,
        "margin": "adaface", "output": str(tmp_path_factory.mktemp("commands") / "run"),
    }  # fmt: skip
    tensors = ranks.run(3, runs.run, keys)[0]
    return keys, tensors


@pytest.fixture
def run_dir(trained, tmp_path):
    shutil.copytree(trained[0]["output"], tmp_path / "run")
    return str(tmp_path / "run")


def said(capsys, *arguments):
    """(exit code, what --json printed, or the error)."""
    code = program.main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    return code, json.loads(out.out.splitlines()[-1]) if out.out.strip() else out.err


def test_inspect(run_dir, capsys):
    code, facts = said(capsys, "inspect", run_dir)
    assert code == 0 and [c["step"] for c in facts["checkpoints"]] == [1, 2]
    code, facts = said(capsys, "inspect", checkpoint.newest(run_dir))
    assert (code, facts["step"], facts["samples_seen"], facts["world"]) == (0, 2, 24, 3)
    assert facts["heads"][0]["num_classes"] == 16 and facts["margin"] == "adaface"
    code, error = said(capsys, "inspect", run_dir + "/nothing")
    assert code == 1 and "neither a checkpoint nor a run" in error


def test_verify(run_dir, capsys):
    code, result = said(capsys, "verify", run_dir)
    assert code == 0 and result["ok"] and len(result["problems"]) == 2
    path = checkpoint.newest(run_dir)
    with open(f"{path}/rows-6-11.safetensors", "rb+") as file:
        file.seek(200)
        byte = file.read(1)[0]
        file.seek(200)
        file.write(bytes([byte ^ 16]))
    code, result = said(capsys, "verify", run_dir)
    assert code == 1 and not result["ok"]
    assert "rows-6-11.safetensors is damaged" in result["problems"][path][0]
    assert said(capsys, "verify", path.replace("step-2", "step-1"))[0] == 0


@pytest.mark.parametrize("command", ["verify", "inspect", "prune"])
def test_an_error_of_ours_is_not_taken_for_damage(command, run_dir, monkeypatch):
    """A ValueError that names no mistake of the user's is a bug, and keeps its traceback."""

    def broken(path):
        raise ValueError("a bug")

    for module in (verify_command, inspect_command, writing):
        monkeypatch.setattr(module, "read_manifest", broken)
    with pytest.raises(ValueError, match="a bug"):
        if command == "prune":
            writing.prune(run_dir, 2, writing.Keep(1, None, None))
        else:
            program.main([command, run_dir])


def test_merge_gives_a_checkpoint_that_resumes(trained, run_dir, tmp_path, capsys):
    keys, tensors = trained
    out = tmp_path / "merged"
    code, result = said(capsys, "merge", run_dir, out)
    assert code == 0 and sorted(result["files"]) == [
        "margin.safetensors", "model.safetensors", "optimizer.safetensors",
        "rows-0-16.safetensors",
    ]  # fmt: skip
    assert torch.equal(load_file(out / "rows-0-16.safetensors")["weight"], tensors["rows"])
    assert said(capsys, "verify", out)[0] == 0
    elsewhere = keys | {"resume": str(out), "output": str(tmp_path / "new"), "max_steps": 3}
    ahead = ranks.run(2, runs.run, elsewhere)[0]
    again = ranks.run(2, runs.run, keys | {"output": run_dir, "max_steps": 3})[0]
    assert all(torch.equal(ahead[name], again[name]) for name in ahead)
    code, error = said(capsys, "merge", run_dir, out)
    assert code == 1 and "already exists" in error


def test_export(trained, run_dir, tmp_path, capsys):
    _, tensors = trained
    code, result = said(capsys, "export", run_dir, tmp_path / "released", "--centres")
    assert code == 0
    assert sorted(os.listdir(tmp_path / "released")) == [
        "card.json", "centres.safetensors", "model.safetensors",
    ]  # fmt: skip
    state = load_file(tmp_path / "released" / "model.safetensors")
    assert all(torch.equal(value, tensors[f"backbone.{name}"]) for name, value in state.items())
    centres = load_file(tmp_path / "released" / "centres.safetensors")["centres"]
    assert torch.equal(centres, tensors["rows"])
    card = json.loads((tmp_path / "released" / "card.json").read_text())
    assert card == result["card"]
    assert (card["network"], card["step"], card["num_classes"]) == (runs.BASE["network"], 2, [16])
    assert card["trained_on"] == ["shards"] and "/" not in card["trained_on"][0]
    code, _ = said(capsys, "export", run_dir, tmp_path / "alone")
    assert code == 0 and "centres.safetensors" not in os.listdir(tmp_path / "alone")
    from recognition.weights.networks import open_embedder  # what reads it

    embedder = open_embedder(tmp_path / "alone" / "model.safetensors")
    assert embedder.facts["network"] == runs.BASE["network"]


def test_nothing_half_made_of_a_damaged_one(run_dir, tmp_path, capsys):
    path = checkpoint.newest(run_dir)
    os.truncate(f"{path}/rows-0-6.safetensors", 300)
    for command in (["merge"], ["export", "--centres"]):
        code, error = said(capsys, *command, run_dir, tmp_path / "out")
        assert code == 1 and "rows-0-6.safetensors is damaged" in error and "step-1" in error
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_what_is_not_ours_is_not_cleared(command, kind, run_dir, tmp_path, capsys):
    """A directory of a person's that is called as ours would be; nor what a link leads to."""
    theirs, partial = tmp_path / "theirs", tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "holiday.txt").write_text("mine")
    if kind == "link":
        partial.symlink_to(theirs)
    elif kind == "directory":
        theirs.rename(partial)
    else:
        partial.write_text("mine")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.glob("*/*.txt")}
    code, error = said(capsys, command, run_dir, tmp_path / "out")
    assert code == 1 and str(partial) in error and "move it away" in error
    assert before == {path: path.is_file() and path.read_text() for path in before}
    assert os.path.lexists(partial) and not (tmp_path / "out").exists()


def test_the_help_of_each(capsys):
    done = run("-m", "recognition.checkpoint", "--help")
    assert done.returncode == 0 and "usage" in done.stdout
    for command in ("inspect", "verify", "merge", "export"):
        with pytest.raises(SystemExit) as end:
            program.main([command, "--help"])
        assert end.value.code == 0 and "usage" in capsys.readouterr().out
