"""Inversion: its terms against plain formulas, its runs against themselves, its numbers against
cases whose answers are known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import onnx as modules
import pytest
import torch
import torch.distributed as dist
from torch import nn

from data_tools import shards
from recognition.backbones import BACKBONES
from recognition.checkpoint import load_backbone
from recognition.distributed.runtime import Runtime
from recognition.inversion import __main__ as program
from recognition.inversion import faces, measure, metrics, pictures, plan, prior, privacy, work
from recognition.inversion.descent import Batch, descend
from recognition.inversion.identity import ClosedSet, OpenSet, centres
from recognition.inversion.settings import Settings
from tests import ranks
from tests.conftest import command
from tests.real import real
from tests.recognition import runs

CPU = torch.device("cpu")
FEW = ["--steps", "4", "--batch-size", "3", "--save-every", "2", "--picture-every", "2"]


@pytest.fixture(scope="module")
def trained(shards_dir, tmp_path_factory):
    """A run on two processes, and another seed's."""
    made = {}
    for seed in (3, 4):
        made[seed] = str(tmp_path_factory.mktemp("inverted") / f"run-{seed}")
        keys = {"rec": str(shards_dir), "output": made[seed], "seed": seed, "max_steps": 2}
        ranks.run(2, runs.run, keys)
    return made


def images_of(out):
    return {path.name: cv2.imread(str(path)) for path in sorted((out / "images").iterdir())}


def same(one, other):
    one, other = images_of(one), images_of(other)
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


# --- The terms of the loss ---


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
    batch = Batch.start(settings, 0, np.array([0, 1]), CPU)
    batch.images = batch.images[..., :20, :20].double().clone()
    batch.moments = {name: torch.zeros_like(batch.images) for name in batch.moments}
    x = batch.images.clone()
    descend(network, OpenSet(targets, "unit", CPU), batch, settings, [2])
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


# --- Metrics ---


def test_likeness_of_known_faces():
    gallery = np.eye(4) * 3
    made = np.array([[1.0, 0, 0, 0], [0, 1, 2, 0], [0, 0, 1, 0], [0, 0, 0, 9]])
    found = metrics.likeness(made, [gallery[:3], gallery[3:]], np.arange(4))
    assert found["identity_rate"] == 0.75  # the second is nearer to the third
    assert found["cosine_mean"] == pytest.approx((3 + 5**-0.5) / 4)
    assert (found["chance"], found["times_chance"], found["gallery"]) == (0.25, 3.0, 4)
    tie = metrics.likeness(np.array([[1.0, 1, 0, 0]]), [gallery], np.array([0]))
    assert tie["identity_rate"] == 0  # as near to another: not told apart
    centres_of_two = np.stack([np.eye(4)[:2], np.eye(4)[2:]])  # [2 classes, 2 centres, 4]
    several = metrics.likeness(np.eye(4)[[1]], [centres_of_two], np.array([0]))
    assert several["cosine_mean"] == 1.0 and several["identity_rate"] == 1.0


def test_frechet_distance_is_that_of_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    for n, m, size in ((50, 70, 6), (40, 9, 12), (5, 4, 12)):
        a = generator.normal(size=(n, size)) @ generator.normal(size=(size, size))
        b = generator.normal(size=(m, size)) + 1
        s, t = np.cov(a.T), np.cov(b.T)
        root = np.linalg.eigvals(s @ t)  # tr of the root: sum of roots of the eigenvalues
        root = np.sqrt(np.maximum(root.real, 0)).sum()
        if n > size and m > size:
            assert np.trace(linalg.sqrtm(s @ t)).real == pytest.approx(root, rel=1e-8)
        gap = a.mean(0) - b.mean(0)
        expected = gap @ gap + np.trace(s) + np.trace(t) - 2 * root
        assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(s))
    one = generator.normal(size=(100000, 1))
    assert metrics.frechet_distance(one, 3 * one + 5) == pytest.approx(
        (2 * one.mean() + 5) ** 2 + 4 * one.var(ddof=1), rel=1e-9
    )
    for wrong in (a[:1], a[:, :3], np.full_like(a, np.nan)):
        with pytest.raises(ValueError):
            metrics.frechet_distance(wrong, b)


def test_a_threshold_lets_no_more_impostors_pass_than_its_far():
    scores = np.random.default_rng(0).permutation(np.arange(1000) / 1000)
    for far, count in ((0.01, 10), (0.001, 1), (0.5, 500)):
        assert (scores > privacy.threshold_at(scores, far)).sum() == count
    assert privacy.threshold_at(scores, 0.0009) is None
    tied = np.zeros(100)
    assert (tied > privacy.threshold_at(tied, 0.1)).sum() == 0


def test_pictures_are_clipped_and_laid_out():
    images = torch.zeros(5, 3, 112, 112)
    images[1] = 3.0
    pixels = pictures.as_pixels(images)
    assert pixels[0].max() in (127, 128) and (pixels[1] == 255).all()
    laid = pictures.grid(pixels)
    assert laid.shape == (224, 336, 3) and (laid[:112, 112:224] == 255).all()
    assert laid[0, 0, 0] in (127, 128) and (laid[112:, 224:] == 255).all()


# --- What is inverted ---


def test_ids_are_chosen_or_refused():
    known = np.arange(10)
    assert plan.choose("7,0-2", 5, known, 0, "class").tolist() == [7, 0, 1, 2]
    drawn = plan.choose(None, 4, known, 0, "class")
    assert len(set(drawn.tolist())) == 4 and (drawn == plan.choose(None, 4, known, 0, "")).all()
    assert plan.choose(None, 99, known, 0, "class").tolist() == known.tolist()
    for text, told in (("10", "no class 10"), ("3,1-4", "twice"), ("a", "neither"), ("5-2", "nei")):
        with pytest.raises(ValueError, match=told):
            plan.choose(text, 5, known, 0, "class")


def test_batches_are_of_different_identities():
    labels = np.array([0, 0, 0, 1, 1, 2, -1])
    numbers, rank = faces.Faces("", labels, lambda i: b"").by_round(2)
    assert numbers.tolist() == [0, 3, 5, 1, 4]
    parts = work.batches(numbers, rank, 2)
    assert [part.tolist() for part in parts] == [[0, 3], [5], [1, 4]]


def test_embeddings_that_cannot_be_are_refused(tmp_path):
    good = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    path = tmp_path / "e.npy"

    def refused(told, content, size=8, **more):
        np.savez(tmp_path / "e.npz", embeddings=content, **more) if more else np.save(path, content)
        with pytest.raises(ValueError, match=told):
            faces.load_embeddings(tmp_path / "e.npz" if more else path, size)

    refused("floats \\[N, 9\\]", good, 9)
    refused("floats", good.astype(int))
    refused("row 2 is not finite", np.where(np.arange(4)[:, None] == 2, np.nan, good))
    refused("row 1 is all zeros", good * (np.arange(4) != 1)[:, None])
    refused("no embedding", good[:0])
    refused("labels", good, labels=np.zeros(3, int))
    np.savez(tmp_path / "e.npz", rows=good)
    with pytest.raises(ValueError, match="`embeddings` is wanted"):
        faces.load_embeddings(tmp_path / "e.npz", 8)
    np.savez_compressed(tmp_path / "e.npz", embeddings=good)
    whole = (tmp_path / "e.npz").read_bytes()
    wrong = [b"", b"nothing", whole[:100], whole[:90] + b"zzzz" + whole[94:]]
    for content, place in itertools.product(wrong, (path, tmp_path / "e.npz")):
        place.write_bytes(content)
        with pytest.raises(ValueError, match=f"{place.name} is no whole .npy"):
            faces.load_embeddings(place, 8)
    np.savez(tmp_path / "e.npz", embeddings=good, labels=np.array([1, 1, 0, 5]))
    assert faces.load_embeddings(tmp_path / "e.npz", 8)[1].tolist() == [1, 1, 0, 5]


def test_mistakes_are_told(trained, tmp_path, shards_dir, capsys):
    run, out = trained[3], str(tmp_path / "out")
    np.save(tmp_path / "e.npy", np.ones((2, 32), np.float32))
    backbone = tmp_path / "b.pt"
    torch.save(load_backbone(run)[0].state_dict(), backbone)
    onnx = tmp_path / "m.onnx"
    helper, shapes = modules.helper, ([None, 3, 112, 112], [None, 3, 112, 112])
    kinds = [helper.make_tensor_value_info(n, 1, s) for n, s in zip("xy", shapes, strict=True)]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", kinds[:1], kinds[1:])
    opset = [helper.make_opsetid("", 18)]
    modules.save(helper.make_model(graph, opset_imports=opset, ir_version=10), onnx)
    for told, arguments in (
        ("neither a number", [run, "--ids", "²"]),
        ("--seed -1", [run, "--seed", "-1"]),
        ("--other nowhere", [run, "--other", "nowhere"]),
        ("--fid nowhere", ["privacy", run, "--data", str(shards_dir), "--fid", "nowhere"]),
        ("no class 16", [run, "--ids", "16"]),
        ("--head 1", [run, "--head", "1"]),
        ("no head", [str(backbone), "--ids", "0"]),
        ("gives no gradients", [str(onnx)]),
        ("no run directory", [str(tmp_path / "nothing")]),
        ("--steps 0", [run, "--steps", "0"]),
        ("--lr nan", [run, "--lr", "nan"]),
        ("--save-every", [run, "--save-every", "0"]),
        ("row i", [run, "--embeddings", str(tmp_path / "e.npy"), "--images", str(shards_dir)]),
        ("--data goes with classes", [run, "--data", "x", "--images", "y"]),
        ("nothing to invert", ["privacy", run]),
        ("--far 2", ["privacy", run, "--far", "2", "--embeddings", str(tmp_path / "e.npy")]),
    ):  # fmt: skip
        capsys.readouterr()
        assert program.main([*arguments, "--out", out]) == 1, arguments
        assert told in capsys.readouterr().err, arguments
    assert not os.path.exists(out)
    assert program.main([run, "--out", run, "--ids", "0"]) == 1
    assert "no directory of an inversion, it holds checkpoints" in capsys.readouterr().err
    assert not os.path.exists(os.path.join(run, "images"))


# --- Runs ---


def test_a_run_says_what_it_made(trained, tmp_path, shards_dir, capsys):
    out = tmp_path / "out"
    line = [trained[3], "--out", str(out), "--count", "5", *FEW]
    assert program.main([*line, "--other", trained[4], "--fid", trained[4]]) == 0
    told = capsys.readouterr()
    assert "chance 6.2 %" in told.out and "step 4/4" in told.err
    report = json.loads((out / "report.json").read_text())
    assert report["under_itself"]["gallery"] == report["under_others"][0]["gallery"] == 16
    assert report["bn_distance"]["batch_size"] == 3 and report["bn_distance"]["real"] > 0
    assert report["fid"]["distance"] > 0 and "rank 4" in report["fid"]["note"]
    assert len(images_of(out)) == 5 and not list((out / "state").glob("*.safetensors"))
    assert (out / "progress" / "batch-00000.png").is_file() and (out / "grid.png").is_file()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["settings"]["steps"] == 4 and len(settings["ids"]) == 5

    # The numbers are those of the PNG files, computed anew.
    module, _ = load_backbone(trained[3])
    x = np.stack([cv2.imread(str(p))[..., ::-1] for p in sorted((out / "images").iterdir())])
    with torch.no_grad():
        e = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1)
    cos = metrics.unit(e.numpy()) @ metrics.unit(np.concatenate(list(centres(trained[3])))).T
    ids = [int(p.stem) for p in sorted((out / "images").iterdir())]
    assert report["under_itself"]["cosine_mean"] == pytest.approx(
        cos[np.arange(5), ids].mean(), abs=1e-5
    )
    assert report["under_itself"]["identity_rate"] == (cos.argmax(1) == ids).mean()

    # The same line again makes nothing; another line is refused.
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert program.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    capsys.readouterr()
    assert program.main([*line, "--lr", "0.1"]) == 1
    assert "lr 0.25 there, 0.1 now" in capsys.readouterr().err

    # What was taken away is made again, to the bit; what is damaged is told by name.
    face = min(before)
    content = face.read_bytes()
    face.unlink()
    assert program.main(line) == 0 and face.read_bytes() == content
    for wrong in ("{", "[]"):
        (out / "settings.json").write_text(wrong)
        assert program.main(line) == 1
        assert f"{out / 'settings.json'} is damaged" in capsys.readouterr().err
    for wrong in ("{", "[]", "{}"):
        (out / "state" / "batch-00000.json").write_text(wrong)
        with pytest.raises(ValueError, match="batch-00000.json is damaged"):
            work.terms_of(out, 1)


def test_a_class_row_that_has_changed_is_told(trained, tmp_path):
    shutil.copytree(trained[3], tmp_path / "run")
    (rows, *_) = sorted(tmp_path.glob("run/checkpoints/*/rows-*.safetensors"))
    content = bytearray(rows.read_bytes())
    content[-40] ^= 64
    rows.write_bytes(content)
    with pytest.raises(AssertionError, match="rows-.* is damaged: its sha256"):
        ranks.run(2, closed_set_of, str(tmp_path / "run"))


def closed_set_of(run):
    return ClosedSet(run, dist.group.WORLD, CPU, 0).in_step


def test_a_state_file_of_another_step_is_refused(tmp_path):
    settings = Settings(batch_size=2)
    batch = Batch.start(settings, 0, np.arange(2), CPU)
    batch.step = 7
    path = str(tmp_path / "x.safetensors")
    batch.save(path)
    Batch.start(settings, 0, np.arange(2), CPU).load(path, 7)
    for told, change in (("it is of step 7", None), ("damaged", b""), ("damaged", b"x" * 50)):
        if change is not None:
            (tmp_path / "x.safetensors").write_bytes(change)
        with pytest.raises(ValueError, match=told):
            Batch.start(settings, 0, np.arange(2), CPU).load(path, 500)


def test_embeddings_that_are_not_finite_are_told(tmp_path):
    for i in range(2):
        pictures.write(tmp_path / f"{i}.png", np.full((112, 112, 3), 90 * i, np.uint8))
    folder = faces.open_faces(tmp_path)

    def broken(pixels):
        return np.where(pixels.mean((1, 2, 3))[:, None] > 50, np.nan, 1.0) * np.ones((1, 4))

    with pytest.raises(ValueError, match=r"embedding of image 1 of .* is not finite \(1 of 2\)"):
        folder.embed(broken, [0, 1])
    with pytest.raises(ValueError, match="no image"):
        folder.embed(broken, [])


def test_classes_without_images_are_left_out_and_counted(trained, shards_dir):
    """Under another network; and images of other labels are not taken for the training set's."""
    everyone = faces.open_faces(shards_dir)
    few = faces.Faces("few", np.where(everyone.labels == 1, -1, everyone.labels), everyone._get)
    ids, size = np.array([0, 1, 5]), int(everyone.labels.max()) + 1
    made = SimpleNamespace(embed=lambda embed: embed(everyone.pixels(everyone.by_round(1)[0][ids])))
    asked = SimpleNamespace(
        faces=few, numbers=None, ids=ids, gallery=lambda: iter([np.zeros((size, 32))])
    )
    found = measure.under_another(asked, made, trained[4])
    assert found["without_images"] == 1 and found["images"] == 2 and found["gallery"] == size - 1
    assert "1 classes have no image" in measure._likeness("", found)
    asked.ids = ids[1:2]
    assert "no image" in measure.under_another(asked, made, trained[4])["not_measured"]


def test_data_of_other_labels_are_not_measured_with(trained, shards_dir, monkeypatch):
    everyone = faces.open_faces(shards_dir)
    assert plan._reference(None, trained[3], 0, 16) is not None
    everyone.labels = everyone.labels[::-1]
    monkeypatch.setattr(plan, "open_faces", lambda path, resize: everyone)
    assert plan._reference(None, trained[3], 0, 16) is None
    with pytest.raises(ValueError, match="labels are not those"):
        plan._reference(str(shards_dir), trained[3], 0, 16)


def test_thresholds_of_many_embeddings_are_drawn_from_some(trained, tmp_path):
    """Without images: all pairs of 20 000 embeddings would take 3 GB."""
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(20000, 32)).astype("f4"))
    out = tmp_path / "out"
    line = ["privacy", trained[3], "--out", str(out), "--embeddings", str(tmp_path / "e.npy")]
    assert program.main([*line, "--count", "2", "--steps", "1", "--batch-size", "2"]) == 0
    (found,) = json.loads((out / "report.json").read_text())["under"]
    assert found["impostor_pairs"] == 3000 * 2999 // 2 and found["gallery"] == 20000


def synthesise_here(run, out, stop_at, options):
    """As the command, in the group of the pool; `stop_at`: end there, as a kill would."""
    settings = Settings(**options)
    here = Runtime(CPU, dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    torch.use_deterministic_algorithms(True)
    network = load_backbone(run)[0].requires_grad_(False).double()
    identity = ClosedSet(run, here.group, CPU, 0)
    identity.head.double()
    ids = np.array([1, 9, 15])
    parts = work.batches(ids, np.zeros(3), settings.batch_size)
    names = {int(i): f"{i:08d}" for i in ids}
    start, saving = Batch.start, Batch.save

    def in_fp64(*arguments):
        batch = start(*arguments)
        batch.images = batch.images.double()
        batch.moments = {name: moment.double() for name, moment in batch.moments.items()}
        return batch

    def then_stop(batch, path):
        saving(batch, path)
        os.makedirs(out / "kept", exist_ok=True)
        shutil.copy(path, out / "kept")
        if stop_at == (here.rank, batch.step):
            raise KeyboardInterrupt

    Batch.start, Batch.save = in_fp64, then_stop
    try:
        with work.directory(out, {"settings": options}, here):
            work.synthesise(
                network, identity, parts, names, settings, out, here, work.Every(2, 10, 10)
            )
    except KeyboardInterrupt:
        if here.world > 1:
            raise
    finally:
        Batch.start, Batch.save = start, saving
        torch.use_deterministic_algorithms(False)


OPTIONS = {"steps": 5, "batch_size": 2, "flip": True, "jitter": 4, "seed": 5}


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """{processes: an unbroken run}"""
    made = {world: tmp_path_factory.mktemp("whole") / str(world) for world in (1, 2)}
    for world, out in made.items():
        ranks.run(world, synthesise_here, trained[3], out, None, OPTIONS)
    return made


def test_two_processes_make_what_one_makes(whole):
    """Two batches of unequal size, in fp64: the common loss differs in roundings of 1e-16."""
    assert same(whole[1], whole[2]) and len(images_of(whole[1])) == 3
    terms = [work.terms_of(whole[world], 2) for world in (1, 2)]
    for name in ("bn", "tv", "length"):
        assert terms[0][name] == pytest.approx(terms[1][name], rel=1e-9)


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained, whole, tmp_path):
    broken = tmp_path / "broken"
    ranks.run(1, synthesise_here, trained[3], broken, (0, 4), OPTIONS)
    assert [path.name for path in sorted((broken / "state").iterdir())] == [
        "batch-00000-step-2.safetensors", "batch-00000-step-4.safetensors",
    ]  # fmt: skip
    assert not images_of(broken)
    ranks.run(1, synthesise_here, trained[3], broken, None, OPTIONS)
    assert same(whole[1], broken)
    assert work.terms_of(whole[1], 2) == work.terms_of(broken, 2)


def test_ranks_that_ended_at_different_steps_go_on_from_the_common_one(trained, whole, tmp_path):
    broken = tmp_path / "broken"
    # As if rank 0 had saved step 4 and rank 1 had not, and the run had ended there.
    (broken / "state").mkdir(parents=True)
    shutil.copy(whole[2] / "settings.json", broken)
    for number, step in ((0, 2), (0, 4), (1, 2)):
        name = f"batch-{number:05d}-step-{step}.safetensors"
        shutil.copy(whole[2] / "kept" / name, broken / "state" / name)
    ranks.run(2, synthesise_here, trained[3], broken, None, OPTIONS)
    assert same(whole[2], broken)
    assert work.terms_of(whole[2], 2) == work.terms_of(broken, 2)
    # Rank 1 had written that its batch is done, rank 0 had not: both do it again, together.
    (broken / "state" / "batch-00000.json").unlink()
    (broken / "images" / "00000001.png").unlink()
    ranks.run(2, synthesise_here, trained[3], broken, None, OPTIONS)
    assert work.terms_of(whole[2], 2) == work.terms_of(broken, 2)


def test_a_network_without_batchnorm_goes_without_the_prior(tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "vit.pt"
    network = BACKBONES["vit_t"](embedding_size=64)
    torch.save(network.state_dict(), path)
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32))
    line = [str(path), "--out", str(tmp_path / "out"), "--embeddings", str(tmp_path / "e.npy")]
    assert program.main([*line, "--steps", "1"]) == 0
    told = capsys.readouterr()
    assert "no BatchNorm over images: the prior is off" in told.err
    assert "the network has no BatchNorm" in told.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bn_distance"] is None and report["loss"]["bn"] == 0


def test_the_privacy_report(trained, tmp_path, shards_dir, capsys):
    out = tmp_path / "out"
    line = ["privacy", trained[3], "--out", str(out), "--data", str(shards_dir), "--count", "4"]
    assert program.main([*line, *FEW, "--other", trained[4]]) == 0
    labels = np.asarray(shards.open(shards_dir).labels)
    people = [labels[int(name.removesuffix(".png"))] for name in images_of(out)]
    assert len(set(people)) == 4  # a face each of four people, by the image's number
    capsys.readouterr()
    assert program.main([*line, *FEW, "--other", trained[4], "--remove-images", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((out / "report.json").read_text())
    assert printed["under"] == report["under"] and not (out / "images").exists()
    own, other = report["under"]
    assert (own["role"], other["role"]) == ("itself", "another")
    assert own["gallery"] == 4 and own["with_another_image"] == 4
    points = {point["far"]: point for point in other["points"]}
    assert 0 <= points[0.01]["same_image"] <= 1 and "real_photographs" in points[0.01]
    assert "not_measured" in points[0.001]  # 32 images have too few pairs for it
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    line = ["privacy", trained[3], "--out", str(tmp_path / "two"), "--other", trained[4]]
    assert program.main([*line, *FEW, "--embeddings", str(tmp_path / "e.npy")]) == 0
    told = capsys.readouterr().out
    assert "it needs the images" in told and "3 pairs of different people" in told


# --- Long: the real commands, and the proofs ---


def command_line(*arguments):
    return [sys.executable, "-m", "recognition.inversion", *map(str, arguments)]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command_survives_a_kill(trained, tmp_path):
    options = ["--count", "5", "--steps", "40", "--batch-size", "3", "--save-every", "5"]
    command(*command_line(trained[3], "--out", tmp_path / "whole", *options)[1:])
    line = command_line(trained[3], "--out", tmp_path / "broken", *options)
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state = tmp_path / "broken" / "state"
    deadline = time.monotonic() + 120
    while not list(state.glob("batch-00000-step-10.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "report.json").exists()
    command(*line[1:])
    assert same(tmp_path / "whole", tmp_path / "broken")
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "broken")]
    assert reports[0] == reports[1]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_torchrun_splits_the_batches(trained, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = ["-m", "recognition.inversion", trained[3], "--out", tmp_path / "out", *FEW]
    done = command(*torchrun, *line, "--count", 7, "--json")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["under_itself"]["images"] == 7 and len(images_of(tmp_path / "out")) == 7
    worlds = {json.loads(p.read_text())["world"] for p in (tmp_path / "out/state").glob("*.json")}
    assert worlds == {2}


def trained_network(shards, output, seed, steps):
    command(
        "launch/train.py", "launch/configs/demo.py", f"rec={shards}", f"output={output}",
        f"seed={seed}", f"max_steps={steps}", "global_batch_size=64", "val_targets=[]",
        "verify_every=10000", timeout=1200,
    )  # fmt: skip
    return output


def proved(tmp_path, shards, *more):
    """The report of 24 classes inverted in 120 steps, other of another seed."""
    own, other = (trained_network(shards, tmp_path / f"run-{seed}", seed, 150) for seed in (0, 7))
    options = ["--count", "24", "--batch-size", "24", "--steps", "120", "--clip"]
    for name, extra in (("out", ()), *more):
        line = command_line(
            own, "--out", tmp_path / name, "--other", other, "--fid", other, *options, *extra
        )
        command(*line[1:], timeout=1800)
    return [json.loads((tmp_path / n / "report.json").read_text()) for n, _ in (("out", 0), *more)]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_generated_faces_are_inverted_and_the_prior_is_why(tmp_path):
    """Identity rate >= 95 % under the network itself, >= 3 x chance under another; without the
    BatchNorm prior the Frechet distance and the statistics say that the images are worse."""
    command("-m", "data_tools", "synthesize", tmp_path / "f", "--identities", 100, "--images", 15)
    command("-m", "data_tools", "pack", tmp_path / "f", tmp_path / "shards")
    bare, without = proved(tmp_path, tmp_path / "shards", ("without", ("--bn-weight", "0")))
    assert bare["under_itself"]["identity_rate"] >= 0.95
    assert bare["under_others"][0]["times_chance"] >= 3
    assert (tmp_path / "out" / "grid.png").is_file()
    frechet = [report["fid"]["distance"] for report in (bare, without)]
    assert frechet[1] > frechet[0] > bare["fid"]["distance_of_as_many_real_images"]
    distances = [report["bn_distance"]["synthesised"] for report in (bare, without)]
    assert distances[1] > 3 * distances[0]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_real_faces_are_inverted(tmp_path):
    people = sorted(real("lfw112").iterdir())[:150]
    (tmp_path / "f").mkdir()
    for person in people:
        (tmp_path / "f" / person.name).symlink_to(person)
    command("-m", "data_tools", "pack", tmp_path / "f", tmp_path / "shards")
    (report,) = proved(tmp_path, tmp_path / "shards")
    assert report["under_itself"]["identity_rate"] >= 0.95
    assert report["under_others"][0]["times_chance"] >= 3


def test_a_network_is_known_by_its_weights_not_by_how_it_was_typed(tmp_path):
    """A run directory names another checkpoint once the run has gone on; the old one has a name."""
    facts = {"network": {"path": "runs/a", "step": 200, "sha256": "a0"}, "settings": {"steps": 9}}
    (tmp_path / "settings.json").write_text(json.dumps(facts))
    there = facts | {
        "network": {"path": "runs/a/checkpoints/step-200", "step": 200, "sha256": "a0"}
    }
    work.check_settings(tmp_path, there)
    newer = facts | {"network": {"path": "runs/a", "step": 400, "sha256": "b1"}}
    with pytest.raises(ValueError, match=r"network.step 200 there, 400 now.*checkpoints/step-N"):
        work.check_settings(tmp_path, newer)
    with pytest.raises(ValueError, match="steps 9 there, 8 now"):
        work.check_settings(tmp_path, there | {"settings": {"steps": 8}})
