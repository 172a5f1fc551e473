"""compile=true, and the trials of the head's forms: what is compiled, tried and agreed."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
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


def chosen_from_unequal_lists():
    """What both ranks take, and what each tried: rank 0 has three forms, rank 1 two of them."""
    tried = []

    def seconds(head, form, num_rows):
        tried.append(form)
        slow = {"plain": 3.0, "first": 2.0 - dist.get_rank(), "second": 1.0 + 0.5 * dist.get_rank()}
        return slow[form], ""

    rank = dist.get_rank()
    forms = [["only here", "first", "second"], ["second", "first"]][rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_own_forms", lambda wanted, head: (forms, ""))
        patch.setattr(autotune, "_seconds", seconds)
        patch.setattr(autotune, "make", lambda form: plain_kernel)
        head = PartialFC(MARGINS["cosface"](), 8, 20)
        return autotune.choose("triton", head, 8).form, tried


def test_unequal_lists_are_agreed_before_anything_is_timed():
    """Both try the forms that both have, in one order; the slowest rank's figures decide."""
    found = ranks.run(2, chosen_from_unequal_lists)
    assert found == [("second", ["first", "second"])] * 2
