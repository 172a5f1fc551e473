"""What is frozen by name stands still, BatchNorm's statistics too; the rest learns, and resumes."""

from __future__ import annotations

import pytest
import torch

from recognition import config
from recognition.backbones import BACKBONES
from recognition.run import build
from recognition.weights import freezing
from tests import ranks
from tests.recognition import runs

FREEZE = ["layers.*", "conv_sep.*"]


@pytest.fixture
def keys(shards_dir, tmp_path):
    return {"rec": str(shards_dir), "output": str(tmp_path / "run"), "freeze": FREEZE}


def start(keys):
    """Every tensor of a run before its first step."""
    return runs.tensors(build.build(config.make(runs.BASE | keys), runs.here()))


def changed(after, before):
    return {
        name.removeprefix("backbone.") for name, value in after.items()
        if name.startswith("backbone.") and not torch.equal(value, before[name])
    }  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"sync_bn": True}, {"verify_every": 1}])
def test_parameters_and_statistics_stand_still(more, keys):
    """Also after a verification, which evaluates the network and sets it back to training."""
    keys |= {"max_steps": 3, "val_targets": ["heldout"]} | more
    before = ranks.run(2, start, keys)[0]
    moved = changed(ranks.run(2, runs.run, keys)[0], before)
    assert all(name.startswith("features.") for name in moved)
    # The embedding's two BatchNorms train and follow the data.
    assert {"features.layers.2.weight", "features.layers.3.running_mean"} <= moved


def test_statistics_follow_the_data_where_something_trains(keys):
    """A BatchNorm with its shift in training is not frozen."""
    keys |= {"max_steps": 2, "freeze": ["layers.0.layers.1.weight"]}
    before = ranks.run(1, start, keys)[0]
    moved = changed(ranks.run(1, runs.run, keys)[0], before)
    assert {"layers.0.layers.1.bias", "layers.0.layers.1.running_mean"} <= moved
    assert "layers.0.layers.1.weight" not in moved


def test_frozen_normalisation_uses_its_statistics():
    """In training, the frozen part computes what it computes in eval mode."""
    module = BACKBONES["r18"](embedding_size=8)
    freezing.freeze(module, ["conv1.*", "bn1.*", "prelu.*", "layer1.*"])
    freezing.train_mode(module)
    images = torch.rand(2, 3, 112, 112)
    early = torch.nn.Sequential(module.conv1, module.bn1, module.prelu, module.layer1)
    with torch.no_grad():
        found = early(images)
        assert torch.equal(found, early.eval()(images))
    assert module.layer2[0].bn1.training and module.features.training  # its bias trains


def test_a_resumed_run_is_the_unbroken_one(keys, tmp_path):
    unbroken = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "whole")})
    ranks.run(2, runs.run, keys, 3)
    resumed = ranks.run(2, runs.run, keys)
    for one, other in zip(unbroken, resumed, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_freezing_nothing_or_all_is_refused():
    with pytest.raises(ValueError, match="matches no parameter; they begin with layers"):
        freezing.freeze(BACKBONES["mbf_tiny"](), ["layer1.*"])
    with pytest.raises(ValueError, match="nothing to train"):
        freezing.freeze(BACKBONES["mbf_tiny"](), ["*"])
