"""The head on a CUDA device: the CPU's numbers, and no host synchronisation in a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recognition import config
from recognition.distributed import runtime
from recognition.head import PartialFC
from recognition.head.kernels.autotune import choose
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from recognition.run import build, trainer
from tests.recognition.losses.cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

C, D, B = 1003, 64, 96


@pytest.fixture(scope="module", autouse=True)
def group():
    """The process group of training: nccl for what is on the GPU, gloo for what is not."""
    with runtime.start() as here:
        yield here.group


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (B,), generator=generator)


def make_head(device, sample_rate=0.3, case="arcface"):
    name, arguments = CASES[case]
    head = PartialFC(
        MARGINS[name](**arguments), D, C, sample_rate, seed=1, class_counts=np.arange(C) % 9 + 1
    )
    return head.to(device, torch.float64)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_cpu(case, sample_rate):
    x, labels = batch()
    outcomes = []
    for device in ("cpu", "cuda"):
        head = make_head(device, sample_rate, case)
        local_x = x.to(device).requires_grad_()
        loss = head(local_x, labels)
        loss.backward()
        outcome = [loss.detach(), local_x.grad, head.sampled_classes, head.sampled_grad]
        outcome += head.margin_gradients().values()
        head.end_step()
        outcomes.append(outcome + [*head.class_state().values(), *head.model_state().values()])
    for cpu, cuda in zip(*outcomes, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("wanted", ["triton", "compiled"])
def test_a_fused_form_equals_the_plain_one(wanted, sample_rate, threshold, dtype):
    """Against fp64 on the CPU: the error is the products' rounding times the scale, 64."""
    pytest.importorskip("triton")
    x, labels = batch()
    outcomes = []
    for fused in (False, True):
        limits = MemoryLimits(chunk_size=200, dtype=dtype) if fused else MemoryLimits()
        margin = MARGINS["cosface"](interclass_filtering_threshold=threshold)
        head = PartialFC(margin, D, C, sample_rate, seed=1, limits=limits)
        if fused:
            head = head.cuda()
            said = choose(wanted, head, B)
            assert said.form.startswith(wanted), said
        else:
            head = head.double()
        local_x = x.to(head.weight.device, head.weight.dtype).requires_grad_()
        head(local_x, labels).backward()
        outcomes.append([local_x.grad.double().cpu(), head.sampled_grad.double().cpu()])
    eps = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for truth, ours in zip(*outcomes, strict=True):
        # Where the filter cuts, a rounding decides whether a class counts.
        most = 64 * eps if not threshold else 0.3
        assert (ours - truth).norm() < most * truth.norm()


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("optimizer", [RowSGD, RowAdamW])
@pytest.mark.parametrize("case", [*CASES, "fused"])
def test_a_step_does_not_synchronise_with_the_host(case, optimizer, micro_steps):
    x, labels = batch()
    if case == "fused":
        pytest.importorskip("triton")
        head = make_head("cuda").float()
        assert choose("triton", head, B).form.startswith("triton")
        x = x.float()
    else:
        head = make_head("cuda", case=case)
    row_optimizer = optimizer(head)
    local_x = x.cuda().requires_grad_()
    found_inf = torch.zeros((), device="cuda")

    def step():
        for _ in range(micro_steps):
            head(local_x, labels).backward()
        row_optimizer.step(0.1, found_inf=found_inf)

    step()  # the first allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_whole_training_step_does_not_synchronise(group, shards_dir, tmp_path, precision):
    cfg = config.make(
        {"rec": str(shards_dir), "output": str(tmp_path), "network": "mbf_tiny",
         "global_batch_size": 32, "precision": precision}
    )  # fmt: skip
    here = runtime.Runtime(torch.device("cuda", 0), group, 0, 1)
    state = build.build(cfg, here)
    with trainer.make_loader(state) as loader:
        batches = iter(loader)
        for _ in range(3):
            trainer.take_step(state, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = trainer.take_step(state, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("optimizer", [RowSGD, RowAdamW])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("case", ["arcface", "jamsface-all", "interface-dd"])
def test_rows_that_the_host_holds_train_the_same(case, sample_rate, optimizer):
    """Over steps of two micro-steps, one of them skipped: rows and state, bit for bit."""
    ends = []
    name, arguments = CASES[case]
    for storage in ("device", "host"):
        head = PartialFC(
            MARGINS[name](**arguments), D, C, sample_rate, seed=1, head_storage=storage
        ).to("cuda")
        rows = optimizer(head)
        assert head.weight.device.type == ("cuda" if storage == "device" else "cpu")
        for step in range(5):
            for micro in range(2):
                generator = torch.Generator().manual_seed(10 * step + micro)
                x = torch.randn(B, D, generator=generator).cuda().requires_grad_()
                labels = torch.randint(0, C, (B,), generator=generator)
                head(x, labels).backward()
            rows.step(0.1, found_inf=torch.tensor(float(step == 2), device="cuda"))
        head.settle()
        ends.append([head.weight.detach().cpu(), *(v.cpu() for v in rows.state.values())])
    for device, host in zip(*ends, strict=True):
        assert torch.equal(device, host)
