"""Distillation: the lesson and its gradient at any number of ranks, and every kind of teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_tools import shards
from data_tools.images.decode import decode
from recognition.backbones import BACKBONES
from recognition.checkpoint import load_backbone
from recognition.export.to_onnx import export_onnx
from recognition.weights import distill
from tests import ranks
from tests.recognition import runs

CPU = torch.device("cpu")


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def dense(x, t, kind):
    """Written out."""
    if kind == "cosine":
        return (1 - (unit(x) * unit(t)).sum(1)).mean()
    return ((x - t) ** 2).sum(1).mean()


def of_rank(counts, kind):
    """(loss, gradient averaged as DDP does) of a linear student on this rank's rows."""
    generator = torch.Generator().manual_seed(0)
    images, t = torch.randn(2, sum(counts), 5, generator=generator, dtype=torch.float64)
    weight = torch.eye(5, dtype=torch.float64).add(0.3).requires_grad_(True)
    rank = dist.get_rank()
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    loss = distill.distillation_loss(images[own] @ weight, t[own], kind, counts, dist.group.WORLD)
    loss.backward()
    dist.all_reduce(weight.grad)
    return loss.item(), weight.grad / len(counts)


@pytest.mark.parametrize("kind", ["cosine", "feature"])
@pytest.mark.parametrize("counts", [[7], [4, 3], [1, 6]])
def test_every_number_of_ranks_is_the_dense_loss(kind, counts):
    generator = torch.Generator().manual_seed(0)
    images, t = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    weight = torch.eye(5, dtype=torch.float64).add(0.3).requires_grad_(True)
    expected = dense(images @ weight, t, kind)
    expected.backward()
    for loss, gradient in ranks.run(len(counts), of_rank, counts, kind):
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(gradient, weight.grad, rtol=1e-10, atol=1e-12)


@pytest.fixture
def keys(shards_dir, tmp_path):
    return {"rec": str(shards_dir), "output": str(tmp_path / "student"), "max_steps": 2}


@pytest.fixture(scope="module")
def teachers(shards_dir, tmp_path_factory):
    """One network as a run, as ONNX and as stored embeddings."""
    root = tmp_path_factory.mktemp("teachers")
    keys = {"rec": str(shards_dir), "output": str(root / "run"), "max_steps": 2, "seed": 9}
    ranks.run(1, runs.run, keys)
    module, _ = load_backbone(str(root / "run"))
    export_onnx(module, root / "x.onnx", metadata={})
    data = shards.open(shards_dir)
    pixels = np.stack([decode(data[i][1]) for i in range(len(data))]).astype(np.float32)
    with torch.no_grad():
        rows = module(torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)).numpy()
    np.save(root / "x.npy", rows)
    return {"run": root / "run", "onnx": root / "x.onnx", "npy": root / "x.npy"}


def test_run_onnx_and_stored_embeddings_teach_the_same(teachers, shards_dir):
    data = shards.open(shards_dir)
    ids = np.array([3, 0, 7])
    pixels = np.stack([decode(data[int(i)][1]) for i in ids]).astype(np.float32)
    x = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    found = [
        distill.open_teacher(str(path), 32, len(data), CPU, "fp32")(x, ids)
        for path in teachers.values()
    ]
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-4 * found[0].abs().max()


def test_a_run_with_a_teacher_learns_its_directions(teachers, keys, shards_dir):
    mild = {"margin": "softmax", "margin_args": {"scale": 8.0}, "lr": 0.1}
    more = keys | mild | {"max_steps": 40, "teacher": str(teachers["run"])}
    plain = ranks.run(2, runs.run, more | {"teacher_weight": 0.0})[0]
    more |= {"output": keys["output"] + "2", "teacher_weight": 100.0}
    taught = ranks.run(2, runs.run, more)[0]
    data = shards.open(shards_dir)
    pixels = np.stack([decode(data[i][1]) for i in range(len(data))]).astype(np.float32)
    x = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    teacher, _ = load_backbone(str(teachers["run"]))

    def agreement(state):
        module = BACKBONES[runs.BASE["network"]](embedding_size=32)
        named = {k.removeprefix("backbone."): v for k, v in state.items() if k[:9] == "backbone."}
        module.load_state_dict(named)
        with torch.no_grad():  # in training mode: so few steps leave BatchNorm's statistics behind
            return (unit(module(x)) * unit(teacher(x))).sum(1).mean().item()

    assert agreement(taught) > agreement(plain) + 0.1


def test_teachers_that_do_not_fit(teachers, shards_dir, tmp_path):
    n = len(shards.open(shards_dir))
    for path, size, number, words in [
        (teachers["run"], 64, n, "gives embeddings of 32, the student of 64: embedding_size=32"),
        (teachers["npy"], 32, n + 1, rf"expected floats \[{n + 1}, 32\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            distill.open_teacher(str(path), size, number, CPU, "fp32")
    rows = np.load(teachers["npy"])
    rows[3] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    teacher = distill.open_teacher(str(tmp_path / "nan.npy"), 32, n, CPU, "fp32")
    teacher(torch.zeros(1), np.array([2]))
    with pytest.raises(ValueError, match="image 3 is not finite"):
        teacher(torch.zeros(2), np.array([2, 3]))
    broken = tmp_path / "broken.npy"
    np.savez(broken.with_suffix(".npz"), rows)
    for content in (b"", b"x", broken.with_suffix(".npz").read_bytes(), None):
        broken.unlink(missing_ok=True)
        if content is not None:
            broken.write_bytes(content)
        with pytest.raises(ValueError, match="teacher=.*broken.npy"):
            distill.open_teacher(str(broken), 32, n, CPU, "fp32")
    with pytest.raises(FileNotFoundError, match="no such run"):
        distill.open_teacher("nowhere", 32, n, CPU, "fp32")
