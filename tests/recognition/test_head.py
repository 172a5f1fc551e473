"""The head against the dense truth: loss, dEmbeddings and dWeight, at every world size."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recognition.head import PartialFC
from recognition.losses import MARGINS
from tests import ranks, reference

C, D = 103, 16  # C divides by no world size above 1

MARGIN_CASES = {
    "softmax": ({}, reference.softmax),
    "cosface": ({"margin": 0.35}, functools.partial(reference.cosface, m=0.35)),
    "arcface": ({}, functools.partial(reference.arcface, m=0.5)),
    "arcface-fallback": ({"overflow": "fallback"}, functools.partial(reference.fallback, m=0.5)),
    "arcface-easy": ({"overflow": "easy"}, functools.partial(reference.easy, m=0.5)),
    "sphereface": ({}, functools.partial(reference.combined, m1=1.35, m2=0.0, m3=0.0)),
    "combined": (
        {"m1": 0.9, "m2": 0.4, "m3": 0.15},
        functools.partial(reference.combined, m1=0.9, m2=0.4, m3=0.15),
    ),
}


def draw(rows: list[int], num_subcenters: int = 1, owned_by_first: bool = False):
    """Embeddings and labels per rank and the class matrix; rows of every difficulty."""
    generator = torch.Generator().manual_seed(11)
    shape = (C, D) if num_subcenters == 1 else (C, num_subcenters, D)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(sum(rows), D, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 20 if owned_by_first else C, (sum(rows),), generator=generator)
    x[0] = weight.view(C, -1, D)[labels[0], 0] + 0.1 * x[0]  # near its centre
    x[1] = -weight.view(C, -1, D)[labels[1], 0] + 0.1 * x[1]  # opposite: past every margin
    if len(labels) > 4:
        labels[3] = labels[4]  # a class twice in one batch
    return x, labels, weight


def step(margin, arguments, rows, sample_rate, num_subcenters=1, owned_by_first=False, piece=None):
    """One rank's loss, gradient of its embeddings, sampled classes and their gradient."""
    x, labels, weight = draw(rows, num_subcenters, owned_by_first)
    rank = dist.get_rank()
    head = PartialFC(
        MARGINS[margin](**arguments), D, C, sample_rate, num_subcenters, seed=5
    ).double()
    head.piece = piece
    head.weight.data.copy_(weight[slice(*head.shard)])
    local = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    local_x = x[local].clone().requires_grad_()
    even = None if len(set(rows)) == 1 else rows
    loss = head(local_x, labels[local], even)
    loss.backward()
    assert head.weight.grad is None
    return loss.detach(), local_x.grad, head.sampled_classes, head.sampled_grad


def check(world, case, sample_rate, rows=None, num_subcenters=1, **options):
    name, (arguments, target) = case, MARGIN_CASES[case]
    if options.pop("straight_through", False):
        arguments = arguments | {"gradient": "straight_through"}
        target = reference.straight_through(target)
    threshold = options.pop("threshold", 0.0)
    if threshold:
        arguments = arguments | {"interclass_filtering_threshold": threshold}
    rows = rows or [12 // world] * world
    results = ranks.run(
        world, step, name.split("-")[0], arguments, rows, sample_rate, num_subcenters,
        options.get("owned_by_first", False), options.get("piece"),
    )  # fmt: skip
    x, labels, weight = draw(rows, num_subcenters, options.get("owned_by_first", False))
    classes = torch.cat([r[2] for r in results])
    assert len(classes.unique()) == len(classes)
    assert np.isin(labels, classes).all()
    loss, grad_x, grad_weight = reference.partial_fc(
        x, weight, labels, classes, target, threshold=threshold
    )
    for got in results:
        assert abs(got[0] - loss) < 1e-12 * max(1, abs(loss))
    # DistributedDataParallel divides by the world size what the gather multiplied.
    torch.testing.assert_close(
        torch.cat([r[1] for r in results]) / world, grad_x, rtol=1e-12, atol=1e-12
    )
    got_weight = torch.zeros_like(grad_weight).index_copy_(
        0, classes, torch.cat([r[3] for r in results])
    )
    torch.testing.assert_close(got_weight, grad_weight, rtol=1e-12, atol=1e-12)
    return classes


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", MARGIN_CASES)
def test_equals_the_dense_layer(case, world, sample_rate):
    check(world, case, sample_rate)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", ["arcface", "combined", "cosface"])
def test_straight_through_equals_the_dense_layer(case, world):
    check(world, case, 0.3, straight_through=True)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("rows", [[5, 7], [1, 6, 2, 3], [0, 4, 0, 9]], ids=str)
def test_ranks_may_hold_different_numbers_of_rows(rows, sample_rate):
    check(len(rows), "arcface", sample_rate, rows=rows)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_rank_may_own_no_target(sample_rate):
    check(4, "arcface", sample_rate, owned_by_first=True)


def test_more_positives_than_drawn_classes():
    classes = check(2, "cosface", 0.02, rows=[20, 20])
    assert len(classes) > 3  # ceil(0.02 * 103)


def test_positives_alone():
    check(2, "cosface", 0.0, rows=[6, 6])


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("num_subcenters", [2, 3])
def test_sub_centres(world, num_subcenters):
    check(world, "arcface", 0.3, num_subcenters=num_subcenters)


@pytest.mark.parametrize("world", [1, 2])
def test_interclass_filter(world):
    check(world, "cosface", 1.0, threshold=0.2)


@pytest.mark.parametrize("piece", [1, 7, 26, 1000])
def test_any_piece_size_gives_the_same(piece):
    check(2, "arcface", 1.0, piece=piece)


def test_the_sample_is_the_same_at_every_world_size():
    samples = [check(world, "cosface", 0.3, rows=[12 // world] * world) for world in (1, 2, 3, 4)]
    assert all(s.sort().values.tolist() == samples[0].sort().values.tolist() for s in samples)
