"""Training on W ranks is training on one; a resumed run is the unbroken one."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from data_tools import shards
from recognition import config
from recognition.head.class_rows import ClassRows
from recognition.run import build, trainer, validate
from tests import ranks
from tests.conftest import command
from tests.recognition import runs


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        pytest.param(
            {"optimizer": "adamw", "lr": 1e-4, "accumulation": 2, "global_batch_size": 16},
            marks=pytest.mark.long,
        ),
    ],
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
    "world, keys",
    [
        pytest.param(3, {}, marks=pytest.mark.long),
        (2, {"optimizer": "adamw", "lr": 1e-3, "accumulation": 2}),
        (3, {"precision": "bf16", "sync_bn": True}),
        pytest.param(
            2,
            {"sample_rate": 1.0, "margin": "cosface", "num_subcenters": 2},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_identical(shards_dir, tmp_path, world, keys):
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


@pytest.mark.long
def test_fifty_steps_after_a_resume_at_another_world_size(shards_dir, tmp_path):
    keys = {
        "rec": str(shards_dir), "precision": "fp64", "sync_bn": True, "max_steps": 53,
        "global_batch_size": 8, "log_every": 50, "lr": 0.02,
    }  # fmt: skip
    unbroken = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    ranks.run(2, runs.run, keys | {"output": str(tmp_path / "b")}, 3)
    resumed = ranks.run(3, runs.run, keys | {"output": str(tmp_path / "b")})[0]
    assert largest_difference(unbroken, resumed) < 1e-8


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"crop_augmentation_prob": 0.4, "photometric_augmentation_prob": 0.4, "shuffle_block": 7},
    ],
    ids=str,
)
def test_dali_trains_the_same_model_to_the_bit(shards_dir, tmp_path, keys):
    """On the CPU both loaders decode with libjpeg-turbo; the DALI run is resumed by the other."""
    keys = {"rec": str(shards_dir), "precision": "fp32", "shuffle_window": 3} | keys
    cpu = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    with_dali = keys | {"output": str(tmp_path / "b"), "loader": "dali"}
    ranks.run(2, runs.run, with_dali, 3)
    resumed = ranks.run(2, runs.run, with_dali)[0]
    assert all(torch.equal(cpu[k], resumed[k]) for k in cpu)


def test_augmentations_and_block_shuffle_change_the_run(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run"), "resume": None}
    plain = ranks.run(1, runs.first_loss, keys)[0]
    for other in [{"low_res_augmentation_prob": 1.0}, {"shuffle_block": 4}]:
        assert ranks.run(1, runs.first_loss, keys | other)[0] != plain


@pytest.mark.parametrize("key", ["shuffle_block", "shuffle_window"])
def test_a_resume_in_another_order_is_refused(shards_dir, tmp_path, key):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run"), "shuffle_block": 8}
    ranks.run(1, runs.run, keys, 1)
    kind, message = ranks.run(1, refused, keys | {key: 16})[0]
    assert "ValueError" in kind and f"another {key}" in message


@pytest.fixture(scope="module")
def two_sets(shards_dir, tmp_path_factory):
    """The shared set, and another of 6 people."""
    other = tmp_path_factory.mktemp("other")
    command("-m", "data_tools", "synthesize", other / "faces", "--identities", 6, "--images", 5)
    command("-m", "data_tools", "pack", other / "faces", other / "set")
    return [str(shards_dir), str(other / "set")]


@pytest.mark.parametrize("shares", [pytest.param([], marks=pytest.mark.long), [2, 1]], ids=str)
def test_two_sets_train_the_same_model_at_any_world_size_and_resume(two_sets, tmp_path, shares):
    keys = {
        "rec": two_sets, "rec_shares": shares, "precision": "fp64", "sync_bn": True,
        "global_batch_size": 25, "accumulation": 2, "max_steps": 4,
    }  # fmt: skip
    one = ranks.run(1, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    ranks.run(2, runs.run, keys | {"output": str(tmp_path / "b")}, 3)
    two = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "b")})[0]
    assert one["rows"].shape[0] == 16 + 6  # classes of both
    assert largest_difference(one, two) < 1e-9
    last = steps(tmp_path / "a")[-1]
    if shares:  # of 100 samples, 66 and 34
        assert last["set_epoch"] == {two_sets[0]: 66 / 128, two_sets[1]: 34 / 30}
        message = ranks.run(2, refused, keys | {"rec_shares": [], "output": str(tmp_path / "b")})[0]
        assert "another rec_shares" in message[1]
    else:
        assert "set_epoch" not in last


def test_shares_must_fit_the_sets(two_sets, tmp_path):
    keys = {"rec": two_sets, "rec_shares": [1], "output": str(tmp_path / "run")}
    kind, message = ranks.run(1, refused, keys)[0]
    assert "ValueError" in kind and "for 2 data sets" in message


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
        return validate.verify(state, logger)["heldout"]


def test_a_non_finite_value_stops_every_rank_by_name(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run")}
    messages = ranks.run(2, poisoned, keys)
    assert messages[0] == messages[1]
    assert "step 2, which was not applied; rank 1: gradient of the class rows." in messages[0]
    assert "rank 0" not in messages[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def take_step_with_overflow_on_rank_1(state, batches):
    """A step whose class rows on rank 1 alone get an infinite gradient."""
    with pytest.MonkeyPatch.context() as patch:
        if state.runtime.rank == 1:
            infinite = lambda rows, *_: rows.gradient().fill_(torch.inf)  # noqa: E731
            patch.setattr(ClassRows, "add_gradient", infinite)
        trainer.take_step(state, batches)


def poisoned(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    with trainer.make_loader(state) as loader:
        batches = iter(loader)
        trainer.take_step(state, batches)
        before = moving(state)
        take_step_with_overflow_on_rank_1(state, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, moving(state), strict=True))
    try:
        state.guard.raise_if_found()
    except FloatingPointError as error:
        return str(error)


def moving(state):
    """What an optimiser step changes."""
    tensors = [*state.backbone.parameters(), state.head.weight]
    tensors += state.parts.heads[0].row_optimizer.state.values()
    tensors += [s["momentum_buffer"] for s in state.parts.optimizer.state.values()]
    return [tensor.detach().clone() for tensor in tensors]


def test_an_overflow_on_one_rank_skips_the_step_on_all(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "precision": "fp16", "output": str(tmp_path / "run")}
    results = ranks.run(2, overflowing, keys | {"global_batch_size": 4, "log_every": 1})
    assert [scale for scale, _ in results] == [32.0, 32.0]
    assert [skipped for _, skipped in results] == [True, True]


def overflowing(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    state.parts.scaler.scale.fill_(64.0)
    before = moving(state)
    with trainer.make_loader(state) as loader:
        take_step_with_overflow_on_rank_1(state, iter(loader))
    state.guard.raise_if_found()  # tolerated: no error
    skipped = all(torch.equal(a, b) for a, b in zip(before, moving(state), strict=True))
    return state.parts.scaler.scale.item(), skipped


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_skipped_first_step_leaves_no_trace(shards_dir, tmp_path, optimizer):
    """Skip one step, take the next: the parameters of a run that took the next one alone."""
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run"), "optimizer": optimizer}
    skipped, plain = ranks.run(1, skip_then_step, keys)[0]
    assert all(torch.equal(a, b) for a, b in zip(skipped, plain, strict=True))


def skip_then_step(keys):
    ends = []
    for skip in (True, False):
        state = build.build(config.make(runs.BASE | keys), runs.here())
        optimizer = state.parts.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for found in [1.0, 0.0] if skip else [0.0]:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
        ends.append([p.detach().clone() for p in parameters])
    return ends


def test_the_fp16_scale_does_not_reach_the_update(shards_dir, tmp_path):
    """One step at two scales: alike but for fp16's rounding; a scale left in would be 16-fold."""
    keys = {
        "rec": str(shards_dir), "precision": "fp16", "global_batch_size": 4, "clip_norm": None,
    }  # fmt: skip
    small, large = (
        ranks.run(1, scaled_step, keys | {"output": str(tmp_path / str(scale))}, scale)[0]
        for scale in (16.0, 256.0)
    )
    for a, b in zip(small, large, strict=True):
        assert (a - b).norm() <= 0.25 * a.norm() + 1e-6


def scaled_step(keys, scale):
    """How far the parameters and class rows moved."""
    state = build.build(config.make(runs.BASE | keys), runs.here())
    state.parts.scaler.scale.fill_(scale)
    tensors = [*state.backbone.parameters(), state.head.weight]
    before = [t.detach().clone() for t in tensors]
    with trainer.make_loader(state) as loader:
        trainer.take_step(state, iter(loader))
    moved = [t.detach() - b for t, b in zip(tensors, before, strict=True)]
    assert any(m.abs().max() > 0 for m in moved)
    return moved


def test_every_rank_holds_the_same_batchnorm_statistics(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run")}
    ours, theirs = ranks.run(2, statistics_after_a_step, keys)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def statistics_after_a_step(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    with trainer.make_loader(state) as loader:
        trainer.take_step(state, iter(loader))
    return [b.clone() for b in state.backbone.buffers() if b.is_floating_point()]


def test_ranks_that_see_different_data_are_refused_on_all(shards_dir, tmp_path):
    runs_on = [{"rec": str(shards_dir), "output": str(tmp_path / f"run{r}")} for r in (0, 1)]
    ranks.run(1, runs.run, runs_on[1], 1)  # a checkpoint that rank 1 alone will find
    messages = ranks.run(2, refused_apart, runs_on)
    assert messages[0] == messages[1]
    assert "resumed_from is [] on rank 0 and ['step-1'] on rank 1" in messages[0]


def refused_apart(runs_on):
    keys = runs_on[torch.distributed.get_rank()]
    return refused(keys)[1]


def test_another_world_size_keeps_the_global_batch(shards_dir, tmp_path):
    keys = {
        "rec": str(shards_dir), "output": str(tmp_path / "run"), "global_batch_size": None,
        "batch_size": 6,
    }  # fmt: skip
    ranks.run(2, runs.run, keys, 1)
    assert ranks.run(3, batch_of, keys) == [12] * 3
    ranks.run(3, runs.run, keys, 2)
    assert ranks.run(3, batch_of, keys) == [12] * 3  # still, when that run is resumed
    assert ranks.run(2, batch_of, keys | {"batch_size": 4}) == [8] * 2  # asked for: done


def batch_of(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    return state.cfg.global_batch(state.runtime.world)


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
    assert error.__name__ in kind and words in message


@pytest.mark.parametrize("same", [[True] * 9, [True] * 12, [False] * 12], ids=len)
def test_a_val_set_without_ten_folds_of_both_kinds_is_refused(shards_dir, tmp_path, same):
    copy = tmp_path / "shards"
    shutil.copytree(shards_dir, copy)
    image = shards.open(shards_dir)[0][1]
    (copy / "few.bin").write_bytes(pickle.dumps(([image] * (2 * len(same)), same)))
    keys = {"rec": str(copy), "val_targets": ["few"], "output": str(tmp_path / "run")}
    kind, message = ranks.run(1, refused, keys)[0]
    assert "ValueError" in kind and "few.bin has" in message


def refused(keys):
    """The names of the error's classes, and what it says."""
    try:
        build.build(config.make(runs.BASE | keys), runs.here())
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return [], ""
