"""No checkpoint is lost, written over or taken for absent, whatever the disk and the signals do."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal

import pytest
import torch

from recognition import checkpoint, config
from recognition.checkpoint import directory, manifest, writing
from recognition.distributed import preemption
from recognition.run import build, trainer
from tests import ranks
from tests.recognition import runs


@pytest.fixture(scope="module")
def trained(shards_dir, tmp_path_factory):
    """Keys of a run that has checkpoints of steps 1 and 2, of six."""
    keys = {
        "rec": str(shards_dir), "precision": "fp32", "checkpoint_every": 1, "keep_checkpoints": 9,
        "output": str(tmp_path_factory.mktemp("lost") / "run"),
    }  # fmt: skip
    for step in (1, 2):
        ranks.run(1, runs.run, keys, step)
    return keys


@pytest.fixture
def keys(trained, tmp_path):
    shutil.copytree(trained["output"], tmp_path / "run")
    return trained | {"output": str(tmp_path / "run")}


def root_of(keys):
    return pathlib.Path(keys["output"], "checkpoints")


def contents(keys):
    """Every file of a run, links followed, with what is in it."""
    found = {}
    for folder, _, names in os.walk(keys["output"]):
        for name in names:
            path = pathlib.Path(folder, name)
            if name != ".lock" and path.exists():
                found[path] = path.read_bytes()
    return found


def start(keys):
    """The step that a run would go on from, or its error."""
    try:
        return build.build(config.make(runs.BASE | keys), runs.here()).step
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def unreadable(path):
    """Put a link to itself in its place: its status is an error, ELOOP, and not "absent"."""
    aside = path.with_name("kept-" + path.name)
    path.rename(aside)
    path.symlink_to(path.name)
    return lambda: (path.unlink(), aside.rename(path))


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_is_no_directory_is_not_taken_for_an_absent_one(keys, kind):
    """A run whose `checkpoints` was replaced does not begin anew, to fail at its first save."""
    root_of(keys).rename(root_of(keys).with_name("moved"))
    if kind == "file":
        root_of(keys).write_bytes(b"")
    else:
        root_of(keys).symlink_to("unmounted")
    (error,) = map(str, ranks.run(1, start, keys))
    assert error.startswith("NotADirectoryError") and str(root_of(keys)) in error, error


@pytest.mark.parametrize(
    "name", ["", "step-2", "step-2/manifest.json", "step-2/model.safetensors", "step-1"]
)
@pytest.mark.parametrize("world", [1, 2])
def test_an_unreadable_path_ends_the_start_and_changes_nothing(keys, name, world):
    """It is neither absent nor damaged: no step before it is taken, no name changes."""
    path = root_of(keys) / name
    restore = unreadable(path)
    names = sorted(os.listdir(root_of(keys).parent))
    for error in ranks.run(world, start, keys):
        # What is in front of an older one is enough, unless all are listed.
        assert isinstance(error, str) and str(path) in error and "Damaged" not in error
    assert sorted(os.listdir(root_of(keys).parent)) == names
    restore()
    assert ranks.run(world, start, keys) == [2] * world


@pytest.mark.parametrize("name", ["step-2", "step-2/manifest.json", "step-2/model.safetensors"])
def test_a_passing_enoent_is_not_absence(keys, name, monkeypatch):
    """The directory lists what cannot be opened: once, and then it is there again."""
    path, plain, told = str(root_of(keys) / name), os.stat, []

    def stat(asked, *arguments, **options):
        if os.fspath(asked) == path and len(told) < 2:
            told.append(asked)
            raise FileNotFoundError(2, "No such file or directory", path)
        return plain(asked, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match="lists it") as caught:
        directory.missing(path)
    assert caught.value.filename == path and not directory.missing(path)


@pytest.mark.parametrize(
    "names",
    [
        ["step-2.partial"],
        ["step-2.former.partial"],
        ["step-2.partial", "step-2.former.partial"],
        ["step-2", "step-2.former.partial"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("older", [True, False], ids=["beside step-1", "alone"])
def test_a_complete_copy_under_any_name_is_taken(keys, names, older):
    root = root_of(keys)
    (root / "step-2").rename(root / "kept")
    for name in names:
        shutil.copytree(root / "kept", root / name)
    shutil.rmtree(root / "kept")
    if not older:
        shutil.rmtree(root / "step-1")
    assert checkpoint.find(keys["output"])  # for those who only read
    assert ranks.run(1, start, keys) == [2]
    assert (root / "step-2" / "manifest.json").exists()
    ranks.run(1, runs.run, keys, 3)
    assert sorted(os.listdir(root)) == ["step-1"] * older + ["step-2", "step-3"]


def test_an_incomplete_copy_is_not(keys):
    root = root_of(keys)
    shutil.copytree(root / "step-2", root / "step-3.partial")  # of another step than its name
    shutil.copytree(root / "step-2", root / "step-4.partial")
    os.remove(root / "step-4.partial" / "manifest.json")
    assert ranks.run(1, start, keys) == [2]
    ranks.run(1, runs.run, keys, 3)
    assert not list(root.glob("*.partial")) and (root / "step-3" / "manifest.json").exists()


def test_what_verifies_is_not_cleared_before_its_successor_has_its_name(tmp_path, keys):
    root = root_of(keys)
    (root / "step-2").rename(root / "step-2.partial")
    assert writing.prepare(str(root / "step-3"))
    assert sorted(os.listdir(root)) == ["step-1", "step-2", "step-3.partial"]


def test_no_step_is_written_over_by_a_run_that_did_not_load_it(keys):
    before = contents(keys)
    with pytest.raises(FileExistsError, match="did not resume from it"):
        writing.prepare(str(root_of(keys) / "step-2"), {str(root_of(keys) / "step-1")})
    assert contents(keys) == before


# --- Stopped during a verification ----------------------------------------------------------------


def stop_in_verification(keys):
    """A run that hears SIGTERM in its next verification after the first step."""
    plain = trainer.verify

    def verify(state, *arguments):
        if state.step:
            raise preemption.Interrupted(signal.SIGTERM)
        return plain(state, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "verify", verify)
        state = build.build(config.make(runs.BASE | keys), runs.here())
        with pytest.raises(preemption.Stopped):
            trainer.train(state)
    return state.step


@pytest.mark.parametrize("background", [True, False])
def test_a_run_stopped_in_an_owed_verification_does_not_save_again(
    shards_dir, tmp_path, background
):
    keys = {
        "rec": str(shards_dir), "precision": "fp32", "output": str(tmp_path / "run"),
        "val_targets": ["heldout"], "verify_every": 2, "checkpoint_every": 4, "max_steps": 4,
        "keep_best": "heldout", "save_async": background,
    }  # fmt: skip
    assert ranks.run(2, stop_in_verification, keys) == [2, 2]
    path = root_of(keys) / "step-2"
    assert json.loads((path / "manifest.json").read_text())[checkpoint.PENDING] is True
    before = {each.name: (each.stat().st_ino, each.stat().st_mtime_ns) for each in path.iterdir()}
    assert ranks.run(2, stop_in_verification, keys) == [2, 2]
    assert before == {e.name: (e.stat().st_ino, e.stat().st_mtime_ns) for e in path.iterdir()}
    assert os.listdir(root_of(keys)) == ["step-2"]
    ranks.run(2, runs.run, keys)
    saved = checkpoint.read_manifest(str(path))
    assert checkpoint.PENDING not in saved and "heldout" in saved["metrics"]
    checkpoint.verify(str(path), ranks_alone())


def ranks_alone():
    from recognition.distributed import collectives

    return collectives.world_group()


def test_the_last_step_stopped_in_its_verification_is_verified_at_the_next_start(
    shards_dir, tmp_path
):
    keys = {
        "rec": str(shards_dir), "precision": "fp32", "output": str(tmp_path / "run"),
        "val_targets": ["heldout"], "verify_every": 4, "max_steps": 3,
    }  # fmt: skip
    assert ranks.run(1, stop_in_verification, keys) == [3]
    assert checkpoint.read_manifest(str(root_of(keys) / "step-3"))[checkpoint.PENDING]
    ranks.run(1, runs.run, keys)
    assert checkpoint.read_manifest(str(root_of(keys) / "step-3"))["metrics"]


def test_a_step_that_is_not_yet_verified_is_not_pruned(keys):
    """Until it is: then a better one takes its place."""
    for step, score in ((1, 0.5), (2, 0.9)):
        path = str(root_of(keys) / f"step-{step}")
        manifest.amend(path, {"metrics": {"lfw": score}})
    manifest.amend(str(root_of(keys) / "step-1"), {"metrics": {}, checkpoint.PENDING: True})
    keep = checkpoint.Keep(1, best="lfw")
    writing.prune(keys["output"], 2, keep)
    assert sorted(os.listdir(root_of(keys))) == ["step-1", "step-2"]
    manifest.amend(
        str(root_of(keys) / "step-1"), {"metrics": {"lfw": 0.8}, checkpoint.PENDING: None}
    )
    writing.prune(keys["output"], 2, keep)
    assert os.listdir(root_of(keys)) == ["step-2"]


def test_an_amended_checkpoint_still_continues(keys, trained, tmp_path):
    manifest.amend(str(root_of(keys) / "step-2"), {"metrics": {"lfw": 0.5}})
    shutil.copytree(trained["output"], tmp_path / "plain")
    plain = ranks.run(1, runs.run, trained | {"output": str(tmp_path / "plain")})[0]
    amended = ranks.run(1, runs.run, keys)[0]
    assert all(torch.equal(plain[name], amended[name]) for name in plain)
