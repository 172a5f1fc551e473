"""What the planner says of a run's length and its disk, against a run that was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.planner import course, predict
from recognition import config
from recognition.distributed import runtime
from recognition.run import build, trainer

RECIPE = str(Path(__file__).parents[3] / "launch" / "configs" / "demo.py")


@pytest.fixture(scope="module")
def trained(shards_dir, tmp_path_factory):
    """A run of five steps that keeps two checkpoints, and its configuration."""
    output = tmp_path_factory.mktemp("course") / "run"
    cfg = config.make(
        {
            "rec": str(shards_dir), "output": str(output), "network": "mbf_tiny", "max_steps": 5,
            "global_batch_size": 12, "embedding_size": 32, "num_subcenters": 2, "log_every": 1,
            "checkpoint_every": 1, "keep_checkpoints": 2, "optimizer": "adamw",
            "preflight_seconds": 0,
        }
    )  # fmt: skip
    with runtime.start() as here:
        state = build.build(cfg, here)
        trainer.train(state)
    return cfg, output, state.data


def test_a_checkpoint_is_as_large_as_planned(trained):
    cfg, output, data = trained
    newest = output / "checkpoints" / "step-5"
    written = sum(file.stat().st_size for file in newest.iterdir())
    planned = course.checkpoint_bytes(cfg, data.num_classes)
    assert planned <= written <= planned * 1.05 + 50_000  # headers, the manifest and the card


def test_steps_and_the_shards_that_are_there(trained):
    cfg, _, data = trained
    found = course.course(cfg, data.num_classes, data.num_images, 1, None)
    assert (found.steps, found.batch, found.batch_per_gpu, found.hours) == (5, 12, 12, None)
    assert found.epochs == pytest.approx(5 * 12 / data.num_images)
    records = sum(file.stat().st_size for file in Path(cfg.rec).glob("*.rec"))
    assert found.disk["shards"] == records > 0 and found.unmeasured == []
    assert "3 checkpoints" in found.disk  # the two that stay, and the one being written


@pytest.mark.parametrize(
    "keys, most",
    [
        ({"max_steps": 10, "checkpoint_every": 5, "keep_checkpoints": 3}, 2),
        ({"max_steps": 100, "checkpoint_every": 5, "keep_checkpoints": 3}, 4),
        ({"max_steps": 100, "checkpoint_every": 5, "keep_checkpoints": 3, "keep_every": 25}, 8),
        ({"max_steps": 11, "checkpoint_every": 5, "keep_checkpoints": 9}, 3),
    ],
)
def test_how_many_checkpoints_there_are_at_most(keys, most):
    assert course._num_checkpoints(config.make({"rec": "-", **keys}), keys["max_steps"]) == most


def test_the_command_says_hours_of_a_stated_and_of_a_measured_pace(trained, capsys):
    _, output, _ = trained
    words = [RECIPE, "--gpus", "2", "--classes", "300", "--images", "36000", "num_epochs=2",
             "global_batch_size=100", "--json"]  # fmt: skip
    assert predict.main([*words, "--images-per-second", "20"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text.splitlines()[-1])
    assert (report["steps"], report["batch_per_gpu"], report["hours"]) == (720, 50, 1.0)
    assert "720 steps of 100 images, 50 at once on a GPU: 2.00 epochs of 36000 images" in text
    assert "the pace was stated, not measured" in text and "6 kB an image" in text
    assert predict.main([*words, "--measured", str(output)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    pace = course.measured_pace(str(output), 2)
    assert report["hours"] == pytest.approx(72_000 / pace.images_per_second / 3600)
    assert predict.main([*words, "--measured", str(output), "--images-per-second", "2"]) == 1
    assert "keep one" in capsys.readouterr().err
    assert predict.main([*words, "--measured", str(output.parent)]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err
