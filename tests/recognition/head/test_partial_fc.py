"""The head against the dense truth: loss, dEmbeddings and dWeight, at every world size."""

from __future__ import annotations

import contextlib
import functools
import gc
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

import recognition.head.partial_fc
from recognition.distributed import collectives
from recognition.head import PartialFC, reduction
from recognition.head.init import initial_rows
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import MARGINS, Margin
from tests import ranks, reference

C, D = 103, 16  # C divides by no world size above 1


class ByNorm(Margin):
    """reference.by_norm: the one case here whose gradient flows through Rows.norm."""

    def __init__(self) -> None:
        super().__init__(scale=64.0)

    def target(self, rows):
        return rows.cos_target - 0.02 * rows.norm


MARGIN_CASES = {
    "bynorm": ({}, reference.by_norm),
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


def step(
    margin, arguments, rows, sample_rate, num_subcenters=1, owned_by_first=False, chunk_size=None
):
    """One rank's loss, gradient of its embeddings, sampled classes and their gradient."""
    x, labels, weight = draw(rows, num_subcenters, owned_by_first)
    rank = dist.get_rank()
    head = PartialFC(
        (MARGINS | {"bynorm": ByNorm})[margin](**arguments),
        D,
        C,
        sample_rate,
        num_subcenters,
        seed=5,
        limits=MemoryLimits(chunk_size=chunk_size),
    ).double()
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
        options.get("owned_by_first", False), options.get("chunk_size"),
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


def test_a_rank_may_sample_no_class():
    check(2, "cosface", 0.0, rows=[4, 3], num_subcenters=3, owned_by_first=True)


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


@pytest.mark.parametrize("chunk_size", [1, 7, 26, 1000])
def test_any_chunk_size_gives_the_same(chunk_size):
    check(2, "arcface", 1.0, chunk_size=chunk_size)


def test_the_sample_is_the_same_at_every_world_size():
    samples = [check(world, "cosface", 0.3, rows=[12 // world] * world) for world in (1, 2, 3, 4)]
    assert all(s.sort().values.tolist() == samples[0].sort().values.tolist() for s in samples)


def test_the_start_is_the_same_at_every_world_size():
    starts = [torch.cat(ranks.run(world, initial_weight)) for world in (1, 2, 4)]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert starts[0].std() == pytest.approx(0.01, rel=0.02)
    assert len(starts[0].unique(dim=0)) == 3000


def initial_weight():
    return PartialFC(MARGINS["softmax"](), D, 3000, seed=1).weight.detach()


# Bugs that leave the loss exact and break a gradient: the comparison above must see each.


def averaged_gather(ctx, grad):
    local, *rest = _gather_backward(ctx, grad)
    return local / ctx.group.size(), *rest


def summed_reduction(ctx, grad_shared, grad_reduced):
    grad_reduced = grad_reduced.clone()
    dist.all_reduce(grad_reduced)
    return _reduced_backward(ctx, grad_shared, grad_reduced)


_gather_backward = collectives._GatherRows.backward
_reduced_backward = reduction._ReducedLogits.backward

# Where each is seen: a loss through the norm; a sum over the shards (the gradient of a shared
# target cosine is already 0 on the ranks that do not hold the class, whatever a backward adds up).
MUTANTS = {
    "the norm's gradient flows on every rank": (
        "bynorm", recognition.head.partial_fc, "_gradient_where", lambda held, values: values,
    ),
    "the backward of a sum over the shards adds up over the ranks": (
        "uniface", reduction._ReducedLogits, "backward", staticmethod(summed_reduction),
    ),
    "the gather's backward averages": (
        "bynorm", collectives._GatherRows, "backward", staticmethod(averaged_gather),
    ),
}  # fmt: skip


def mutated_step(mutant, *arguments):
    margin, *change = MUTANTS[mutant]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*change)
        return step(margin, *arguments)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_gradient_bug_is_seen_though_the_loss_is_exact(mutant):
    rows = [6, 6]
    results = ranks.run(2, mutated_step, mutant, {}, rows, 0.3)
    x, labels, weight = draw(rows)
    classes = torch.cat([r[2] for r in results])
    if MUTANTS[mutant][0] == "bynorm":
        truth = reference.partial_fc(x, weight, labels, classes, reference.by_norm)
        loss, grad_x, grad_weight = truth
    else:
        state = reference.initial_state("uniface", C, D, 0.3)
        state["bias"] = state["bias"].detach().float().double()  # as the head starts
        run = reference.train("uniface", [(x, labels, classes)], weight, state, 0.0, bounded=False)
        loss, grad_x, grad_weight, _ = run.steps[0]
    assert abs(results[0][0] - loss) < 1e-12 * abs(loss)
    error_x = (torch.cat([r[1] for r in results]) / 2 - grad_x).abs().max()
    got = torch.zeros_like(grad_weight)
    got[classes] = torch.cat([r[3] for r in results])
    error_weight = (got - grad_weight).abs().max()
    assert max(error_x, error_weight) > 1e-3


# Bad input, edges of the number range, and memory.


@pytest.mark.parametrize(
    "labels, error, words",
    [
        ([0, C], ValueError, f"label {C} at row 1 is outside"),
        ([-1, 0], ValueError, "label -1 at row 0 is outside"),
        ([0, 1, 2], ValueError, "labels of shape"),
        ([0.0, 1.0], TypeError, "float32"),
    ],
)
def test_bad_labels_are_refused_by_name(labels, error, words):
    head = PartialFC(MARGINS["cosface"](), D, C)
    with pytest.raises(error, match=words):
        head(torch.randn(2, D), torch.tensor(labels))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"num_classes": 0}, "0 classes cannot be sharded"),
        ({"num_subcenters": 0}, "num_subcenters=0"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    arguments = {"margin": MARGINS["cosface"](), "embedding_size": D, "num_classes": C} | change
    with pytest.raises(ValueError, match=words):
        PartialFC(**arguments)


def test_rows_per_rank_must_describe_the_batch():
    head = PartialFC(MARGINS["cosface"](), D, C)
    with pytest.raises(ValueError, match="rows_per_rank"):
        head(torch.randn(2, D), torch.tensor([0, 1]), [3])


def test_more_ranks_than_classes_is_refused_on_every_rank():
    assert ranks.run(4, too_few_classes) == ["3 classes cannot be sharded over 4 ranks"] * 4


def too_few_classes():
    try:
        PartialFC(MARGINS["cosface"](), D, 3)
    except ValueError as error:
        return str(error).split(":")[0]


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("margin", ["arcface", "sphereface", "combined", "cosface"])
@pytest.mark.parametrize("cos", [1.0, -1.0, 0.0])
def test_finite_at_the_ends_of_the_cosine(cos, margin, gradient):
    arguments = {"m2": 0.5} if margin == "combined" else {}
    head = PartialFC(MARGINS[margin](gradient=gradient, **arguments), D, C, seed=2)
    centre = head.weight[7].detach()
    x = (torch.stack([centre * cos, centre * 0]) * 40).requires_grad_()  # the second has norm 0
    loss = head(x, torch.tensor([7, 7]))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and head.sampled_grad.isfinite().all()


def test_the_loss_does_not_saturate():
    """arcface_torch's clamp of the probability at 1e-30 reports at most 69.08."""
    head = PartialFC(MARGINS["cosface"](scale=256.0, margin=0.5), D, 2, seed=2)
    direction = torch.nn.functional.normalize(torch.randn(D), dim=0)
    head.weight.data = torch.stack([direction, -direction])
    loss = head(-direction[None], torch.tensor([0]))
    assert loss.item() == pytest.approx(256 * 2.5, rel=1e-6)


def test_one_class_alone_costs_nothing():
    head = PartialFC(MARGINS["arcface"](), D, 1)
    x = torch.randn(3, D, requires_grad=True)
    loss = head(x, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0


def test_a_frozen_backbone_still_trains_the_centres():
    head = PartialFC(MARGINS["arcface"](), D, C)
    head(torch.randn(4, D), torch.arange(4)).backward()
    assert head.sampled_grad.abs().max() > 0


def test_autocast_does_not_reach_the_logits():
    head = PartialFC(MARGINS["arcface"](), D, C, seed=1)
    x, labels = torch.randn(8, D), torch.arange(8)
    plain = head(x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x, labels), plain)


def test_the_backward_uses_the_weights_of_its_forward():
    """An evaluation in between, under no_grad, leaves nothing behind."""
    head = PartialFC(MARGINS["arcface"](), D, C, 0.3)
    x, labels = torch.randn(4, D), torch.arange(4)
    loss = head(x, labels)
    with torch.no_grad():
        head(torch.randn(9, D), torch.arange(9) + 50)
    loss.backward()
    assert len(head.sampled_classes) < 31 + 4 + 1


def test_no_memory_grows_with_batch_times_classes():
    """Peak bytes of a step, less one gradient of the rows, at two class counts and one chunk
    size."""
    beyond = [peak_beyond_the_rows(num_classes) for num_classes in (20_000, 80_000)]
    logits = 256 * (80_000 - 20_000) * 4  # what a [B, C] tensor would add
    assert beyond[1] - beyond[0] < 0.02 * logits


def peak_beyond_the_rows(num_classes):
    limits = MemoryLimits(chunk_size=1000)
    head = PartialFC(MARGINS["cosface"](), 64, num_classes, seed=1, limits=limits)
    x, labels = torch.randn(256, 64, requires_grad=True), torch.arange(256)
    with memory_profile() as profile:
        head(x, labels).backward()
    live = peak = 0
    for event in sorted(_memory_events(profile), key=lambda e: e[0]):
        live += event[1]
        peak = max(peak, live)
    return peak - head.sampled_grad.numel() * 4


@contextlib.contextmanager
def memory_profile():
    """A profile of the memory that the body allocates and frees, for _memory_events().

    A head that an earlier test profiled lives in reference cycles until the collector runs. If it
    ran inside the body, it would free that head there, and the sum would begin below zero.
    """
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        yield profile


def _memory_events(profile):
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.start_ns(), event.nbytes()


@pytest.mark.parametrize("margin", ["arcface", "combined", "cosface"])
def test_fp32_is_no_worse_than_a_plain_fp32_layer(margin):
    """Error of the gradients against fp64, ours and that of the dense formula in fp32."""
    target = {
        "arcface": functools.partial(reference.arcface, m=0.5),
        "combined": functools.partial(reference.combined, m1=1.0, m2=0.3, m3=0.2),
        "cosface": functools.partial(reference.cosface, m=0.4),
    }[margin]
    arguments = {"m2": 0.3, "m3": 0.2} if margin == "combined" else {}
    ours, plain = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(n, 64, generator=generator) for n in (128, 1000))
        labels = torch.randint(0, 1000, (128,), generator=generator)
        every = torch.arange(1000)
        _, truth, _ = reference.partial_fc(x, weight, labels, every, target)
        _, naive, _ = reference.partial_fc(x, weight, labels, every, target, dtype=torch.float32)
        head = PartialFC(MARGINS[margin](**arguments), 64, 1000)
        head.weight.data.copy_(weight)
        local_x = x.clone().requires_grad_()
        head(local_x, labels).backward()
        ours.append(float((local_x.grad - truth).norm()))
        plain.append(float((naive - truth).norm()))
    assert np.median(ours) <= 1.05 * np.median(plain)  # eight draws of rounding noise


def test_the_first_rows_do_not_depend_on_shard_or_cores(monkeypatch):
    """2500 classes are drawn in three blocks; the last is cut."""
    alone = []
    for cores in (1, 3, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        alone.append(initial_rows((0, 2500), 2, 8, seed=5))
    assert torch.equal(alone[0], alone[1]) and torch.equal(alone[0], alone[2])
    assert torch.equal(initial_rows((900, 2100), 2, 8, seed=5), alone[0][900:2100])
    assert alone[0].std() == pytest.approx(0.01, rel=0.02) and alone[0].unique().numel() > 39_000
