"""The terms of an inversion's loss, and its steps, against plain formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from recognition.checkpoint import load_backbone
from recognition.inversion import metrics, prior
from recognition.inversion.descent import InversionBatch, descend
from recognition.inversion.identity import ClosedSet, OpenSet, centres
from recognition.inversion.settings import Settings
from tests import ranks
from tests.recognition.inversion.cases import CPU


def tiny():
    """Two BatchNorms over images and one of the embedding, their statistics and weights drawn."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 5, 3, 2),
        nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6),
        nn.BatchNorm1d(6),
    ).double()  # fmt: skip
    for layer in network:
        if hasattr(layer, "running_var"):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("form", ["std", "var"])
@pytest.mark.parametrize("first", [1.0, 10.0])
@pytest.mark.parametrize("last", [False, True])
def test_the_prior_is_the_plain_formula(form, first, last):
    network = tiny()
    x = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    looking = prior.BnPrior(network, form, first, last)
    network(x)
    found = looking.take()
    looking.remove()
    expected = 0.0
    for number, at in enumerate([1, 4, 8] if last else [1, 4]):
        layer, inputs = network[at], network[:at](x)
        for channel in range(inputs.shape[1]):
            values = inputs[:, channel].flatten().numpy()
            var, stored = values.var(), layer.running_var[channel].item()
            if form == "std":
                var, stored = (var + layer.eps) ** 0.5, (stored + layer.eps) ** 0.5
            term = (values.mean() - layer.running_mean[channel].item()) ** 2 + (var - stored) ** 2
            expected += term * (first if number == 0 else 1)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    network(x)
    assert looking.take() == 0  # the hooks are gone


def test_variation_and_length_are_the_plain_formulas():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    total = 0.0
    for down, right in ((1, 0), (0, 1), (1, 1), (1, -1)):
        for image in x.numpy():
            squares = 0.0
            for r in range(5):
                for c in range(6):
                    if r + down < 5 and 0 <= c + right < 6:
                        squares += ((image[:, r + down, c + right] - image[:, r, c]) ** 2).sum()
            total += squares**0.5 / 2
    assert prior.total_variation(x).item() == pytest.approx(total, rel=1e-12)
    expected = np.mean([np.linalg.norm(image) for image in x.numpy()])
    assert prior.length(x).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("feature", ["unit", "raw"])
def test_the_open_set_is_the_plain_distance(feature):
    generator = np.random.default_rng(0)
    targets, x = generator.normal(size=(2, 5, 7))
    ids = np.array([4, 0, 2])
    loss = OpenSet(targets, feature, CPU).loss(torch.from_numpy(x[:3]), ids, [3])
    a, b = x[:3], targets[ids]
    if feature == "unit":
        a, b = metrics.unit(a), metrics.unit(b)
    assert loss.item() == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-12)


def closed_of_rank(path, counts):
    """(value, gradient) of this rank's rows, fp64, and the rows' own gradient kept nowhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 16, (sum(counts),), generator=generator)
    rank = dist.get_rank()
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    identity = ClosedSet(path, dist.group.WORLD, CPU, 0)
    identity.head.double()
    if not counts[rank]:
        identity.take_part(counts)
        return None
    rows = x[own].requires_grad_(True)
    value = identity.loss(rows, labels[own].numpy(), counts)
    (gradient,) = torch.autograd.grad(value, rows)
    identity.end_step()
    assert not identity.head._micro_steps.open and identity.head.weight.grad is None
    return value.item(), gradient


@pytest.mark.parametrize("counts", [[5], [3, 2], [5, 0]])
def test_the_closed_set_is_the_dense_loss_of_the_trained_rows(trained, counts):
    """ArcFace 64 / 0.5 over all classes, though the run sampled half of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 16, (5,), generator=generator)
    w = torch.from_numpy(np.concatenate(list(centres(trained[3], block=3)))).double()
    assert w.shape == (16, 32)
    x.requires_grad_(True)
    cos = nn.functional.normalize(x) @ nn.functional.normalize(w).T
    config = load_backbone(trained[3])[1]
    assert config["margin"] == "arcface" and config["sample_rate"] == 0.5
    margined = torch.cos(torch.acos(cos) + 0.5)
    hit = nn.functional.one_hot(labels, 16).bool()
    rows = nn.functional.cross_entropy(
        64 * torch.where(hit, margined, cos), labels, reduction="none"
    )
    found = ranks.run(len(counts), closed_of_rank, trained[3], counts)
    start = 0
    for count, result in zip(counts, found, strict=True):
        if count:
            (own,) = torch.autograd.grad(rows[start : start + count].mean(), x, retain_graph=True)
            assert result[0] == pytest.approx(rows.mean().item(), rel=1e-9)
            scale = own.abs().max().item()
            assert (result[1] - own[start : start + count]).abs().max() < 1e-9 * scale
        start += count


def test_a_step_is_adam_on_the_weighted_sum():
    """Three steps in fp64 against Adam written out, its gradient by autograd of the formula."""
    network, settings = tiny(), Settings(steps=3, lr=0.1, beta1=0.8, bn_weight=0.3, tv_weight=0.2)
    targets = np.random.default_rng(1).normal(size=(2, 6))
    batch = InversionBatch.start(settings, 0, np.array([0, 1]), CPU)
    batch.images = batch.images[..., :20, :20].double().clone()
    batch.moments = {name: torch.zeros_like(batch.images) for name in batch.moments}
    x = batch.images.clone()
    list(descend(network, OpenSet(targets, "unit", CPU), batch, settings, [2]))
    m = v = torch.zeros_like(x)
    for t in (1, 2, 3):
        x = x.detach().requires_grad_(True)
        looking = prior.BnPrior(network)
        e = nn.functional.normalize(network(x))
        apart = (e - nn.functional.normalize(torch.from_numpy(targets))).square().sum(1)
        loss = apart.mean() + 0.3 * looking.take() + 0.2 * prior.total_variation(x)
        loss = loss + 1e-4 * prior.length(x)
        looking.remove()
        (g,) = torch.autograd.grad(2 * loss, x)
        m, v = 0.8 * m + 0.2 * g, 0.999 * v + 0.001 * g * g
        x = x - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert torch.allclose(batch.images, x.detach(), rtol=1e-10, atol=1e-10)


def test_the_step_size_follows_its_schedule():
    assert {Settings().lr_at(step) for step in (0, 999, 19999)} == {0.25}
    cosine = Settings(steps=110, lr=1.0, schedule="cosine", warmup=10)
    assert [cosine.lr_at(s) for s in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert cosine.lr_at(60) == pytest.approx(0.5) and cosine.lr_at(109) < 1e-3


def test_the_defaults_are_the_papers():
    """reference: arXiv:1801.07698 section 3.3."""
    held = dataclasses.asdict(Settings())
    paper = {
        "steps": 20000, "lr": 0.25, "batch_size": 256, "bn_weight": 0.05, "tv_weight": 1e-3,
        "l2_weight": 1e-4,
    }  # fmt: skip
    assert {key: held[key] for key in paper} == paper
