"""Runs with losses that keep state: stopped in the middle of an epoch and continued, at the same
and at another number of processes; and what they write."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recognition import checkpoint, config
from recognition.distributed import collectives
from recognition.distributed.runtime import Runtime
from recognition.run import build, trainer
from tests import ranks
from tests.recognition import runs

# 128 images in batches of 24: the first epoch ends in step 6, the stop after step 3 is inside it.
KEYS = {
    "precision": "fp64", "sync_bn": True, "global_batch_size": 24, "max_steps": 8, "lr": 0.02,
    "log_every": 100,
}  # fmt: skip

QUICK = ["jamsface, batch, AdamW"]

CASES = {
    "adaface": {"margin": "adaface", "margin_args": {"t_alpha": 0.3}},
    "adacos, accumulated": {"margin": "adacos", "accumulation": 2},
    "curricularface": {"margin": "curricularface", "margin_args": {"momentum": 0.3}},
    "kappaface": {"margin": "kappaface"},
    "kappaface, momentum encoder": {
        "margin": "kappaface", "margin_args": {"features": "momentum"},
    },
    "jamsface": {"margin": "jamsface"},
    "jamsface, batch, AdamW": {
        "margin": "jamsface", "margin_args": {"scope": "batch"}, "optimizer": "adamw", "lr": 1e-3,
    },
    "elasticface+": {"margin": "elasticface", "margin_args": {"plus": True}},
    "uniface": {"margin": "uniface"},
    "arcface, 3 sub-centres": {"margin": "arcface", "num_subcenters": 3},
}  # fmt: skip


@pytest.fixture
def keys(shards_dir, tmp_path):
    return KEYS | {"rec": str(shards_dir), "output": str(tmp_path / "run")}


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.long) for c in CASES]
)
def test_stopped_mid_epoch_on_four_and_continued_on_two(case, keys, tmp_path):
    keys |= CASES[case]
    unbroken = ranks.run(4, runs.run, keys | {"output": str(tmp_path / "unbroken")})[0]
    ranks.run(4, runs.run, keys, 3)
    continued = ranks.run(2, runs.run, keys)[0]
    assert unbroken.keys() == continued.keys()
    for name, value in unbroken.items():
        torch.testing.assert_close(
            continued[name].double(), value.double(), rtol=1e-8, atol=1e-8, msg=name
        )


@pytest.mark.parametrize("case", ["kappaface, momentum encoder", "uniface"])
def test_a_resumed_run_is_bit_identical(case, keys, tmp_path):
    keys |= CASES[case] | {"precision": "fp32", "sync_bn": False}
    unbroken = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "unbroken")})[0]
    ranks.run(2, runs.run, keys, 3)
    continued = ranks.run(2, runs.run, keys)[0]
    for name, value in unbroken.items():
        assert torch.equal(continued[name], value), name


def test_what_a_checkpoint_holds_of_a_loss(keys):
    ranks.run(2, runs.run, keys | CASES["kappaface, momentum encoder"], 3)
    files = json.load(open(f"{checkpoint.newest(keys['output'])}/manifest.json"))
    assert "encoder.safetensors" in files["files"]
    assert {"margin.psi", "margin.seen", "margin.feature_sum"} <= set(
        files["heads"][0]["row_state"]
    )


def test_another_loss_cannot_take_the_state(keys):
    ranks.run(1, runs.run, keys | CASES["adaface"], 1)
    other = config.make(runs.BASE | keys | CASES["curricularface"])
    with pytest.raises(
        ValueError, match=r"margin_state .*margin\.mean.* there, .*margin\.t.* here"
    ):
        build.build(other, _alone())
    softmax = config.make(runs.BASE | keys | {"margin": "softmax"})
    with pytest.raises(ValueError, match="saved with margin=adaface, .*optimizer=sgd"):
        build.build(softmax, _alone())


def test_a_slow_copy_cannot_come_in_the_middle(keys):
    """A checkpoint without one is whole: nobody is told to remove it."""
    ranks.run(1, runs.run, keys | CASES["kappaface"], 1)
    momentum = config.make(runs.BASE | keys | CASES["kappaface, momentum encoder"])
    with pytest.raises(ValueError, match="slow encoder False there, True here.*init_from="):
        build.build(momentum, _alone())


def test_another_loss_with_state_of_the_same_name_is_refused(keys):
    ranks.run(1, runs.run, keys | CASES["uniface"], 1)
    other = config.make(runs.BASE | keys | {"margin": "sphereface2"})
    with pytest.raises(ValueError, match="margin UniFace there, SphereFace2 here"):
        build.build(other, _alone())


def test_a_margin_by_class_size_follows_its_arguments_on_resume(keys):
    ranks.run(1, runs.run, keys | {"margin": "dynamicarcface"}, 1)
    changed = {"margin": "dynamicarcface", "margin_args": {"low": 0.3, "high": 0.3}}
    state = build.build(config.make(runs.BASE | keys | changed), _alone())
    assert state.head.margin.margins.tolist() == pytest.approx([0.3] * 16)


def test_sub_centres_of_a_checkpoint_without_votes_resume(keys, monkeypatch):
    keys |= CASES["arcface, 3 sub-centres"]
    whole = checkpoint.HeadParts.rows
    cfg = config.make(runs.BASE | keys)
    state = build.build(cfg, _alone())
    with monkeypatch.context() as patch:  # as before there were votes
        rows = whole(state.parts.heads[0])
        del rows["votes"]
        patch.setattr(checkpoint.HeadParts, "rows", lambda parts: rows)
        runs.save_here(state)
    resumed = build.build(cfg, _alone())
    assert torch.equal(resumed.head.weight, state.head.weight)
    assert resumed.head.votes.sum() == 0


def test_a_slow_encoder_that_is_not_finite_stops_the_run(keys):
    state = build.build(
        config.make(runs.BASE | keys | CASES["kappaface, momentum encoder"]), _alone()
    )
    next(state.parts.encoder.parameters()).fill_(torch.inf)
    with trainer.make_loader(state) as loader:
        trainer.take_step(state, iter(loader))
    with pytest.raises(FloatingPointError, match="slow encoder's embeddings of micro-step 0"):
        state.guard.raise_if_found()
    assert state.head.margin.seen.sum() == 0


def _alone():
    return Runtime(torch.device("cpu"), collectives.world_group(), 0, 1)


def test_the_log_says_what_a_user_of_the_loss_looks_at(keys):
    ranks.run(2, runs.run, keys | CASES["kappaface"] | {"log_every": 1})
    records = [json.loads(line) for line in open(f"{keys['output']}/metrics.jsonl")]
    steps = [record for record in records if "loss" in record]
    assert {"cos_target", "margin", "psi_mean"} <= steps[0]["head"].keys()
    (end,) = [record for record in records if "epoch_end" in record]
    assert end["step"] == 6 and end["epoch_end"]["classes_seen"] == 16
    assert steps[4]["head"]["psi_mean"] == 1.0 != steps[6]["head"]["psi_mean"]
    events = EventAccumulator(f"{keys['output']}/events").Reload()
    assert "head/psi" in events.Tags()["histograms"]
    assert "head/psi_mean" in events.Tags()["scalars"]
    (histogram,) = events.Histograms("head/psi")
    assert sum(histogram.histogram_value.bucket) == 16


def test_the_slow_encoder(keys):
    """After each step a tenth of the way to the backbone, BatchNorm's statistics its own; and its
    features are what the classes' sums are made of."""
    cfg = config.make(runs.BASE | keys | CASES["kappaface, momentum encoder"])
    state = build.build(cfg, _alone())
    slow = {name: p.clone() for name, p in state.parts.encoder.named_parameters()}
    assert not state.parts.encoder.training
    with trainer.make_loader(state) as loader:
        batches = iter(loader)
        trainer.take_step(state, batches)
        for name, p in state.parts.encoder.named_parameters():
            fast = state.backbone.get_parameter(name).detach()
            torch.testing.assert_close(p, slow[name].lerp(fast, 0.1), rtol=1e-12, atol=1e-12)
        buffers = dict(state.backbone.named_buffers())
        assert all(torch.equal(b, buffers[n]) for n, b in state.parts.encoder.named_buffers())
        assert any(b.is_floating_point() and b.std() > 0 for b in buffers.values())
        before = state.head.margin.feature_sum.clone()
        seen = {}
        state.parts.encoder.register_forward_hook(lambda *io: seen.update(x=io[-1].clone()))
        batch = next(batches)
        trainer.take_step(state, iter([batch]))
    unit = torch.nn.functional.normalize(seen["x"])
    added = torch.zeros_like(before).index_add_(0, batch.labels, unit)
    torch.testing.assert_close(state.head.margin.feature_sum - before, added, rtol=1e-9, atol=1e-9)
