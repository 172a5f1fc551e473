"""A head for each data set: loss and every gradient against dense formulas, runs that resume."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_tools.common.draws import hash_words
from data_tools.load.order import Order
from recognition import config
from recognition.head import multi_head
from tests import ranks
from tests.recognition import runs
from tests.recognition.run.test_trainer import largest_difference, refused, steps, two_sets

__all__ = ["two_sets"]  # a fixture

_CLASSES, _SIZE = (7, 11), 8
_MARGINS = ({"margin": "cosface", "margin_args": {"scale": 16, "margin": 0.3}},
            {"margin_args": {"scale": 8, "margin": 0.4}, "loss_weight": 0.5})  # fmt: skip


def config_of_two(**keys) -> config.Config:
    return config.make({"rec": ["a", "b"], "rec_heads": list(_MARGINS), "embedding_size": _SIZE,
                        "margin": "arcface", **keys})  # fmt: skip


def two_heads(cfg: config.Config, group: object) -> list:
    labels = [np.arange(7).repeat(2), np.arange(11).repeat(3)]
    sets = [SimpleNamespace(num_classes=n) for n in _CLASSES]
    data = multi_head.Union.__new__(multi_head.Union)
    data.sets, data.num_classes = sets, 18
    data.__dict__["labels"] = np.concatenate([labels[0], labels[1] + 7])
    return [head.double() for head in multi_head.make_heads(cfg, data, group)]


def batch(num_rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both sets: embeddings [n, D], labels [n] in the numbering of all classes."""
    generator = torch.Generator().manual_seed(hash_words(5, *num_rows) >> 1)
    x = torch.randn(sum(num_rows), _SIZE, generator=generator, dtype=torch.float64)
    labels = [torch.randint(0, c, (n,), generator=generator)
              for n, c in zip(num_rows, _CLASSES, strict=True)]  # fmt: skip
    return x, torch.cat([labels[0], labels[1] + 7])


def joint(rows: list[list[int]]) -> tuple:
    """Loss, losses, gradient of this rank's embeddings and all gradients of the centres."""
    rank = dist.get_rank()
    cfg = config_of_two()
    own = two_heads(cfg, dist.group.WORLD)
    x, labels = batch([sum(r[k] for r in rows) for k in range(2)])
    # Rank r's rows: its part of the first set's, and its part of the second's.
    total = sum(r[0] for r in rows)
    mine = [*range(sum(r[0] for r in rows[:rank]), sum(r[0] for r in rows[: rank + 1])),
            *range(total + sum(r[1] for r in rows[:rank]),
                   total + sum(r[1] for r in rows[: rank + 1]))]  # fmt: skip
    local = x[mine].clone().requires_grad_()
    made = multi_head.multi_head_loss(cfg, own, local, labels[mine], rows, None)
    made.total.backward()
    grads = [torch.zeros(h.num_classes, _SIZE, dtype=torch.float64) for h in own]
    for head, grad in zip(own, grads, strict=True):
        grad[head.sampled_classes] = head.sampled_grad
        dist.all_reduce(grad)
    weights = [[None] * len(rows) for _ in own]
    for head, parts in zip(own, weights, strict=True):
        dist.all_gather_object(parts, head.weight.detach())
    return (made.total.detach(), made.by_head, mine, local.grad / len(rows), grads,
            [torch.cat(parts) for parts in weights])  # fmt: skip


def dense(x, labels, weights):
    """The mean over all rows of arccosine and cosine margins written out; half for the second."""
    losses = []
    for k, (low, high) in enumerate(((0, 7), (7, 18))):
        rows = (labels >= low) & (labels < high)
        cos = torch.nn.functional.normalize(x[rows]) @ torch.nn.functional.normalize(weights[k]).T
        target = torch.nn.functional.one_hot(labels[rows] - low, high - low).bool()
        if k == 0:
            logits = 16 * torch.where(target, cos - 0.3, cos)
        else:
            logits = 8 * torch.where(target, torch.cos(torch.acos(cos) + 0.4), cos)
        losses.append(torch.nn.functional.cross_entropy(logits, labels[rows] - low))
    first = (labels < 7).double().mean()
    return first * losses[0] + 0.5 * (1 - first) * losses[1], torch.stack(losses)


@pytest.mark.parametrize("rows", [[[5, 4]], [[3, 2], [2, 2]], [[0, 3], [5, 1]]], ids=str)
def test_the_joint_loss_is_the_weighted_mean_of_each_sets_own(rows):
    results = ranks.run(len(rows), joint, rows)
    x, labels = batch([5, 4])
    weights = [w.clone().requires_grad_() for w in results[0][5]]
    x.requires_grad_()
    total, by_head = dense(x, labels, weights)
    total.backward()
    grad = torch.zeros_like(x)
    for loss, losses, mine, local, grads, _ in results:
        torch.testing.assert_close(loss, total.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(losses, by_head.detach(), rtol=1e-12, atol=0)
        grad[mine] = local
        for k in range(2):
            torch.testing.assert_close(grads[k], weights[k].grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, x.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_a_run_with_two_heads_is_the_same_at_any_world_size_and_resumes(two_sets, tmp_path):
    keys = {
        "rec": two_sets, "rec_shares": [2, 1], "precision": "fp64", "sync_bn": True,
        "global_batch_size": 25, "accumulation": 2, "max_steps": 14,
        "rec_heads": [{"margin": "cosface"}, {"sample_rate": 1.0, "margin": "kappaface"}],
    }  # fmt: skip
    one = ranks.run(1, runs.run, keys | {"output": str(tmp_path / "a")})[0]
    ranks.run(2, runs.run, keys | {"output": str(tmp_path / "b")}, 3)
    two = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "b")})[0]
    assert one["head0-rows"].shape[0] == 16 and one["head1-rows"].shape[0] == 6
    assert largest_difference(one, two) < 1e-8
    last = steps(tmp_path / "a")[-1]
    assert last["heads"].keys() == {path.rpartition("/")[2] for path in two_sets} or (
        last["heads"].keys() == set(two_sets)
    )
    assert all(own["loss"] > 0 and "cos_target" in own for own in last["heads"].values())
    # Of 350 samples the second set had 117: three of its epochs and more.
    assert last["set_epoch"] == {two_sets[0]: 233 / 128, two_sets[1]: 117 / 30}
    records = [json.loads(line) for line in open(tmp_path / "a" / "metrics.jsonl")]
    assert [r["epoch"] for r in records if "epoch_end" in r] == [1, 2, 3]  # of kappaface's set
    kind, message = ranks.run(1, refused, keys | {"rec_heads": [], "output": str(tmp_path / "b")})[
        0
    ]
    assert kind == "ValueError" and "2 heads there, 1 here" in message


@pytest.mark.parametrize(
    ("own", "kind", "said"),
    [
        ([{}], ValueError, "has 1 heads and rec 2 data sets"),
        ([{"magrin": "cosface"}, {}], KeyError, "unknown key 'magrin': did you mean margin"),
        ([{"lr": 0.1}, {}], KeyError, "rec_heads[0]: unknown key 'lr'"),
        ([{}, {"sample_rate": 2.0}], ValueError, "rec_heads[1]: sample_rate=2.0"),
        ([{}, 5], TypeError, "rec_heads[1]=5: expected a dict"),
        ([{}, {"margin": "arcfac"}], KeyError, "rec_heads[1]: margin='arcfac'"),
        ([{}, {"loss_weight": -1}], ValueError, "rec_heads[1]: loss_weight"),
        (
            [{}, {"margin": "cosface", "margin_args": {"m": 1}}],
            KeyError,
            "rec_heads[1]: margin_args.m: cosface takes",
        ),
    ],
    ids=str,
)
def test_mistakes_in_heads_are_named(own, kind, said):
    with pytest.raises(kind) as raised:
        two_heads(config.make({"rec": ["a", "b"], "rec_heads": own}), dist.group.WORLD)
    assert said in str(raised.value)


def test_the_weight_of_an_only_head_counts(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path / "run"), "resume": None}
    plain = ranks.run(1, runs.first_loss, keys)[0]
    half = ranks.run(1, runs.first_loss, keys | {"rec_heads": [{"loss_weight": 0.5}]})[0]
    assert half == pytest.approx(plain / 2, rel=1e-6)


def test_a_head_takes_what_it_does_not_say_from_the_run():
    cfg = config_of_two(sample_rate=0.3, margin_args={"margin": 0.7})
    first, second = config.of_head(cfg, 0), config.of_head(cfg, 1)
    assert (first.margin, first.sample_rate) == ("cosface", 0.3)
    assert second.margin == "arcface" and second.margin_args["scale"] == 8
    bare = config.of_head(dataclasses.replace(cfg, rec_heads=[{"margin": "cosface"}]), 0)
    assert bare.margin_args == {}  # the run's are arcface's


def test_a_batch_too_small_for_every_head_is_refused():
    cfg = config_of_two(global_batch_size=16, rec_shares=[15, 1])
    with pytest.raises(ValueError, match="leaves 1 for one of the sets"):
        multi_head.check_rows(cfg, Order((100, 100), 0, (15, 1)), 1)
