"""Options of the training step: each trains what the plain step trains."""

from __future__ import annotations

import json

import pytest
import torch

from recognition import config
from recognition.run import build
from recognition.run.log_lines import trace_steps
from recognition.run.nonfinite import SkippingStep
from tests import ranks
from tests.recognition import runs


def ends(shards_dir, tmp_path, world=2, **keys):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / f"{len(keys)}-{keys}"[:40]), **keys}
    return ranks.run(world, runs.run, keys)[0]


def differences(one, other):
    """The largest of each tensor, relative to its largest value."""
    found = {}
    for name, value in other.items():
        if value.is_floating_point():
            largest = value.abs().max().clamp_min(1e-30)
            found[name] = float((one[name] - value).abs().max() / largest)
    return found


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_skipped_by_an_optimizer_of_any_kind(kind, fused):
    """Fused ones read found_inf themselves; others would take the step in spite of it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.5, fused=fused)
    step = SkippingStep(optimizer, torch.device("cpu"))
    if not fused:
        assert not step.on_device
    parameter.grad = torch.ones(3)
    step(torch.ones(()))
    assert (parameter == 1).all()
    step(torch.zeros(()))
    assert (parameter < 1).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_runs_own_optimizers_need_no_word_of_the_host(shards_dir, tmp_path, optimizer):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "r"), "optimizer": optimizer}
    assert ranks.run(1, on_device, keys) == [True]


def on_device(keys):
    return build.build(config.make(runs.BASE | keys), runs.here()).step_backbone.on_device


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_update_in_backward(shards_dir, tmp_path, optimizer):
    both = [
        ends(shards_dir, tmp_path / str(early), precision="fp64", optimizer=optimizer, lr=0.01,
             update_in_backward=early, clip_norm=1.0)
        for early in (True, False)
    ]  # fmt: skip
    assert max(differences(*both).values()) < 1e-9


def test_gradients_travel_in_bf16(shards_dir, tmp_path):
    """One step: what starts at 0 is the gradient itself, and bf16 has 8 bits."""
    keys = {"precision": "fp32", "max_steps": 1, "clip_norm": None, "weight_decay": 0.0}
    plain = ends(shards_dir, tmp_path / "a", **keys)
    narrow = ends(shards_dir, tmp_path / "b", gradient_compression="bf16", **keys)
    found = {k: v for k, v in differences(narrow, plain).items() if k.startswith("backbone")}
    assert 1e-5 < max(found.values()) < 2**-6


def test_a_profile_is_written(shards_dir, tmp_path):
    ranks.run(2, runs.run, {"rec": str(shards_dir), "output": str(tmp_path), "profile": True,
                            "max_steps": 8})  # fmt: skip
    for rank in range(2):
        trace = json.loads((tmp_path / f"trace-{rank}.json").read_text())
        assert any(
            "_ReducedLogitsBackward" in str(event.get("name")) for event in trace["traceEvents"]
        )


def test_where_a_trace_is_or_why_there_is_none(tmp_path):
    for num_steps, words in ((9, "5 to 7"), (6, "5 to 6"), (4, "no trace"), (1, "no trace")):
        said = []
        with trace_steps(True, str(tmp_path), 0, said.append) as stepped:
            for _ in range(num_steps):
                stepped()
        assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize(
    "keys",
    [{"accumulation": 2}, {"precision": "fp16"}, {"on_spike": "rollback"}],
    ids=lambda keys: next(iter(keys)),
)
def test_what_needs_the_rows_gradient_is_refused(keys):
    with pytest.raises(ValueError, match=f"update_in_backward with {next(iter(keys))}"):
        config.make({"rec": "-", "update_in_backward": True, **keys})


@pytest.mark.long
def test_a_compiled_backbone_trains_the_same(shards_dir, tmp_path):
    """In fp64: a network on 12 images makes of fp32's roundings one per cent in three steps."""
    both = [
        ends(shards_dir, tmp_path / str(compiled), 1, precision="fp64", compile=compiled,
             max_steps=3)
        for compiled in (True, False)
    ]  # fmt: skip
    compiled, plain = both
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, msg=name, rtol=1e-9, atol=1e-9)
