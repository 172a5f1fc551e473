"""The planner against measured bytes, and as a person runs it."""

from __future__ import annotations

import json

import pytest
import torch

from launch.planner import predict
from launch.planner.backbone_memory import backbone_bytes
from recognition import config
from recognition.backbones import BACKBONES, make_backbone
from recognition.head import PartialFC
from recognition.head.multi_head import limits_of
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from tests.conftest import command
from tests.recognition.head.test_partial_fc import _memory_events, memory_profile

RECIPE = "launch/configs/wf42m_r100_cosface_pfc02.py"
SIZES = {
    "all classes": (20_000, 64, {}),
    "a tenth, adamw": (120_000, 128, {"sample_rate": 0.1, "optimizer": "adamw"}),
    "three centres, updated in the backward": (
        12_000, 96, {"num_subcenters": 3, "update_in_backward": True, "head_stored_mib": 4},
    ),
    "a tenth of what the host holds": (
        120_000, 128, {"sample_rate": 0.1, "head_storage": "host"},
    ),
    "all of what the host holds": (
        20_000, 64, {"head_storage": "host", "update_in_backward": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_the_heads_bytes_are_those_that_are_measured(size):
    num_classes, batch, keys = SIZES[size]
    cfg = config.make({"rec": "-", "embedding_size": 128, **keys})
    head = PartialFC(
        MARGINS["cosface"](), 128, num_classes, cfg.sample_rate, cfg.num_subcenters,
        head_storage=cfg.head_storage, limits=limits_of(cfg),
    )  # fmt: skip
    rows = (RowAdamW if cfg.optimizer == "adamw" else RowSGD)(head)
    predicted = predict.head_bytes(cfg, num_classes, 1, batch, is_cuda=False)
    held = [head.weight, *rows.state.values(), *([] if head.votes is None else [head.votes])]
    standing = sum(tensor.numel() * tensor.element_size() for tensor in held)
    parts = ("classes: weights", "classes: optimiser state", "classes: sub-centre votes")
    hosted, _ = predict.host_bytes(cfg, num_classes, 1, batch)
    there = sum(predicted.pop(part) + hosted.get(part, 0) for part in parts)
    assert there == pytest.approx(standing, rel=1e-6)
    if cfg.head_storage == "host":
        head.storage.copies  # noqa: B018  its buffers are there before
    x, labels = torch.randn(batch, 128, requires_grad=True), torch.arange(batch)
    with memory_profile() as profile:
        if cfg.update_in_backward:
            rows.begin(0.1)
        head(x, labels).backward()
        rows.step(0.1)
    assert sum(predicted.values()) == pytest.approx(_peak(profile), rel=0.15)


def test_the_backbones_weights_and_activations():
    cfg = config.make({"rec": "-", "network": "mbf_tiny", "precision": "fp32", "batch_size": 8})
    predicted = predict.plan(cfg, 1000, 1).gpu
    network = BACKBONES["mbf_tiny"](embedding_size=512)
    assert predicted["backbone: weights"] == sum(p.numel() for p in network.parameters()) * 4
    x = torch.randn(8, 3, 112, 112)
    with memory_profile() as profile:
        embeddings = network(x)
    live = sum(step for _, step in _memory_events(profile))  # what the graph still holds
    assert len(embeddings) == 8
    assert predicted["backbone: activations"] == pytest.approx(live, rel=0.15)


def _peak(profile):
    live = peak = 0
    for _, step in sorted(_memory_events(profile)):
        live += step
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("arguments", [{"drop_path": 0.05}, {"checkpointing": True}])
def test_a_transformers_activations(arguments):
    keys = {"network": "vit_t", "network_args": arguments, "precision": "fp32"}
    predicted = backbone_bytes(config.make({"rec": "-", **keys}), 16)
    network = make_backbone("vit_t", 512, arguments)
    network.feature[0].weight.requires_grad_(False)  # its gradient would be the peak
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(16, 3, 112, 112)
    with memory_profile() as profile:
        network(x).sum().backward()
    assert predicted["backbone: activations"] == pytest.approx(_peak(profile), rel=0.15)


def test_the_wire_knows_the_compression():
    parts = {
        kind: predict.plan(
            config.make({"rec": "-", "network": "mbf_tiny", "gradient_compression": kind}), 1000, 4
        ).wire["sum of the backbone's gradients"]
        for kind in ("none", "bf16")
    }
    assert parts["bf16"] == parts["none"] / 2 > 0


def test_a_recipe_without_data():
    done = command("-m", "launch.plan", "launch/configs/demo.py", "--gpus", 2, "--classes", 300)
    assert "300 classes on 2 GPUs" in done.stdout


@pytest.fixture
def planned(capsys):
    """Run the command in this process, which then knows the networks' sizes for the next test."""

    def plan(*typed: object) -> tuple[dict, str]:
        assert predict.main([*map(str, typed), "--json"]) == 0
        text = capsys.readouterr().out
        return json.loads(text.splitlines()[-1]), text

    return plan


def test_a_recipe_for_64_gpus(planned):
    report, text = planned(RECIPE, "--gpus", 64, "--memory", 80, "--classes", 2_059_906)
    assert report["fits"] is True and report["advice"] == [] and report["wire_seconds"] > 0
    assert report["bytes"]["classes: weights"] == pytest.approx(2_059_906 / 64 * 2048, rel=1e-3)
    assert "predicted" in text and "fits into 80 GB" in text


def test_what_does_not_fit_is_told_what_to_change(planned):
    report, _ = planned(
        RECIPE, "--gpus", 1, "--memory", 24, "--classes", 4_000_000, "sample_rate=1.0",
        "batch_size=16",
    )  # fmt: skip
    assert report["fits"] is False and "update_in_backward=true" in report["advice"]
    assert any(hint.startswith("--gpus") for hint in report["advice"])


@pytest.mark.parametrize(
    "typed, hints",
    [
        (["--memory", 24, "sample_rate=0.1"], ["accumulation=2", "accumulation=4"]),
        (["--memory", 40, "network=vit_l"], ["network_args.checkpointing=true", "accumulation=2"]),
        (["--memory", 24, "--classes", 100_000_000, "head_storage=host"],
         ["sample_rate=0.1 accumulation=4"]),
    ],
)  # fmt: skip
def test_advice_is_of_what_is_too_large(planned, typed, hints):
    """And what it says does fit, as it is typed."""
    asked = [RECIPE, "--gpus", 8, "--classes", 10_000_000, *typed]
    assert planned(*asked)[0]["advice"][: len(hints)] == hints
    assert planned(*asked, *hints[0].split())[0]["fits"] is True


@pytest.mark.parametrize(
    "typed, words, code",
    [
        ([RECIPE, "--gpus", 0, "--classes", 10], "--gpus 0", 1),
        ([RECIPE, "--gpus", 1, "rec=/no/such/place"], "/no/such/place", 1),
        ([RECIPE, "--gpus", 1, "rec=/no/such/place"], "--classes C", 1),
        ([RECIPE, "--gpus", 1, "--classes", 10, "--memory", 0], "--memory 0", 1),
        ([RECIPE, "--gpus", 1, "--classes", 10, "--bandwidth", 0], "--bandwidth 0", 1),
        ([RECIPE], "--gpus", 2),
    ],
)
def test_a_mistake_is_said(typed, words, code, capsys):
    try:
        ended = predict.main(list(map(str, typed)))
    except SystemExit as exit:  # of argparse
        ended = exit.code
    assert ended == code and words in capsys.readouterr().err
