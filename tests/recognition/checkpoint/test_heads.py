"""Checkpoints of several heads, and those that an earlier version wrote."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from data_tools.common.errors import UserError
from recognition import checkpoint
from recognition.backbones import BACKBONES
from recognition.checkpoint import export_command, inspect_command
from recognition.checkpoint import manifest as manifests
from recognition.head import PartialFC
from recognition.losses import make_margin
from recognition.optim import RowAdamW, RowSGD
from recognition.weights import saved_rows
from tests import ranks
from tests.recognition import runs

# Two heads over different classes, with different losses and optimisers; 11 and 13 divide by no W.
HEADS = [("uniface", 11, RowSGD, 1), ("jamsface", 13, RowAdamW, 3)]


def make_parts(heads=HEADS, network_seed=0):
    torch.manual_seed(network_seed)
    backbone = BACKBONES["mbf_tiny"](embedding_size=8)
    optimizer = torch.optim.AdamW(backbone.parameters(), 0.1, fused=True)
    for p in backbone.parameters():  # what a first step would have left
        drawn = [torch.rand_like(p), torch.rand_like(p)]
        optimizer.state[p] = {
            "step": torch.tensor(5.0),
            "exp_avg": drawn[0],
            "exp_avg_sq": drawn[1],
        }
    made = []
    for name, classes, row_optimizer, centres in heads:
        head = PartialFC(make_margin(name, {}), 8, classes, 1.0, centres, seed=network_seed)
        made.append(checkpoint.HeadParts(head, row_optimizer(head)))
    return checkpoint.Parts(backbone, optimizer, made)


def mark(part, salt):
    """Every value a function of its class, its name and the head."""
    start, stop = part.head.shard
    for i, tensor in enumerate(part.rows().values()):
        classes = torch.arange(start, stop).view(-1, *[1] * (tensor.dim() - 1))
        tensor.copy_(classes + 100 * i + 1000 * salt)
    for i, tensor in enumerate(part.margin().values()):
        tensor.fill_(i + 0.5 + salt)
    part.head.step = 3 + salt


def saved(run_dir, heads=HEADS):
    parts = make_parts(heads)
    for salt, part in enumerate(parts.heads):
        mark(part, salt)
    margins = [{"margin": name} for name, *_ in heads]
    config = {"network": "mbf_tiny", "margin": "softmax", "rec_heads": margins}
    facts = {"step": 3, "samples_seen": 36, "config": config}
    saver = checkpoint.Saver(run_dir, parts.group, checkpoint.Keep(1), background=False)
    return saver.save_now(parts, facts)


def loaded_alike(path, heads):
    """Whether a load gives what was marked; the message of the refusal, if it is refused."""
    parts = make_parts(heads, network_seed=1)
    try:
        checkpoint.load(path, parts)
    except ValueError as error:
        return str(error)
    expected = make_parts()
    for salt, (part, there) in enumerate(zip(expected.heads, parts.heads, strict=True)):
        mark(part, salt)
        assert part.head.step == there.head.step
        for own, other in ((part.rows(), there.rows()), (part.margin(), there.margin())):
            assert own.keys() == other.keys()
            assert all(torch.equal(own[name], other[name]) for name in own)
    for own, other in zip(whole_model(expected), whole_model(parts), strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
    return True


def whole_model(parts):
    optimizer = checkpoint.optimizer_tensors(parts.backbone, parts.optimizer, parts.scaler)
    return parts.backbone.state_dict(), optimizer


@pytest.mark.parametrize("world", [1, 2, 3, pytest.param(8, marks=pytest.mark.long)])
def test_two_heads_saved_on_four_ranks(tmp_path, world):
    """Every row and every optimiser value is that of its class, at any number of processes."""
    path = ranks.run(4, saved, str(tmp_path))[0]
    rows = {f"head0-rows-{cut}" for cut in ("0-3", "3-6", "6-9", "9-11")}
    rows |= {f"head1-rows-{cut}" for cut in ("0-4", "4-7", "7-10", "10-13")}
    others = {"model", "optimizer", "head0-margin"}
    files = {name.removesuffix(".safetensors") for name in os.listdir(path)}
    assert files == rows | others | {"manifest.json"}
    assert ranks.run(world, loaded_alike, path, HEADS) == [True] * world


def test_other_heads_are_refused(tmp_path):
    path = ranks.run(1, saved, str(tmp_path))[0]
    (message,) = ranks.run(1, loaded_alike, path, HEADS[:1])
    assert "2 heads there, 1 here" in message
    (message,) = ranks.run(1, loaded_alike, path, HEADS[::-1])
    assert "head0-num_classes 11 there, 13 here" in message


def test_centres_of_several_heads_start_one(tmp_path):
    """In the order of the sets; of other shapes they are no one head."""
    alike = [HEADS[0], ("cosface", 13, RowSGD, 1)]
    path = ranks.run(2, saved, str(tmp_path / "alike"), alike)[0]
    rows = saved_rows.open_rows(path)[np.arange(24)]
    assert rows[:, 0].tolist() == [*range(11), *range(1000, 1013)]
    path = ranks.run(1, saved, str(tmp_path / "others"))[0]
    with pytest.raises(ValueError, match=r"several shapes: \[11, 8\], \[13, 3, 8\]"):
        saved_rows.open_rows(path)


def test_the_losses_of_several_heads_are_told(tmp_path):
    ranks.run(1, saved, str(tmp_path))
    told = inspect_command.describe(checkpoint.newest(str(tmp_path)))
    assert told["margins"] == ["uniface", "jamsface"]
    config = told | {"rec": ["a", "b"], "rec_heads": [{}, {"margin": "jamsface"}]}
    manifest = checkpoint.read_manifest(told["path"])
    card = export_command.make_card(config | {"embedding_size": 8}, manifest, {})
    assert card["rec_heads"] == config["rec_heads"]


def test_a_checkpoint_of_another_format_is_refused(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "precision": "fp32", "output": str(tmp_path / "run")}
    ranks.run(1, runs.run, keys, 1)
    path = checkpoint.newest(keys["output"])
    for number in (1, 3):
        manifests.amend(path, {"format": number})
        with pytest.raises(UserError, match=f"format {number}, but this version reads 2"):
            checkpoint.read_manifest(path)
