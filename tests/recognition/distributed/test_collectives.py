"""Each collective's forward and backward on 2 to 4 ranks with different numbers of rows."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recognition.distributed import collectives, store_exchange
from recognition.distributed.sync_batch_norm import SyncBatchNorm
from tests import ranks

ROWS = {1: [5], 2: [3, 4], 4: [2, 0, 3, 1]}


def part(tensor, rows):
    rank = dist.get_rank()
    return tensor[sum(rows[:rank]) : sum(rows[: rank + 1])]


def whole(rows, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(rows), *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("world", ROWS)
def test_gather_rows(world):
    """Forward: all rows. Backward of a loss that each rank holds a share of: their sum, times W."""
    for gathered, grad in ranks.run(world, gather, ROWS[world]):
        assert torch.equal(gathered, whole(ROWS[world], 3))
        shares = sum(rank + 1 for rank in range(world)) * world
        assert torch.equal(grad, torch.full_like(grad, shares))


def gather(rows):
    local = part(whole(rows, 3), rows).clone().requires_grad_()
    gathered = collectives.gather_rows(local, rows, dist.group.WORLD)
    (gathered.sum() * (dist.get_rank() + 1)).backward()
    return gathered.detach(), local.grad


@pytest.mark.parametrize("world", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gather_batch(world, dtype):
    """Rows and labels of all ranks, to the bit, and the gradient of gather_rows."""
    for x, labels, grad in ranks.run(world, gather_batch, ROWS[world], dtype):
        assert x.dtype == torch.float64
        assert torch.equal(x, whole(ROWS[world], 3).to(dtype).double())
        assert labels.tolist() == [2**40 + i for i in range(sum(ROWS[world]))]
        shares = sum(rank + 1 for rank in range(world)) * world
        assert grad.dtype == dtype and torch.equal(grad, torch.full_like(grad, shares))


def gather_batch(rows, dtype):
    local = part(whole(rows, 3), rows).to(dtype).requires_grad_()
    labels = part(torch.arange(sum(rows)), rows) + 2**40
    x, labels = collectives.gather_batch(local, labels, rows, dist.group.WORLD, torch.float64)
    (x.sum() * (dist.get_rank() + 1)).backward()
    return x.detach(), labels, local.grad


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_row_of_any_width(size, dtype):
    x, label = torch.randn(1, size).to(dtype), torch.tensor([2**40])
    [(got, labels)] = ranks.run(1, lone_row, x, label)
    assert torch.equal(got, x.double()) and labels.tolist() == [2**40]


def lone_row(x, label):
    return collectives.gather_batch(x, label, None, dist.group.WORLD, torch.float64)


def test_rows_that_do_not_describe_the_batch():
    messages = ranks.run(2, gather_wrongly)
    assert all("rows_per_rank=[3, 3] does not describe" in message for message in messages)


def gather_wrongly():
    try:
        collectives.gather_rows(torch.zeros(2, 1), [3, 3], dist.group.WORLD)
    except ValueError as error:
        return str(error)


def test_share_keeps_the_gradient_at_home():
    for rank, (values, grad) in enumerate(ranks.run(4, share)):
        assert values.tolist() == [[0.0], [1.0], [2.0], [3.0]]
        assert grad.flatten().tolist() == [7.0] * 4, rank  # not summed over the ranks


def share():
    local = torch.zeros(4, 1)
    local[dist.get_rank()] = dist.get_rank()
    local.requires_grad_()
    shared = collectives.share(local, dist.group.WORLD)
    (shared * 7).sum().backward()
    return shared.detach(), local.grad


def test_merge_log_sum_exp():
    """Row 1 has classes on rank 1 only, row 2 on none; row 3 is not a number on rank 0."""
    results = ranks.run(2, merge)
    inputs = torch.tensor([r[0] for r in results]).double().requires_grad_()
    assert all(torch.tensor(r[1]).isnan().tolist() == [False] * 3 + [True] for r in results)
    expected = torch.logsumexp(inputs, 0)
    expected[:2].sum().backward()
    for rank, (_, merged, grad) in enumerate(results):
        assert merged[2] == float("-inf") and grad[2] == 0
        # Some eight roundings to fp32 of numbers below one, each of at most 6e-8.
        assert merged[:2] == pytest.approx(expected[:2].tolist(), rel=1e-6)
        assert grad[:2] == pytest.approx(inputs.grad[rank, :2].tolist(), rel=5e-7)


def merge():
    minus = float("-inf")
    values = [[60.0, minus, minus, math.nan], [58.5, -70.0, minus, 1.0]][dist.get_rank()]
    merged, share = collectives.merge_log_sum_exp(torch.tensor(values), dist.group.WORLD)
    return values, merged.tolist(), share.tolist()


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("rows", [[4], [3, 4], [2, 1, 3, 1]], ids=str)
def test_sync_batchnorm_is_batchnorm_of_all_rows(rows, shape):
    dense, x = make_norm(shape), whole(rows, *shape, seed=4).requires_grad_()
    output = dense(x)
    (output * whole(rows, *shape, seed=5)).sum().backward()
    results = ranks.run(len(rows), sync_norm, rows, shape)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([r[0] for r in results]), output.detach(), **exact)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad, **exact)
    gradient = sum(r[2] for r in results)
    torch.testing.assert_close(gradient, torch.stack([dense.weight.grad, dense.bias.grad]), **exact)
    for result in results:
        torch.testing.assert_close(result[3], dense.running_mean, **exact)
        torch.testing.assert_close(result[4], dense.running_var, **exact)
        torch.testing.assert_close(result[5], dense.eval()(x[:2]).detach(), **exact)


def make_norm(shape):
    norm = (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, 3.0]))
    return norm


def sync_norm(rows, shape):
    dense = nn.Sequential(make_norm(shape))
    names = list(dense.state_dict())
    norm = SyncBatchNorm.convert(dense, dist.group.WORLD)[0]
    assert list(dense.state_dict()) == names
    x = part(whole(rows, *shape, seed=4), rows).clone().requires_grad_()
    output = norm(x)
    (output * part(whole(rows, *shape, seed=5), rows)).sum().backward()
    head = whole(rows, *shape, seed=4)[:2]
    return (
        output.detach(), x.grad, torch.stack([norm.weight.grad, norm.bias.grad]),
        norm.running_mean, norm.running_var, norm.eval()(head).detach(),
    )  # fmt: skip


def test_averages_and_agreements():
    for mean, largest, objects in ranks.run(3, agree):
        assert mean == [[1.0, 2.0], [3.0]]
        assert (largest, objects) == (2.0, ["0", "1", "2"])


def agree():
    rank, group = dist.get_rank(), dist.group.WORLD
    tensors = [torch.tensor([rank, rank + 1.0]), torch.tensor([3.0 * rank])]
    collectives.average_(tensors, group)
    number = torch.tensor(float(rank))
    return (
        [t.tolist() for t in tensors],
        collectives.largest_over_ranks(number, group).item(),
        collectives.gather_objects(str(rank), group),
    )


def test_a_slow_rank_is_waited_for_as_long_as_its_action_may_take():
    """A lock without flock takes up to a minute, whatever collective_timeout is."""
    assert all(ranks.run(2, come_late))


def come_late():
    group, factor = dist.group.WORLD, store_exchange.LONG_OPERATION_FACTOR
    store_exchange.LONG_OPERATION_FACTOR = (
        0  # a time-out that has passed before the other rank comes
    )
    release = _Release(group)
    try:

        def action():
            if group.rank() == 0:
                release.wait()
            return group.rank()

        if group.rank() == 1:  # rank 0 goes on only when rank 1 has waited past its time-out
            release.after_seconds(1.0)
        return store_exchange.run_on_all_ranks(group, "wait", action, least_seconds=60.0) == [0, 1]
    finally:
        store_exchange.LONG_OPERATION_FACTOR = factor


class _Release:
    """Rank 1 lets rank 0 go on, through the store."""

    def __init__(self, group):
        self._store = dist.distributed_c10d._get_process_group_store(group).clone()

    def wait(self):
        self._store.wait(["release"])
        self._store.delete_key("release")

    def after_seconds(self, seconds):
        threading.Timer(seconds, self._store.set, ["release", "now"]).start()
