"""The fused forms of the reduction: Triton's programs in its interpreter, and torch's operations.

conftest.py sets TRITON_INTERPRET where there is no GPU. The dense layer and every loss are in
test_paths.py, what only a GPU shows in test_gpu.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from recognition.head import PartialFC
from recognition.head.kernels import autotune
from recognition.head.kernels.fused import fused_kernel
from recognition.head.kernels.torch_ops import TorchOperations
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import MARGINS
from tests import ranks, reference
from tests.recognition import runs

pytest.importorskip("triton", reason="Triton is for Linux")
programs = pytest.importorskip("recognition.head.kernels.triton_ops")

interpreted = pytest.mark.skipif(not programs.INTERPRETED, reason="a GPU is here: test_gpu.py")
SMALL = programs.TileSizes(32, 64, 4, 2)
FORMS = {
    "triton": programs.TritonOperations(SMALL),
    "torch": TorchOperations(compiled=False),
}


def limits_of(form, dtype=None, piece=None):
    if form == "plain":
        return MemoryLimits(0, piece, dtype)
    return MemoryLimits(0, piece, dtype, functools.partial(fused_kernel, FORMS[form]))


def drawn(num_rows, num_classes, size):
    generator = torch.Generator().manual_seed(num_rows + num_classes)
    x = torch.randn(num_rows, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, size, generator=generator, dtype=torch.float64)
    return x, weight, torch.randint(num_classes, (num_rows,), generator=generator)


def stepped(limits, batch, arguments, wide):
    """On a rank: loss, gradient of its embeddings and of its rows."""
    x, weight, labels = batch
    rank, world = dist.get_rank(), dist.get_world_size()
    if limits == "compiled":  # which does not travel between processes
        limits = MemoryLimits(0, 50, None, autotune.make("compiled"))
    head = PartialFC(MARGINS["cosface"](**arguments), x.shape[1], len(weight), limits=limits)
    head = head.to(wide)
    head.weight.data.copy_(weight[slice(*head.shard)])
    counts = [len(x) * (r + 1) // world - len(x) * r // world for r in range(world)]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    own = x[mine].to(wide).requires_grad_()
    loss = head(own, labels[mine], counts)
    loss.backward()
    return loss.detach(), own.grad / world, head.sampled_grad


def errors(limits, batch, threshold=0.0, wide=torch.float64, world=1):
    """Relative, against the dense truth: of the loss, of both gradients."""
    arguments = {"margin": 0.35, "interclass_filtering_threshold": threshold}
    loss, grad_x, grad_weight = zip(
        *ranks.run(world, stepped, limits, batch, arguments, wide), strict=True
    )
    x, weight, labels = batch
    every = torch.arange(len(weight))
    target = functools.partial(reference.cosface, m=0.35)
    truth = reference.partial_fc(x, weight, labels, every, target, threshold=threshold)
    ours = loss[0], torch.cat(grad_x), torch.cat(grad_weight)
    return [
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(ours, truth, strict=True)
    ]


@interpreted
@pytest.mark.parametrize("sizes, piece, world, threshold", [
    ((1, 3, 16), None, 1, 0.0), ((5, 33, 24), None, 1, 0.1), ((33, 70, 130), 50, 1, 0.1),
    ((16, 64, 64), 64, 1, 0.0), ((40, 97, 3), 13, 2, 0.1), ((7, 2, 16), None, 2, 0.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_sizes_that_fit_no_block(form, sizes, piece, world, threshold):
    """C_r = 1, rows and ranks without a target here, a class twice in a batch."""
    limits, batch = limits_of(form, piece=piece), drawn(*sizes)
    assert max(errors(limits, batch, threshold, world=world)) < 1e-12
    # Roundings of fp32, times the scale.
    assert max(errors(limits, batch, threshold, torch.float32, world)) < 64 * 2**-20


def naive(batch, dtype):
    """errors() of what autocast makes of the layer: logits of the dtype."""
    x, weight, labels = (tensor.float() if tensor.is_floating_point() else tensor
                         for tensor in batch)  # fmt: skip
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    unit = torch.nn.functional.normalize
    with torch.autocast("cpu", dtype):
        cos = torch.nn.functional.linear(unit(leaves[0]), unit(leaves[1]))
    cos = cos.float() - 0.35 * torch.nn.functional.one_hot(labels, len(weight))
    loss = torch.nn.functional.cross_entropy(64 * cos, labels)
    loss.backward()
    target = functools.partial(reference.cosface, m=0.35)
    truth = reference.partial_fc(*batch, torch.arange(len(weight)), target)
    ours = loss.detach(), leaves[0].grad, leaves[1].grad
    return [
        float((one.double() - other).norm() / other.norm())
        for one, other in zip(ours, truth, strict=True)
    ]


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_narrow_products_are_no_worse_than_autocasts(form, dtype):
    """Both gradients, over three draws; logits of bf16 at scale 64 are off by 0.25. (The mean loss
    says little: what its rows are off by cancels.)"""
    if (form, dtype) == ("plain", torch.float16):
        pytest.skip("the plain form keeps exp(z), which fp16 cannot hold")
    batches = [drawn(64, 300 + seed, 64) for seed in range(3)]
    limits = limits_of(form, dtype, piece=128)
    ours = torch.tensor([errors(limits, batch, wide=torch.float32) for batch in batches]).sum(0)
    theirs = torch.tensor([naive(batch, dtype) for batch in batches]).sum(0)
    assert (ours[1:] < theirs[1:]).all(), (ours, theirs)


def chosen(wanted, margin="cosface", num_subcenters=1, known="", size=16, **sizes):
    head = PartialFC(MARGINS[margin](), size, 300, num_subcenters=num_subcenters)
    before = [head.weight.clone(), *head.model_state().values()]
    choice_ = autotune.choose(wanted, head, 8, known)
    assert head.step == 0 and not head.has_begun
    for now, then in zip([head.weight, *head.model_state().values()], before, strict=True):
        assert torch.equal(now, then)
    x, labels = torch.randn(8, size), torch.arange(8)
    head(x, labels).backward()
    return choice_


@interpreted
@pytest.mark.parametrize(
    "wanted, options, form, words",
    [
        ("auto", {}, "plain", ""),
        ("plain", {"margin": "curricularface"}, "plain", ""),
        ("triton", {}, "triton-128x128", "triton-128x128 is taken; of a step: triton-128x128 "),
        ("triton", {"margin": "curricularface"}, "plain", "it changes the logits of other"),
        ("triton", {"margin": "sphereface2"}, "plain", "one-vs-all"),
        ("triton", {"margin": "adacos"}, "plain", "its scale is not constant"),
        ("triton", {"num_subcenters": 2}, "plain", "a class has several centres"),
        ("triton", {"size": 5000}, "plain", "embeddings are longer than 4096"),
    ],
)
def test_what_cannot_be_done_is_said(wanted, options, form, words):
    for choice in ranks.run(2, functools.partial(chosen, wanted, **options)):
        assert (
            choice.form == form and words in choice.message and bool(choice.message) is bool(words)
        )


@interpreted
def test_ranks_that_can_do_different_things_agree_first():
    """Rank 1 has no Triton: no rank tries it or waits for an all-reduce of its figures."""
    here, there = ranks.run(2, chosen_without_triton_on_rank_1)
    assert here.form == there.form == "plain"
    assert "not on this machine" in there.message and "not on this machine (rank 1)" in here.message


def chosen_without_triton_on_rank_1():
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(autotune, "no_triton", lambda head: "not on this machine")
        return chosen("triton")


def test_without_an_interpreter_or_a_gpu_it_is_plain():
    code = (
        "import torch.distributed as dist, tempfile\n"
        "from recognition.head import PartialFC\n"
        "from recognition.head.kernels import autotune as choice\n"
        "from recognition.losses import MARGINS\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        "    dist.init_process_group('gloo', f'file://{d}/s', rank=0, world_size=1)\n"
        "    print(choice.choose('triton', PartialFC(MARGINS['arcface'](), 8, 9), 4))"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    hidden.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=True
    )
    assert "form='plain'" in done.stdout and "Triton is for GPUs" in done.stdout


@interpreted
def test_a_run_takes_its_form_says_so_and_keeps_it(shards_dir, tmp_path):
    """Two processes, fp64: the plain run's numbers; a resumed one keeps the form it had."""
    common = {"rec": str(shards_dir), "precision": "fp64", "max_steps": 2}
    ends = {}
    for name, keys in (
        ("plain", {"head_kernel": "plain"}), ("fused", {"head_kernel": "triton"}),
    ):  # fmt: skip
        keys = common | keys | {"output": str(tmp_path / name)}
        if name == "fused":
            ranks.run(2, runs.run, keys, 1)
        ends[name] = ranks.run(2, runs.run, keys)[0]
    for name, value in ends["plain"].items():
        torch.testing.assert_close(ends["fused"][name], value, rtol=1e-7, atol=1e-9)
    said = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert said["head_forms"] == ["triton-128x128"]


@pytest.mark.long
def test_torch_compile_gives_the_same():
    batch = drawn(33, 70, 130)
    assert max(errors("compiled", batch)) < 1e-12


@pytest.fixture(scope="module")
def on_sm90(request):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.recognition.head.kernels.sm90", *request.param], env=plain,
        capture_output=True, text=True,
    )  # fmt: skip
    if "ptxas is missing" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "on_sm90",
    [["bf16"], pytest.param(["fp16", "tf32", "fp32"], marks=pytest.mark.long)],
    indirect=True, ids=str,
)  # fmt: skip
def test_programs_fit_an_h100(on_sm90):
    """Compiled for sm_90: no register is spilled, the blocks fit a multiprocessor's 227 KiB, and
    narrow products are those of its matrix units."""
    for program in on_sm90:
        assert program["spilled_bytes"] == 0, program
        assert program["shared_bytes"] <= 227 << 10, program
        if program["program"] in ("_masses", "_weights"):
            assert program["wgmma"] is (program["what"].split()[1] != "fp32"), program
