"""Checkpoints: complete or absent, verified, loaded at any number of ranks."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch

from recognition import checkpoint, config
from recognition.run import build, run_dir
from tests import ranks
from tests.conftest import command
from tests.recognition import runs


@pytest.fixture
def keys(shards_dir, tmp_path):
    return {"rec": str(shards_dir), "precision": "fp32", "output": str(tmp_path / "run")}


def test_what_a_checkpoint_holds(keys):
    ranks.run(2, runs.run, keys, 2)
    path = checkpoint.newest(keys["output"])
    assert sorted(os.listdir(path)) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors",
        "rows-0-8.safetensors", "rows-8-16.safetensors",
    ]  # fmt: skip
    manifest = json.load(open(os.path.join(path, "manifest.json")))
    assert (manifest["step"], manifest["samples_seen"], manifest["world"]) == (2, 24, 2)
    assert manifest["config"]["network"] == runs.BASE["network"]
    assert set(manifest["files"]) == set(os.listdir(path)) - {"manifest.json"}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_and_their_state_by_class_id(keys, world):
    """Saved on 4 ranks, each row marked with its class; loaded on `world` ranks."""
    ranks.run(4, marked, keys)
    for start, stop, values in ranks.run(world, rows_of, keys):
        expected = torch.arange(start, stop, dtype=torch.float32)
        for name, rows in values.items():
            assert torch.equal(rows, (expected[:, None] + len(name)).expand_as(rows)), name


def marked(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    start, stop = state.head.shard
    classes = torch.arange(start, stop, dtype=torch.float32)[:, None]
    state.head.weight.data[:] = classes + len("weight")
    state.parts.heads[0].row_optimizer.state["momentum"][:] = classes + len("momentum")
    runs.save_here(state)


def rows_of(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    rows = {"weight": state.head.weight.detach()} | state.parts.heads[0].row_optimizer.state
    return *state.head.shard, rows


def test_an_older_checkpoint_does_not_continue_under_newer_ones(keys, tmp_path):
    ranks.run(1, runs.run, keys | {"checkpoint_every": 1, "keep_checkpoints": 9})
    old = os.path.join(keys["output"], "checkpoints", "step-2")
    kind, message = ranks.run(1, failure, keys | {"resume": old})[0]
    assert kind == "FileExistsError" and "already holds step-6" in message
    elsewhere = keys | {"resume": old, "output": str(tmp_path / "branch"), "keep_checkpoints": 1}
    ranks.run(1, runs.run, elsewhere)
    assert os.listdir(tmp_path / "branch" / "checkpoints") == ["step-6"]


def failure(keys):
    try:
        build.build(config.make(runs.BASE | keys), runs.here())
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""


@pytest.mark.parametrize("change", [{"seed": 4}, {"rec": "other"}], ids=str)
def test_another_order_of_samples_is_refused(keys, change, shards_dir, tmp_path):
    ranks.run(1, runs.run, keys, 1)
    if "rec" in change:
        command("-m", "data_tools", "pack", shards_dir.parent / "faces", tmp_path / "other",
                "--seed", 9, "--hold-out", 4, "--pairs", 40)  # fmt: skip
        change = {"rec": str(tmp_path / "other")}
    kind, message = ranks.run(1, failure, keys | change)[0]
    assert kind == "UserError" and "repeated or skipped" in message


def test_other_changes_are_named(keys):
    ranks.run(1, runs.run, keys, 1)
    lines = ranks.run(1, continued, keys | {"lr": 0.5, "margin": "cosface", "log_every": 5})[0]
    assert sorted(lines) == ["lr 0.05 -> 0.5", "margin arcface -> cosface"]
    assert ranks.run(1, continued, keys)[0] == []


def continued(keys):
    return build.build(config.make(runs.BASE | keys), runs.here()).changes


def test_two_runs_do_not_share_a_directory(keys):
    with run_dir.lock_run_dir(keys["output"]):
        messages = ranks.run(2, train_message, keys)
    assert all("is in use by another run" in message for message in messages)
    assert os.listdir(keys["output"]) == [".lock"]
    ranks.run(2, runs.run, keys | {"max_steps": 1})


def train_message(keys):
    try:
        runs.run(keys)
    except OSError as error:
        return str(error)


def test_an_unfinished_checkpoint_is_not_one(keys):
    ranks.run(1, runs.run, keys | {"max_steps": 2}, 1)
    newer = os.path.join(keys["output"], "checkpoints", "step-9")
    os.makedirs(newer + ".partial")
    os.makedirs(newer)
    assert checkpoint.newest(keys["output"]).endswith("step-1")
    ranks.run(1, runs.run, keys | {"max_steps": 2})
    assert not os.path.exists(newer + ".partial")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"embedding_size": 64}, "embedding_size 32 there, 64 here"),
        ({"num_subcenters": 2}, "num_subcenters 1 there, 2 here"),
        ({"network": "mbf"}, "does not fit this network"),
        ({"optimizer": "adamw"}, "row_state ['momentum'] there"),
    ],
    ids=str,
)
def test_another_model_is_refused(keys, change, words):
    ranks.run(1, runs.run, keys, 1)
    kind, message = ranks.run(1, failure, keys | change)[0]
    assert kind == "UserError" and words in message


def test_a_new_run_does_not_write_into_an_old_one(keys):
    ranks.run(1, runs.run, keys, 1)
    kind, message = ranks.run(1, failure, keys | {"resume": None})[0]
    assert kind == "FileExistsError" and "choose another output" in message


def test_a_full_disk_leaves_the_former_checkpoint_and_no_trace(keys):
    """Every rank gets the error of the rank that could not write."""
    ranks.run(2, runs.run, keys, 1)
    before = sorted(os.listdir(os.path.join(keys["output"], "checkpoints")))
    messages = ranks.run(2, save_on_a_full_disk, keys)
    assert messages[0] == messages[1]
    assert "rank 1: " in messages[0] and "rank 0: " not in messages[0]
    assert "step-2.partial/rows-8-16.safetensors" in messages[0]
    assert sorted(os.listdir(os.path.join(keys["output"], "checkpoints"))) == before == ["step-1"]


def save_on_a_full_disk(keys):
    """Rank 1 has no room for a checkpoint."""
    state = build.build(config.make(runs.BASE | keys), runs.here())
    state.step += 1
    with runs.full_disk() if state.runtime.rank == 1 else contextlib.nullcontext():
        try:
            runs.save_here(state)
        except OSError as error:
            return str(error)


def test_the_backbone_alone(keys):
    tensors = ranks.run(2, runs.run, keys)[0]
    for path in (keys["output"], checkpoint.newest(keys["output"])):
        module, saved = checkpoint.load_backbone(path)
        assert not module.training and saved["network"] == runs.BASE["network"]
        for name, value in module.state_dict().items():
            assert torch.equal(value, tensors[f"backbone.{name}"])
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a run"):
        checkpoint.load_backbone(os.path.dirname(keys["output"]) + "/nothing")


@pytest.mark.parametrize("form", ["run", "safetensors", "pt"])
def test_a_new_run_starts_from_given_weights(keys, form, tmp_path):
    ranks.run(1, runs.run, keys, 1)
    module, _ = checkpoint.load_backbone(keys["output"])
    source = keys["output"]
    if form == "safetensors":
        source = os.path.join(checkpoint.newest(source), "model.safetensors")
    elif form == "pt":
        source = str(tmp_path / "backbone.pt")
        torch.save({f"module.{k}": v for k, v in module.state_dict().items()}, source)
    start = ranks.run(1, started, keys | {"init_from": source, "output": str(tmp_path / "new")})[0]
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())


def started(keys):
    return build.build(config.make(runs.BASE | keys), runs.here()).backbone.state_dict()


def test_a_pickle_with_code_is_not_run(keys, tmp_path):
    source = str(tmp_path / "evil.pt")
    torch.save({"w": Evil(str(tmp_path / "ran"))}, source)
    kind, message = ranks.run(1, failure, keys | {"init_from": source})[0]
    assert kind == "UserError" and "cannot be read as weights" in message
    assert not os.path.exists(tmp_path / "ran")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_damaged_file_of_weights_is_an_error(keys, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    kind, message = ranks.run(1, failure, keys | {"init_from": str(tmp_path / name)})[0]
    assert kind == "UserError" and name in message


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
