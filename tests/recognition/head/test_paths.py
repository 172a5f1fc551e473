"""The head's ways to the same numbers: what the forward keeps, recomputes, or updates at once."""

from __future__ import annotations

import functools
import importlib.util
import itertools

import pytest
import torch
import torch.distributed as dist

from recognition.head import PartialFC, chunks
from recognition.head.kernels.cpu_library import CpuLibrary, NotBuilt
from recognition.head.kernels.fused import fused_kernel
from recognition.head.kernels.native import native_kernel
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from tests import ranks, reference
from tests.recognition.head import test_partial_fc
from tests.recognition.losses import test_sharding
from tests.recognition.losses.cases import CASES

# Bytes are those of fp64: a piece of 7 classes and 12 rows takes 672.
PATHS = {
    "computed again": ("device", MemoryLimits(0)),
    "computed again in small pieces": ("device", MemoryLimits(0, chunk_size=7)),
    "kept": ("device", MemoryLimits(1 << 20, chunk_size=7)),
    "kept in part": ("device", MemoryLimits(1500, chunk_size=7)),
    "held by the host": ("host", MemoryLimits(1500, chunk_size=7)),
}
try:
    passes = CpuLibrary(torch.float64)
    native = functools.partial(native_kernel, passes)
    PATHS["native"] = (
        "device",
        MemoryLimits(1500, chunk_size=7, kernel=native, cpu_library=passes),
    )
except NotBuilt:  # which test_native.py says
    passes, native = None, None
if importlib.util.find_spec("triton") is not None:
    from recognition.head.kernels import triton_ops

    if triton_ops.INTERPRETED:
        operations = triton_ops.TritonOperations(triton_ops.TileSizes(16, 16, 4, 2))
        fused = MemoryLimits(0, chunk_size=7, kernel=functools.partial(fused_kernel, operations))
        PATHS["fused, in Triton's interpreter"] = ("device", fused)
        PATHS["fused, held by the host"] = ("host", fused)


def under(path, function, *arguments):
    """On a rank: the function with the path as the default of every head."""
    defaults = PartialFC.__init__.__defaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFC.__init__, "__defaults__", (*defaults[:-2], *PATHS[path]))
        return function(*arguments)


_LONG = {"computed again in small pieces", "fused, held by the host"}  # between the others


@pytest.fixture(
    params=[pytest.param(p, marks=pytest.mark.long) if p in _LONG else p for p in PATHS]
)
def path(request, monkeypatch):
    plain = ranks.run
    monkeypatch.setattr(
        ranks, "run", lambda world, *call: plain(world, under, request.param, *call)
    )


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("case", ["arcface", "combined", "bynorm"])
def test_equals_the_dense_layer(path, case, sample_rate):
    test_partial_fc.check(2, case, sample_rate)


def test_uneven_batches_filter_and_sub_centres(path):
    test_partial_fc.check(4, "arcface", 0.3, rows=[0, 4, 0, 9], owned_by_first=True)
    test_partial_fc.check(2, "cosface", 1.0, threshold=0.2)
    test_partial_fc.check(2, "arcface", 0.3, num_subcenters=3)


def paths_by_loss():
    """Every loss on two paths in turn, so that each path has a third of them; the rest are long."""
    taken = [path for path in PATHS if path not in _LONG]
    for number, case in enumerate(CASES):
        quick = {taken[number % len(taken)], taken[(number + 2) % len(taken)]}
        for path in PATHS:
            yield pytest.param(path, case, marks=[] if path in quick else pytest.mark.long)


@pytest.mark.parametrize("path, case", paths_by_loss(), indirect=["path"])
def test_every_loss(path, case):
    test_sharding.check(*CASES[case], 2, 0.3)


# Update in the backward.

C, D = 103, 16


def trained(optimizer, in_backward, margin, sample_rate, num_subcenters, storage="device",
            limits=None):  # fmt: skip
    """Rows, state, losses and gradients of the embeddings over three steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    head = PartialFC(
        MARGINS[margin](), D, C, sample_rate, num_subcenters, seed=5, head_storage=storage,
        limits=limits or MemoryLimits(1500, chunk_size=7),
    ).double()  # fmt: skip
    rows = optimizer(head)
    seen = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, C, (12,), generator=generator)
        local = slice(rank * 12 // world, (rank + 1) * 12 // world)
        local_x = x[local].clone().requires_grad_()
        if in_backward:
            rows.begin(0.1)
        loss = head(local_x, labels[local])
        loss.backward()
        assert len(head.sampled_classes) > 0
        rows.step(0.1)
        seen += [loss.detach(), local_x.grad]
    head.settle()
    return [*seen, head.weight.detach(), *rows.state.values(), *rows.model_state.values()]


def updates():
    """Every optimiser with every margin at two of the four heads, in turn; the rest are long."""
    margins = ["arcface", "curricularface", "uniface", "jamsface"]
    heads = itertools.product([1.0, 0.3], [1, 2])
    cases = itertools.product(enumerate([RowSGD, RowAdamW]), enumerate(margins), heads)
    for (i, optimizer), (j, margin), (sample_rate, num_subcenters) in cases:
        quick = ((sample_rate == 1.0) == (num_subcenters == 1)) == ((i + j) % 2 == 0)
        yield pytest.param(
            optimizer, margin, sample_rate, num_subcenters, marks=[] if quick else pytest.mark.long
        )


@pytest.mark.parametrize("optimizer, margin, sample_rate, num_subcenters", updates())
def test_an_update_in_the_backward_is_the_same(optimizer, margin, sample_rate, num_subcenters):
    early, late, hosted = (
        ranks.run(2, trained, optimizer, early, margin, sample_rate, num_subcenters, storage)
        for early, storage in ((True, "device"), (False, "device"), (True, "host"))
    )
    for mine, others, theirs in zip(early, late, hosted, strict=True):
        for one, other, third in zip(mine, others, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
            assert torch.equal(one, third)


def begun():
    head = PartialFC(MARGINS["arcface"](), D, C)
    rows = RowSGD(head)
    rows.begin(0.1)
    return head, rows, (torch.randn(4, D, requires_grad=True), torch.arange(4))


def test_what_needs_the_gradient_is_refused():
    head, rows, batch = begun()
    loss = head(*batch)
    with pytest.raises(RuntimeError, match="no accumulation"):
        head(*batch)
    loss.backward()
    assert head.gradient_in_passing() is None
    with pytest.raises(RuntimeError, match="keeps no gradient"):
        head.sampled_grad  # noqa: B018
    with pytest.raises(ValueError, match="neither be scaled, skipped"):
        rows.step(0.1, found_inf=torch.zeros(()))
    head, rows, batch = begun()
    loss = head(*batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="updated the class rows already"):
        loss.backward()
    head, rows, batch = begun()
    head(*batch).backward()
    with pytest.raises(ValueError, match="another lr|have another lr"):
        rows.step(0.2)
    head, rows, batch = begun()
    head.drop_step()
    head(*batch)
    with pytest.raises(RuntimeError, match="before the forward"):
        rows.begin(0.1)


def test_no_gradient_of_the_rows_exists():
    """Peak bytes of forward and backward beyond what is there: less than the rows take."""
    head = PartialFC(
        MARGINS["cosface"](), 64, 40_000, seed=1, limits=MemoryLimits(0, chunk_size=500)
    )
    rows = RowSGD(head)
    x, labels = torch.randn(64, 64, requires_grad=True), torch.arange(64)
    rows.begin(0.1)
    with test_partial_fc.memory_profile() as profile:
        head(x, labels).backward()
    live = peak = 0
    for _, size in sorted(test_partial_fc._memory_events(profile)):
        live += size
        peak = max(peak, live)
    assert peak < 0.2 * head.weight.numel() * 4


def step_of_bf16_products(stored_bytes, monkeypatch):
    """GEMMs of a step in six chunks of 64 classes, and both gradients' errors against fp64."""
    products = []

    def counted(a, b, out):
        products.append(a.dtype)
        return product(a, b, out)

    def counted_sum(total, a, b):
        products.append(a.dtype)
        add_product(total, a, b)

    product, add_product = chunks.product, chunks.add_product
    monkeypatch.setattr(chunks, "product", counted)
    monkeypatch.setattr(chunks, "add_product", counted_sum)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 32, generator=generator) for n in (48, 6 * 64))
    labels = torch.randint(0, len(weight), (48,), generator=generator)
    target = test_partial_fc.MARGIN_CASES["cosface"][1]
    every = torch.arange(len(weight))
    truth = reference.partial_fc(x.double(), weight.double(), labels, every, target)
    limits = MemoryLimits(stored_bytes, chunk_size=64, dtype=torch.bfloat16)
    head = PartialFC(MARGINS["cosface"](margin=0.35), 32, len(weight), limits=limits)
    head.weight.data.copy_(weight)
    own = x.clone().requires_grad_()
    head(own, labels).backward()
    monkeypatch.undo()
    errors = [
        float((found.double() - wanted).norm() / wanted.norm())
        for found, wanted in zip((own.grad, head.sampled_grad), truth[1:], strict=True)
    ]
    return len(products), own.grad, errors


def test_bf16_exponentials_are_kept_in_half_the_memory_at_no_loss(monkeypatch):
    """Half of what fp32 would need keeps all six chunks: three GEMMs a chunk in place of four."""
    again, grad, errors = step_of_bf16_products(0, monkeypatch)
    kept, kept_grad, kept_errors = step_of_bf16_products(6 * 64 * 48 * 2, monkeypatch)
    assert (again, kept) == (4 * 6, 3 * 6)
    assert torch.equal(grad, kept_grad)
    assert kept_errors[1] < 1.01 * errors[1]  # along the centre: z comes from rounded exponentials


@pytest.mark.parametrize("stored_bytes", [0, 1 << 20])
def test_bf16_products_are_no_worse_than_autocasts(stored_bytes):
    """Gradient of the embeddings against fp64: fp32 sums and logits of bf16 numbers beat the bf16
    logits that autocast gives, which at scale 64 are off by a quarter."""
    ours, naive = [], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(n, 64, generator=generator) for n in (128, 1000))
        labels = torch.randint(0, 1000, (128,), generator=generator)
        every = torch.arange(1000)
        truth = reference.partial_fc(
            x.double(), weight.double(), labels, every, test_partial_fc.MARGIN_CASES["cosface"][1]
        )[1]
        head = PartialFC(
            MARGINS["cosface"](margin=0.35), 64, 1000,
            limits=MemoryLimits(stored_bytes, dtype=torch.bfloat16),
        )  # fmt: skip
        head.weight.data.copy_(weight)
        own = x.clone().requires_grad_()
        head(own, labels).backward()
        ours.append(float((own.grad.double() - truth).norm()))
        plain = x.clone().requires_grad_()
        unit = torch.nn.functional.normalize
        with torch.autocast("cpu", torch.bfloat16):
            cos = torch.nn.functional.linear(unit(plain), unit(weight))
        cos = cos.float()
        cos = cos - 0.35 * torch.nn.functional.one_hot(labels, 1000)
        torch.nn.functional.cross_entropy(64 * cos, labels).backward()
        naive.append(float((plain.grad.double() - truth).norm()))
    assert sum(ours) < sum(naive)
