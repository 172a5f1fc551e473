"""Training on W ranks is training on one; a resumed run is the unbroken one."""

from __future__ import annotations

import json

import pytest
import torch

from recognition import build, config, trainer
from tests import ranks
from tests.recognition import runs


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


@pytest.mark.parametrize(
    "keys",
    [{}, {"optimizer": "adamw", "lr": 1e-3}, {"accumulation": 2, "global_batch_size": 16}],
    ids=str,
)
def test_any_world_size_trains_the_same_model(shards_dir, tmp_path, keys):
    """DDP backbone + sampled head, BatchNorm synchronised, on 1, 2 and 4 processes, fp64."""
    ends = {}
    for world in (1, 2, 4):
        keys = keys | {
            "rec": str(shards_dir), "precision": "fp64", "sync_bn": True, "max_steps": 5,
            "output": str(tmp_path / f"w{world}"),
        }  # fmt: skip
        ends[world] = ranks.run(world, runs.run, keys)[0]
    for world in list(ends)[1:]:
        assert largest_difference(ends[1], ends[world]) < 1e-9


def test_uneven_ranks_train_the_same_model(shards_dir, tmp_path):
    keys = {
        "rec": str(shards_dir), "precision": "fp64", "sync_bn": True, "max_steps": 4,
        "global_batch_size": 11,
    }  # fmt: skip
    ends = [
        ranks.run(world, runs.run, keys | {"output": str(tmp_path / f"w{world}")})[0]
        for world in (1, 4)
    ]
    assert largest_difference(*ends) < 1e-9


def test_without_synchronised_batchnorm_the_models_differ(shards_dir, tmp_path):
    """The comparison above can fail: per-rank BatchNorm is another model."""
    keys = {"rec": str(shards_dir), "precision": "fp64", "max_steps": 2}
    ends = [
        ranks.run(world, runs.run, keys | {"output": str(tmp_path / f"w{world}")})[0]
        for world in (1, 2)
    ]
    assert largest_difference(*ends) > 1e-6


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"optimizer": "adamw", "lr": 1e-3, "accumulation": 2},
        {"precision": "bf16", "sync_bn": True},
        {"sample_rate": 1.0, "margin": "cosface", "num_subcenters": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("world", [2, 3])
def test_a_resumed_run_is_bit_identical(shards_dir, tmp_path, keys, world):
    keys = {"rec": str(shards_dir), "precision": "fp32"} | keys
    unbroken = ranks.run(world, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    ranks.run(world, runs.run, keys | {"output": str(tmp_path / "b")}, 3)
    resumed = ranks.run(world, runs.run, keys | {"output": str(tmp_path / "b")})[0]
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)
    assert [line["loss"] for line in steps(tmp_path / "a")][3:] == [
        line["loss"] for line in steps(tmp_path / "b")
    ]


def steps(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def test_resumed_at_another_world_size(shards_dir, tmp_path):
    """Saved on 2 ranks, continued on 1, 3 and 4: the same rows, samples, classes and first loss."""
    keys = {
        "rec": str(shards_dir), "precision": "fp32", "sync_bn": True, "output": str(tmp_path / "r"),
    }  # fmt: skip
    saved = ranks.run(2, runs.run, keys, 3)[0]
    losses = {world: ranks.run(world, runs.first_loss, keys)[0] for world in (1, 2, 3, 4)}
    for world in (1, 3, 4):
        loaded = ranks.run(world, built, keys)[0]
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[k], loaded[k]) for k in saved)
        assert abs(losses[world] - losses[2]) < 1e-5 * losses[2]


def built(keys):
    return runs.tensors(build.build(config.make(runs.BASE | keys), runs.here()))


def test_fifty_steps_after_a_resume_at_another_world_size(shards_dir, tmp_path):
    keys = {
        "rec": str(shards_dir), "precision": "fp64", "sync_bn": True, "max_steps": 53,
        "global_batch_size": 8, "log_every": 50, "lr": 0.02,
    }  # fmt: skip
    unbroken = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    ranks.run(2, runs.run, keys | {"output": str(tmp_path / "b")}, 3)
    resumed = ranks.run(3, runs.run, keys | {"output": str(tmp_path / "b")})[0]
    assert largest_difference(unbroken, resumed) < 1e-8


def test_the_metrics_have_what_scripts_rely_on(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "val_targets": ["heldout"], "output": str(tmp_path / "run")}
    ranks.run(2, runs.run, keys)
    records = steps(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert {"step", "epoch", "loss", "lr", "images_per_second"} <= record.keys()
    assert records[-1]["epoch"] == pytest.approx(6 * 12 / 128)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    verified = [r for line in lines if "verification" in (r := json.loads(line))]
    assert [r["step"] for r in verified] == [0, 6]
    assert 0 <= verified[0]["verification"]["heldout"]["accuracy_mean"] <= 1
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["world"], written["num_classes"]) == (2, 16)
    assert list((tmp_path / "run" / "events").glob("events*"))


def test_verification_is_the_same_on_any_number_of_ranks(shards_dir, tmp_path):
    """80 images over 3 ranks: 27 + 27 + 26."""
    keys = {"rec": str(shards_dir), "val_targets": ["heldout"], "precision": "fp32"}
    scores = [
        ranks.run(world, verified, keys | {"output": str(tmp_path / str(world))})[0]
        for world in (1, 3)
    ]
    assert scores[0]["accuracy_mean"] == scores[1]["accuracy_mean"]
    assert scores[0]["xnorm"] == pytest.approx(scores[1]["xnorm"], rel=1e-5)


def verified(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    with trainer.Logger(state.cfg.output, state.runtime.rank, 0) as logger:
        return trainer.verify(state, logger)["heldout"]


def test_a_non_finite_value_stops_every_rank_by_name(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run")}
    messages = ranks.run(2, poisoned, keys)
    assert messages[0] == messages[1]
    assert "step 2" in messages[0]
    assert "rank 1: gradient of the class rows" in messages[0] or "rank 1: " in messages[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def poisoned(keys):
    """After one good step, an inf in the class rows of rank 1 alone."""
    state = build.build(config.make(runs.BASE | keys), runs.here())
    loader = trainer.make_loader(state)
    batches = iter(loader)
    trainer.take_step(state, batches)
    before = {k: v.clone() for k, v in state.backbone.state_dict().items() if "num_b" not in k}
    if state.runtime.rank == 1:
        state.head.weight.data[:] = torch.inf
    trainer.take_step(state, batches)
    loader.close()
    after = state.backbone.state_dict()
    running = ("running_mean", "running_var")
    assert all(torch.equal(before[k], after[k]) for k in before if not k.endswith(running))
    try:
        state.guard.raise_if_found()
    except FloatingPointError as error:
        return str(error)


def test_fp16_overflow_skips_the_step_on_all_ranks(shards_dir, tmp_path):
    """A scale too large for one step: every rank skips it, halves the scale and agrees."""
    keys = {"rec": str(shards_dir), "precision": "fp16", "output": str(tmp_path / "run")}
    scales, moved, equal = zip(*ranks.run(2, overflowing, keys), strict=True)
    assert scales[0] == scales[1] == [2.0**126, 2.0**126 / 2]
    assert moved == (False, False)
    assert all(equal)


def overflowing(keys):
    state = build.build(config.make(runs.BASE | keys | {"global_batch_size": 4}), runs.here())
    if state.runtime.rank == 0:  # as if its shard alone had overflowed
        state.head.weight.data *= 1e-30
    state.parts.scaler.scale.fill_(2.0**126)
    before = [p.detach().clone() for p in state.backbone.parameters()]
    scales = [state.parts.scaler.scale.item()]
    with trainer.make_loader(state) as loader:
        trainer.take_step(state, iter(loader))
    scales.append(state.parts.scaler.scale.item())
    moved = any(
        not torch.equal(a, b) for a, b in zip(before, state.backbone.parameters(), strict=True)
    )
    state.guard.raise_if_found()  # tolerated: no error
    return scales, moved, state.step == 1


@pytest.mark.parametrize(
    "keys, error, words",
    [
        ({"network": "r51"}, KeyError, "one of r18"),
        ({"num_classes": 17}, ValueError, "num_classes=17, but"),
        ({"num_image": 1}, ValueError, "leave num_image out"),
        ({"val_targets": ["lfw"]}, FileNotFoundError, "heldout"),
        ({"global_batch_size": 1}, ValueError, "BatchNorm needs 2"),
        ({"rec": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"init_from": "/nowhere"}, FileNotFoundError, "init_from=/nowhere"),
        ({"resume": "/nowhere"}, FileNotFoundError, "resume=/nowhere"),
        ({"margin_args": {"margn": 1}}, KeyError, "did you mean margin"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_training(shards_dir, tmp_path, keys, error, words):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run")} | keys
    (kind, message), *_ = ranks.run(1, refused, keys)
    assert kind == error.__name__ and words in message


def refused(keys):
    try:
        build.build(config.make(runs.BASE | keys), runs.here())
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""
