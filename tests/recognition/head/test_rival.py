"""The rival of launch/bench/head.py computes what we compute: a comparison of speed is then one of
two ways to the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from launch.bench.standard_head import DenseHead
from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.optim import RowSGD
from tests import ranks

C, D, B, STEPS = 103, 16, 12, 3
SCALE = 16.0  # at 64 its loss saturates, as the original's does


def train(dense: bool):
    """Losses, gradients of this rank's embeddings, and the class rows after three steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ours = PartialFC(MARGINS["cosface"](SCALE), D, C, seed=1)
    rows = RowSGD(ours)
    rival = DenseHead(D, C, scale=SCALE)
    rival.weight.data.copy_(ours.weight)
    optimizer = torch.optim.SGD(rival.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    losses, grads = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(B, D, generator=generator)
        labels = torch.randint(0, C, (B,), generator=generator)
        local = slice(rank * B // world, (rank + 1) * B // world)
        local_x = x[local].clone().requires_grad_()
        if dense:
            optimizer.zero_grad()
            loss = rival(local_x, labels[local].clone())
        else:
            loss = ours(local_x, labels[local])
        loss.backward()
        optimizer.step() if dense else rows.step(0.1)
        losses.append(loss.detach())
        grads.append(local_x.grad)
    return torch.stack(losses), torch.stack(grads), (rival if dense else ours).weight.detach()


@pytest.mark.parametrize("world", [1, 2])
def test_three_steps_are_ours(world):
    every = (ranks.run(world, train, dense) for dense in (True, False))
    for theirs, ours in zip(*every, strict=True):
        for their, our in zip(theirs, ours, strict=True):
            torch.testing.assert_close(their, our, rtol=1e-4, atol=1e-6)


def sampled():
    torch.manual_seed(3)
    head = DenseHead(D, C, sample_rate=0.3)
    labels = torch.tensor([5, 50, 100, 5])
    here = (labels >= head.start) & (labels < head.start + head.num_local)
    local = torch.where(here, labels - head.start, -1)
    positives = local[here].clone()
    index = head._sample(local, here)
    assert torch.equal(index[local[here]], positives)
    head(torch.randn(4, D, requires_grad=True), labels.clone()).backward()
    return len(index), int((head.weight.grad != 0).any(1).sum()), len(head.weight.grad)


def test_its_sample_holds_the_positives_and_its_gradient_is_dense():
    for num, touched, rows in ranks.run(2, sampled):
        assert num == int(0.3 * rows) and touched <= num + 4 < rows
