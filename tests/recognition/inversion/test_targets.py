"""What is inverted: classes and embeddings, chosen or refused."""

from __future__ import annotations

import itertools
import os

import numpy as np
import onnx as modules
import pytest
import torch

from recognition.checkpoint import load_backbone
from recognition.inversion import __main__ as program
from recognition.inversion import faces, plan, work


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
    numbers = faces.images_of_each(labels, 1)
    assert numbers.tolist() == [0, 3, 5]
    assert faces.images_of_each(labels, 2).tolist() == [0, 1, 3, 4, 5]
    assert [part.tolist() for part in work.batches(numbers, 2)] == [[0, 3], [5]]


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
    assert "is not the directory of an inversion: it holds checkpoints" in capsys.readouterr().err
    assert not os.path.exists(os.path.join(run, "images"))
