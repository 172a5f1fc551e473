"""compile=true, and the trials of compiled forms, compile what a step uses and nothing else."""

from __future__ import annotations

import torch
import torch._dynamo.testing
from torch import nn

from recognition import config
from recognition.head import PartialFC
from recognition.head.chunked_softmax import plain_kernel
from recognition.head.kernels import autotune
from recognition.losses import MARGINS
from recognition.run import build
from tests import ranks
from tests.recognition import runs


def graphs_compiled(keys: dict) -> tuple[int, int]:
    """By build(), and by two forwards of a batch of eight afterwards."""
    counter = torch._dynamo.testing.CompileCounter()
    compile_, torch._dynamo.config.optimize_ddp = nn.Module.compile, False
    nn.Module.compile = lambda self: compile_(self, backend=counter)  # type: ignore
    try:
        state = build.build(config.make(runs.BASE | keys), runs.here())
        of_build = counter.frame_count
        for _ in range(2):
            state.model(torch.randn(8, 3, 112, 112))
        return of_build, counter.frame_count
    finally:
        nn.Module.compile = compile_  # type: ignore
        torch._dynamo.reset()


def test_only_the_batch_of_the_steps_is_compiled(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path), "compile": True}
    ((of_build, after),) = ranks.run(1, graphs_compiled, keys)
    assert of_build == 0
    assert after == 1


def test_a_trial_of_a_form_runs_without_gradients_as_a_step_does(monkeypatch):
    enabled = []

    def kernel(chunks, formula):
        enabled.append(torch.is_grad_enabled())
        return plain_kernel(chunks, formula)

    monkeypatch.setattr(autotune, "make", lambda form: kernel)
    head = PartialFC(MARGINS["cosface"](), 16, 50)
    with torch.enable_grad():
        seconds, why = autotune._seconds(head, "plain", 8)
    assert seconds < float("inf"), why
    assert enabled and not any(enabled)
