"""What follows another number of processes, by each rule."""

from __future__ import annotations

import pytest

from recognition import config
from recognition.run.schedule import RescaledSchedule, Schedule, adapt


def plan(world, saved_world, **keys):
    """The plan of a run that began on 4 processes and is now on `world`."""
    cfg = config.make({"rec": "x", **keys})
    first = adapt(cfg, None, 4)
    facts = {"first_batch": first.first_batch, "first_rows": first.first_rows}
    if saved_world == 4:
        before = cfg
    else:
        manifest = {
            "world": 4, "global_batch": cfg.global_batch(4), "config": vars(cfg) | facts,
        }  # fmt: skip
        before = adapt(cfg, manifest, saved_world).cfg
    manifest = {
        "world": saved_world, "global_batch": before.global_batch(saved_world),
        "config": vars(before) | facts,
    }  # fmt: skip
    return adapt(cfg, manifest, world)


@pytest.mark.parametrize("saved_world", [4, 2])
@pytest.mark.parametrize("keys", [{"batch_size": 8}, {"global_batch_size": 32}], ids=str)
@pytest.mark.parametrize(
    "rule, world, batch, accumulation",
    [
        ("batch_size", 3, 32, 1), ("batch_size", 1, 32, 1), ("batch_size", 8, 32, 1),
        ("accumulation", 3, 32, 2), ("accumulation", 1, 32, 4), ("accumulation", 8, 32, 1),
        ("accumulation", 4, 32, 1), ("lr", 3, 24, 1), ("lr", 8, 64, 1), ("lr", 4, 32, 1),
        ("auto", 2, 32, 2),
    ],
)  # fmt: skip
def test_the_rules(saved_world, keys, rule, world, batch, accumulation):
    found = plan(world, saved_world, elastic=rule, **keys)
    assert found.cfg.global_batch(world) == batch and found.cfg.accumulation == accumulation
    assert (found.first_batch, found.first_rows) == (32, 8)
    assert bool(found.message) == (world != saved_world)


def test_with_synchronised_statistics_auto_leaves_the_micro_batch_whole():
    assert plan(2, 4, batch_size=8, sync_bn=True).cfg.accumulation == 1


def test_a_batch_typed_anew_is_the_batch():
    cfg = config.make({"rec": "x", "batch_size": 5})
    old = config.make({"rec": "x", "batch_size": 8})
    manifest = {"world": 4, "global_batch": 32, "config": vars(old)}
    assert adapt(cfg, manifest, 2).cfg.global_batch(2) == 10


def test_the_schedule_goes_by_images_where_the_batch_changes():
    first = Schedule("polynomial", 0.4, total_steps=100)
    now = RescaledSchedule(first, first_batch=32, batch=16, step=50, samples_seen=50 * 32)
    assert now.total_steps == 150  # the other 1600 images
    assert now.lr_at(50) == pytest.approx(0.2 / 2) and now.lr_at(150) == 0
    assert now.lr_at(100) == pytest.approx(0.1 / 2)
    same = RescaledSchedule(first, 32, 32, 50, 50 * 32)
    assert [same.lr_at(s) for s in range(50, 101)] == [first.lr_at(s) for s in range(50, 101)]
