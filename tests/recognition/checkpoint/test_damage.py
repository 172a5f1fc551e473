"""A checkpoint that is not what was written: named where a person asked for it, set aside where
nobody is there to ask."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import pytest
import torch

from recognition import checkpoint, config
from recognition.checkpoint import manifest as manifests
from recognition.run import build
from tests import ranks
from tests.recognition import runs

_MANIFESTS = ["garbage", "[]", "{}", "", None]  # None: one number of it changed


@pytest.fixture(scope="module")
def saved(shards_dir, tmp_path_factory):
    """Keys of a run that has checkpoints of steps 1 and 2, saved on two ranks."""
    keys = {
        "rec": str(shards_dir), "precision": "fp32", "checkpoint_every": 1, "max_steps": 3,
        "output": str(tmp_path_factory.mktemp("saved") / "run"),
    }  # fmt: skip
    ranks.run(2, runs.run, keys | {"keep_checkpoints": 9}, 1)
    ranks.run(2, runs.run, keys | {"keep_checkpoints": 9}, 2)
    return keys


@pytest.fixture
def keys(saved, tmp_path):
    """Keys of a copy of that run, for a test to damage."""
    output = str(tmp_path / "run")
    shutil.copytree(saved["output"], output)
    return saved | {"output": output}


def flip_a_bit(path):
    with open(path, "rb+") as file:
        content = bytearray(file.read())
        content[len(content) // 2] ^= 1
        file.seek(0)
        file.write(content)


def rewrite(path, content):
    with open(path) as file:
        text = file.read().replace('"step": 2', '"step": 7')
    with open(path, "w") as file:
        file.write(text if content is None else content)


def failure(keys):
    try:
        build.build(config.make(runs.BASE | keys), runs.here())
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""


@pytest.mark.parametrize(
    "name", ["model", "optimizer", "rows-0-8", "rows-8-16"], ids=lambda name: name
)
def test_a_flipped_bit_in_a_named_checkpoint_is_named_with_the_one_before(keys, name):
    path = checkpoint.newest(keys["output"])
    flip_a_bit(f"{path}/{name}.safetensors")
    before = sorted(os.listdir(os.path.dirname(path)))
    kind, message = ranks.run(1, failure, keys | {"resume": path})[0]
    assert kind == "Damaged" and f"{name}.safetensors is damaged" in message
    assert message.endswith("the one before it is " + path.replace("step-2", "step-1"))
    assert sorted(os.listdir(os.path.dirname(path))) == before


@pytest.mark.parametrize("content", _MANIFESTS)
def test_a_damaged_manifest_is_named_too(keys, content):
    path = checkpoint.newest(keys["output"])
    rewrite(f"{path}/manifest.json", content)
    kind, message = ranks.run(1, failure, keys | {"resume": path})[0]
    assert kind == "Damaged" and "manifest.json is damaged" in message
    assert message.endswith("step-1")


@pytest.mark.parametrize("damage", ["bit of rank 1", "manifest", "missing file"])
def test_a_run_on_its_own_goes_on_from_the_one_before(keys, damage, tmp_path):
    """On every rank alike, to the numbers of the run that did not stop."""
    unbroken = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "unbroken")})[0]
    path = checkpoint.newest(keys["output"])
    if damage == "manifest":
        rewrite(f"{path}/manifest.json", None)
    elif damage == "missing file":
        os.remove(f"{path}/rows-8-16.safetensors")
    else:
        flip_a_bit(f"{path}/rows-8-16.safetensors")
    resumed = ranks.run(2, runs.run, keys)[0]
    assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)
    found = os.listdir(os.path.dirname(path))
    assert "step-2.damaged" in found and {"step-1", "step-2", "step-3"} <= set(found)
    with open(f"{keys['output']}/metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    (said,) = [r["damaged_checkpoint"] for r in records if "damaged_checkpoint" in r]
    assert ("rows-8-16" in said or "manifest.json" in said) and "step-2.damaged" in said


def contents(directory):
    """Every file below a directory, with what is in it."""
    paths = [path for path in pathlib.Path(directory).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.name != ".lock"}


def test_a_run_with_no_good_checkpoint_does_not_start_anew_by_itself(keys):
    """It says the way on, as often as it is started, and nothing is renamed or emptied."""
    for step in (1, 2):
        flip_a_bit(f"{keys['output']}/checkpoints/step-{step}/model.safetensors")
    before = contents(keys["output"])
    for _ in range(2):
        kind, message = ranks.run(1, failure, keys)[0]
        assert kind == "Damaged" and "resume=none and another output=" in message
        assert "step-1/model.safetensors" in message and "step-2/model.safetensors" in message
    assert contents(keys["output"]) == before


def test_checkpoints_that_were_set_aside_are_not_forgotten(keys):
    """Neither does a typed resume=none write into their directory."""
    for step in (1, 2):
        path = f"{keys['output']}/checkpoints/step-{step}"
        os.rename(path, path + ".damaged")
    before = contents(keys["output"])
    kind, message = ranks.run(1, failure, keys)[0]
    assert kind == "Damaged" and "step-2.damaged is damaged" in message
    kind, message = ranks.run(1, failure, keys | {"resume": None})[0]
    assert kind == "FileExistsError" and "choose another output=" in message
    assert contents(keys["output"]) == before


def test_a_checkpoint_that_lost_its_manifest_is_set_aside(keys):
    path = checkpoint.newest(keys["output"])
    os.remove(f"{path}/manifest.json")
    ranks.run(1, runs.run, keys, 2)
    names = os.listdir(os.path.dirname(path))
    assert sorted(names) == ["step-1", "step-2", "step-2.damaged"]


def test_the_same_step_damaged_twice(keys):
    for name in ("step-2.damaged", "step-2.damaged-2"):
        path = checkpoint.newest(keys["output"])
        flip_a_bit(f"{path}/model.safetensors")
        ranks.run(1, runs.run, keys, 2)
        assert name in os.listdir(f"{keys['output']}/checkpoints")


def test_a_damaged_network_is_not_evaluated(keys):
    path = checkpoint.newest(keys["output"])
    flip_a_bit(f"{path}/model.safetensors")
    with pytest.raises(checkpoint.Damaged, match="model.safetensors is damaged.*step-1"):
        checkpoint.load_backbone(keys["output"])


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "rows-0-8.safetensors/../x", "x.pkl"])
def test_a_manifest_that_points_elsewhere_is_refused(keys, name, tmp_path):
    """Its hash is right: a stranger can compute it too."""
    path = checkpoint.newest(keys["output"])
    with open(f"{path}/manifest.json") as file:
        manifest = json.load(file)
    del manifest["sha256"]
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    with open(f"{path}/manifest.json", "w") as file:
        json.dump(manifest | {"sha256": manifests.digest(manifest)}, file)
    kind, message = ranks.run(1, failure, keys)[0]
    assert kind == "UserError" and "which no checkpoint contains" in message
    assert os.path.isdir(path)
