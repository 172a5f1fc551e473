"""Which checkpoints stay."""

from __future__ import annotations

import os

import pytest

from recognition import config
from recognition.checkpoint import Keep
from recognition.checkpoint.writing import superfluous
from recognition.run import build
from tests import ranks
from tests.recognition import runs

STEPS = [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    "keep, scores, stay",
    [
        (Keep(2), {}, [50, 60]),
        (Keep(9), {}, STEPS),
        (Keep(1, every=20), {}, [20, 40, 60]),
        (Keep(1, best="lfw"), {10: 0.9, 20: 0.95, 60: 0.8}, [20, 60]),
        (Keep(1, best="lfw"), {20: 0.9, 30: 0.9}, [30, 60]),  # equal: the newer
        (Keep(1, best="lfw"), {}, [60]),  # none was verified
        (Keep(1, best="lfw"), {60: 0.7}, [60]),
        (Keep(2, every=30, best="lfw"), {10: 0.5, 30: 0.4}, [10, 30, 50, 60]),
    ],
)
def test_what_stays(keep, scores, stay):
    gone = superfluous(STEPS, scores, keep)
    assert [step for step in STEPS if step not in gone] == stay


def test_the_newest_ones_are_kept_while_training(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run")}
    ranks.run(1, runs.run, keys | {"checkpoint_every": 1, "keep_checkpoints": 2})
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-5", "step-6"]


def test_of_a_link_the_link_alone_is_removed(shards_dir, tmp_path):
    """A checkpoint that was moved to another disk, and two names that are in the way."""
    keys = {
        "rec": str(shards_dir), "output": str(tmp_path / "run"), "max_steps": 3,
        "checkpoint_every": 1, "keep_checkpoints": 1,
    }  # fmt: skip
    ranks.run(1, runs.run, keys, 1)
    checkpoints, elsewhere = tmp_path / "run" / "checkpoints", tmp_path / "elsewhere"
    (checkpoints / "step-1").rename(elsewhere)
    (checkpoints / "step-1").symlink_to(elsewhere)
    (checkpoints / "step-2.partial").symlink_to(elsewhere)
    (checkpoints / "step-3.partial").write_text("")
    ranks.run(1, runs.run, keys)
    assert [path.name for path in checkpoints.iterdir()] == ["step-3"]
    assert (elsewhere / "manifest.json").exists() and len(list(elsewhere.iterdir())) == 4


def test_the_best_and_every_third(shards_dir, tmp_path, monkeypatch):
    """The score of each step is given: the second is the best."""
    keys = {
        "rec": str(shards_dir), "output": str(tmp_path / "run"), "val_targets": ["heldout"],
        "checkpoint_every": 1, "verify_every": 1, "keep_checkpoints": 1, "keep_every": 3,
        "keep_best": "heldout", "max_steps": 5,
    }  # fmt: skip
    ranks.run(1, run_with_scores, keys, [0.1, 0.5, 0.9, 0.6, 0.7, 0.2])
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-2", "step-3", "step-5"]
    ranks.run(1, run_with_scores, keys | {"max_steps": 7}, [0.95, 0.2])  # also after a resume
    found = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert found == ["step-3", "step-6", "step-7"]  # step 6 is the best now, and a third


def run_with_scores(keys, scores):
    """A run whose verification sets give `scores` one after the other."""
    from eval.protocols import lfw

    given = iter(scores)
    with pytest.MonkeyPatch.context() as patch:
        score = lfw.score
        patch.setattr(lfw, "score", lambda *a: score(*a) | {"accuracy_mean": next(given)})
        runs.run(keys)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"keep_best": "lfw"}, "keep_best=lfw is not one of val_targets=heldout"),
        (
            {"keep_best": "heldout", "checkpoint_every": 5, "verify_every": 2},
            "checkpoint_every=5 must be a multiple of verify_every=2",
        ),
    ],
)
def test_a_best_that_nobody_measures_is_refused(shards_dir, tmp_path, keys, words):
    keys |= {"rec": str(shards_dir), "output": str(tmp_path / "run"), "val_targets": ["heldout"]}
    (message,) = ranks.run(1, refused, keys)
    assert words in message


def refused(keys):
    try:
        build.build(config.make(runs.BASE | keys), runs.here())
    except ValueError as error:
        return str(error)
