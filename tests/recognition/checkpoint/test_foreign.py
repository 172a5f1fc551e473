"""A checkpoint whose hashes are right and which no run wrote: refused by name, whatever it says."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil

import pytest
import safetensors.torch
import torch

from recognition import config
from recognition.checkpoint import manifest as manifests
from recognition.run import build
from tests import ranks
from tests.recognition import runs

_MISSING = object()


def rewrite(path, change):
    """The manifest anew, with its own hash and those of its files."""
    name = path / "manifest.json"
    manifest = json.loads(name.read_text())
    del manifest["sha256"]
    for listed, entry in manifest["files"].items():
        if (path / listed).exists():
            entry["sha256"] = hashlib.sha256((path / listed).read_bytes()).hexdigest()
    change(manifest)
    name.write_text(json.dumps(manifest | {"sha256": manifests.digest(manifest)}))


def fact(key, value=_MISSING, words=""):
    def change(manifest):
        manifest.pop(key) if value is _MISSING else manifest.update({key: value})

    return lambda path: rewrite(path, change), words or f"{key} is "


def content(name, data, words):
    def change(path):
        (path / name).write_bytes(data)
        rewrite(path, lambda manifest: None)

    return change, words


def tensors(name, make, words):
    def change(path):
        (found,) = path.glob(name)
        held = safetensors.torch.load_file(found)
        safetensors.torch.save_file({k: v.contiguous() for k, v in make(held).items()}, found)
        rewrite(path, lambda manifest: None)

    return change, words


def renamed(new, words):
    def change(path):
        (found,) = path.glob("rows-*")
        found.rename(path / new)
        move = lambda m: m["files"].update({new: m["files"].pop(found.name)})  # noqa: E731
        rewrite(path, move)

    return change, words


def twice(path):
    (found,) = path.glob("rows-*")
    shutil.copy(found, path / "rows-0-8.safetensors")
    add = lambda m: m["files"].update({"rows-0-8.safetensors": m["files"][found.name]})  # noqa: E731
    rewrite(path, add)


def header(text, body=b""):
    return len(text).to_bytes(8, "little") + text + body


OFFSETS = header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999]}}')
CASES = {
    "no heads": fact("heads"),
    "no samples_seen": fact("samples_seen"),
    "no config": fact("config"),
    "no world": fact("world"),
    "no global_batch": fact("global_batch"),
    "step of letters": fact("step", "x"),
    "step below 0": fact("step", -5),
    "samples beyond int64": fact("samples_seen", 10**30),
    "world of none": fact("world", 0),
    "heads of numbers": fact("heads", [1]),
    "heads of a dict": fact("heads", {}),
    "config of a list": fact("config", []),
    "no format": fact("format", None, "manifest.json is damaged"),
    "window": fact("skipped", [[1]]),
    "spikes": fact("spikes", [1]),
    "metrics": fact("metrics", 3),
    "no files": fact("files", {}, "lacks the classes from 0 on"),
    "file of a number": fact("files", {"model.safetensors": 7}),
    "file of no size": fact("files", {"model.safetensors": {"sha256": "0"}}),
    "empty file": content("model.safetensors", b"", "header too small"),
    "huge header": content("model.safetensors", (2**62).to_bytes(8, "little"), "header too l"),
    "offsets": content("model.safetensors", OFFSETS, "invalid shape, data type, or offset"),
    "rows too few": tensors("rows-*", lambda t: {k: v[:3] for k, v in t.items()}, "is [3"),
    "rows too narrow": tensors("rows-*", lambda t: {k: v[..., :7] for k, v in t.items()}, "7]"),
    "no momentum": tensors("rows-*", lambda t: {"weight": t["weight"]}, "momentum"),
    "rows of more": renamed("rows-0-99.safetensors", "lacks the classes from 99"),
    "rows backwards": renamed("rows-5-3.safetensors", "where the classes from 0 on are expected"),
    "rows twice": (twice, "where the classes from"),
    "no state": tensors("optimizer.*", lambda t: {}, "the optimiser's state of"),
    "state of one": tensors("optimizer.*", lambda t: dict([*t.items()][:1]), "is missing"),
    "short state": tensors(
        "optimizer.*", lambda t: {k: v.reshape(-1)[:1] for k, v in t.items()}, "is [1]"
    ),
    "other names": tensors("model.*", lambda t: {"a": torch.zeros(4)}, "does not fit"),
}


@pytest.fixture(scope="module")
def run_dir(shards_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("foreign") / "run"
    keys = {"rec": str(shards_dir), "precision": "fp32", "output": str(output), "max_steps": 4}
    ranks.run(1, runs.run, keys, 2)
    return keys


def test_each_is_refused_by_name(run_dir, tmp_path):
    said = ranks.run(1, refusals, run_dir, str(tmp_path))[0]
    wrong = {name: text for name, text in said.items() if CASES[name][1] not in text}
    assert not wrong and len(said) == len(CASES)


def refusals(keys, tmp_path):
    said = {}
    for number, (name, (change, _)) in enumerate(CASES.items()):
        output = pathlib.Path(tmp_path) / str(number)
        shutil.copytree(keys["output"], output)
        change(output / "checkpoints" / "step-2")
        keys_here = keys | {"output": str(output), "resume": str(output)}
        try:
            build.build(config.make(runs.BASE | keys_here), runs.here())
            said[name] = "taken"
        except (ValueError, OSError) as error:
            said[name] = str(error)
    return said


def test_a_nested_manifest_is_damaged(run_dir, tmp_path):
    """It is the only checkpoint: the run says how to go on and changes nothing."""
    output = tmp_path / "run"
    shutil.copytree(run_dir["output"], output)
    (output / "checkpoints" / "step-2" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(AssertionError, match="(?s)Damaged: .*step-2.*resume=none"):
        ranks.run(1, runs.run, run_dir | {"output": str(output)}, 2)
    assert os.listdir(output / "checkpoints") == ["step-2"]
