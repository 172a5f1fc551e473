"""How many collectives a step of the head takes, and their bytes, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from recognition.distributed import collectives
from recognition.head import PartialFC
from recognition.losses import MARGINS
from recognition.optim import RowSGD
from tests import ranks

C, D, b = 103, 16, 6


def counted(margin, rows, dtype):
    """[(name, bytes of this rank's input)] of the forward, of the backward, of the update."""
    calls: list[tuple[str, int]] = []

    def counting(name, function):
        def call(first, second=None, *rest, **options):
            sent = second if name != "all_reduce" else first
            calls.append((name, sent.numel() * sent.element_size()))
            return function(first, *([] if second is None else [second]), *rest, **options)

        return call

    head = PartialFC(MARGINS[margin](), D, C, 0.3, seed=1)
    optimizer = RowSGD(head)
    rank = dist.get_rank()
    x = torch.randn(rows[rank], D).to(dtype).requires_grad_()
    labels = torch.arange(rows[rank])
    phases = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting("all_reduce", dist.all_reduce))
        for name in ("_all_gather", "_reduce_scatter"):
            patch.setattr(collectives, name, counting(name[1:], getattr(collectives, name)))
        loss = head(x, labels, rows)
        phases.append(calls[:])
        calls.clear()
        loss.backward()
        phases.append(calls[:])
        calls.clear()
        optimizer.step(0.1)
        phases.append(calls[:])
    return phases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world, rows", [(1, [b]), (2, [b, b]), (4, [b, 2, b, 5])])
def test_a_gather_and_three_reduces_forward_a_scatter_back(world, rows, dtype):
    for forward, backward, update in ranks.run(world, counted, "arcface", rows, dtype):
        batch = sum(rows)
        assert forward == [
            ("all_gather", max(rows) * (D * dtype.itemsize + 8)),  # the labels are in it
            ("all_reduce", batch * 4),
            ("all_reduce", batch * 4),  # of the log-sum-exps: the maximum,
            ("all_reduce", batch * 4),  # and the sum
        ]
        assert backward == [("reduce_scatter", world * max(rows) * D * 4)]
        assert update == []


def test_what_losses_add():
    """Two values of each class, and the regulariser's sum over the ranks; one number that is
    learned, summed at the update; the centres of the batch's classes."""
    jamsface = ranks.run(2, counted, "jamsface", [b, b], torch.float32)[0]
    assert sorted(size for name, size in jamsface[0] if name == "all_reduce") == sorted(
        [2 * b * 3 * 4, 4, 2 * b * 4, 2 * b * 4]
    )
    uniface = ranks.run(2, counted, "uniface", [b, b], torch.float32)[0]
    assert uniface[2] == [("all_reduce", 4)]
    interface = ranks.run(2, counted, "interface", [b, b], torch.float32)[0]
    assert ("all_reduce", 2 * b * D * 4) in interface[0]
