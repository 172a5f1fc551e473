"""What the start of a training says of its data and settings, with the counts."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools import shards
from data_tools.recordio import Header, Writer
from recognition import config
from recognition.run import build, sanity
from tests import ranks
from tests.recognition import runs


@pytest.fixture
def labelled(shards_dir, tmp_path):
    """An InsightFace directory of images with these labels."""

    def write(labels, num_classes):
        images = shards.open(shards_dir)
        with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
            for key, label in enumerate(labels):
                writer.write(key, Header(0, float(label), key, 0), images[key % len(images)][1])
        (tmp_path / "property").write_text(f"{num_classes},112,112\n")
        return {"rec": str(tmp_path), "output": str(tmp_path / "r")}

    return write


def said(keys):
    return sanity.lines(build.build(config.make(runs.BASE | keys), runs.here()))


def test_a_usual_set_and_settings_need_no_word(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "r")}
    assert ranks.run(1, said, keys) == [[]]


@pytest.mark.parametrize(
    "labels, num_classes, keys, words",
    [
        (np.arange(24) % 4, 4, {"global_batch_size": 30}, "24 images are fewer than the batch of"),
        (np.arange(24) % 4 * 9, 30, {}, "26 of 30 classes have no image"),
        (np.arange(24) % 4 // 4, 3, {}, "1 class has images"),
        ([*range(20), *[20] * 4], 21, {}, "warning: 20 of 21 classes with images have a single"),
        ([0] + [1, 2] * 10, 3, {}, "1 of 3 classes with images have a single image"),
    ],
    ids=["small", "gaps", "one class", "single images", "one single image"],
)  # fmt: skip
def test_the_labels(labelled, labels, num_classes, keys, words):
    [lines] = ranks.run(1, said, labelled(labels, num_classes) | keys)
    assert any(words in line for line in lines), lines


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"lr": 5.0}, "lr=5 is far above the usual 0.1 of optimizer=sgd"),
        ({"lr": 0.1, "optimizer": "adamw"}, "lr=0.1 is far above the usual 0.001"),
        ({"lr": 1e-3}, "lr=0.001 is far below"),
        ({"margin_args": {"scale": 4.0}}, "scale=4 is far from the usual 64 of ArcFace"),
        ({"freeze": ["features.layers.2.*"]}, "freeze: 1 of "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_settings(shards_dir, tmp_path, keys, words):
    [lines] = ranks.run(1, said, {"rec": str(shards_dir), "output": str(tmp_path / "r")} | keys)
    assert any(words in line for line in lines), lines
