"""The one autograd function of the head against autograd through dense logits, in one process."""

from __future__ import annotations

import pytest
import torch

from recognition.distributed import collectives
from recognition.head.chunked_softmax import Formula, plain_kernel
from recognition.head.chunks import Chunks, Targets
from recognition.head.class_rows import ClassRows, Pool
from recognition.head.device_storage import DeviceStorage
from recognition.head.reduction import reduced_logits
from recognition.losses import MARGINS
from recognition.losses.margin import Layer, Rows

C, D, B = 29, 8, 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def made(name, num_subcenters):
    """The function's two results, its leaves and its class rows."""
    generator = torch.Generator().manual_seed(3)
    shape = (C, D) if num_subcenters == 1 else (C, num_subcenters, D)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    x = (x / x.norm(dim=1, keepdim=True)).requires_grad_()
    values = torch.rand(B, 2, generator=generator, dtype=torch.float64).requires_grad_()
    place, row = torch.randint(C, (B,), generator=generator).sort()
    margin = MARGINS[name](scale=8.0).double()
    margin.bind(Layer(C, (0, C), D, num_subcenters))
    class_rows = ClassRows(DeviceStorage(weight, num_subcenters))
    targets = Targets(row, place, place, place.tolist())
    chunks = Chunks(class_rows, targets, B, 5, 3 * B * 5 * 8, Pool())

    def formula_of(shared, cosines):
        norm = torch.ones(B, dtype=torch.float64)
        return Formula(margin.frozen(), Rows(shared[:, 0], norm, row, shared[:, 1:]))

    learned = list(margin.parameters())
    shared, reduced = reduced_logits(
        x, weight, values, learned, chunks, formula_of, plain_kernel, collectives.world_group()
    )
    return shared, reduced, margin, (x, values, *learned), weight, targets, class_rows


def dense(margin, x, values, weight, targets):
    """The same from all logits at once."""
    centres = weight.view(C, -1, D)
    unit = centres / centres.norm(dim=-1, keepdim=True)
    cos = torch.einsum("bd,ckd->bck", x, unit).max(2).values
    label = torch.empty(B, dtype=torch.int64).index_copy_(0, targets.row, targets.place)
    own = cos.gather(1, label[:, None])
    shared = torch.cat([own, torch.zeros_like(values).index_copy(0, targets.row, values)], 1)
    batch = Rows(shared[:, 0], torch.ones_like(own[:, 0]), label, shared[:, 1:]).constant()
    z = margin.scale * margin.negatives(cos, batch)
    others = torch.ones(B, C).scatter(1, label[:, None], 0) > 0
    if margin.reduction == "softmax":
        return shared, torch.logsumexp(torch.where(others, z, -torch.inf), 1)
    return shared, (torch.logaddexp(z, torch.zeros_like(z)) * others).sum(1)


@pytest.mark.parametrize("used", ["shared", "reduced", "both"])
@pytest.mark.parametrize("num_subcenters", [1, 2])
@pytest.mark.parametrize("name", ["cosface", "curricularface", "uniface"])
def test_either_gradient_alone_and_both_are_those_of_dense_logits(name, num_subcenters, used):
    shared, reduced, margin, leaves, weight, targets, class_rows = made(name, num_subcenters)
    expected = dense(margin, *leaves[:2], weight, targets)
    for ours, truth in zip((shared, reduced), expected, strict=True):
        torch.testing.assert_close(ours, truth, **EXACT)

    def scalar(shared, reduced):
        weights = torch.arange(1, B + 1, dtype=torch.float64)
        terms = {"shared": (shared.square() * weights[:, None]).sum(),
                 "reduced": (reduced.square() * weights).sum()}  # fmt: skip
        return sum(terms.values()) if used == "both" else terms[used]

    options = {"allow_unused": True, "materialize_grads": True}
    truth = torch.autograd.grad(scalar(*expected), [*leaves, weight], **options)
    loss = scalar(shared, reduced)
    for repetition in (1, 2):  # a second backward of one graph adds the same again
        ours = torch.autograd.grad(loss, leaves, retain_graph=True, **options)
        of_rows = class_rows.gradient().view_as(weight) / repetition
        for one, other in zip((*ours, of_rows), truth, strict=True):
            torch.testing.assert_close(one, other, **EXACT)
