"""The input contract of a foreign network: sizes, orders, scales, and who may state it."""

import json

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper

from eval import __main__ as cli
from eval.embedders.contract import InputContract, sidecar
from recognition.backbones import BACKBONES
from recognition.weights import networks
from tests.eval.embedders.test_embed import IMAGES, channel_means, make_run


def rows(path, batch, width, dim):
    """An ONNX network whose embedding starts with the mean of each channel and column 0."""
    kind = TensorProto.FLOAT
    image = helper.make_tensor_value_info("data", kind, [batch, 3, 112, width])
    weight = np.eye(3 * width, dim, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["data", "axes"], ["m"], keepdims=0),
            helper.make_node("Flatten", ["m"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["fc1"]),
        ],
        "columns",
        [image],
        [helper.make_tensor_value_info("fc1", kind, [batch, dim])],
        [
            numpy_helper.from_array(np.array([2], np.int64), "axes"),
            numpy_helper.from_array(weight, "w"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("width", [112, 96])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("mean, std", [(127.5, 127.5), (127.5, 128.0), (0.0, 1.0)])
def test_every_published_form(tmp_path, batch, dim, width, order, mean, std):
    path = rows(tmp_path / "a.onnx", batch, width, dim)
    changes = {"color_order": order, "mean": mean, "std": std}
    embedder = networks.open_embedder(path, 3, changes)
    x = IMAGES[:, :, 8:104] if width == 96 else IMAGES
    x = x[..., ::-1] if order == "BGR" else x
    expected = ((x.astype(np.float64) - mean) / std).mean(axis=1)  # [n, width, 3]
    expected = expected.transpose(0, 2, 1).reshape(len(x), -1)[:, :dim]
    found = embedder(IMAGES)
    assert found.shape == (5, dim)
    wide = min(dim, expected.shape[1])
    np.testing.assert_allclose(found[:, :wide], expected[:, :wide], atol=2e-6 * std + 1e-4 * mean)


def test_who_states_the_contract(tmp_path):
    path = channel_means(tmp_path / "a.onnx")
    assert networks.open_embedder(path).contract == InputContract()
    sidecar(path).write_text(json.dumps({"color_order": "BGR", "std": 128}))
    assert networks.open_embedder(path).contract == InputContract(color_order="BGR", std=128)
    other = tmp_path / "other.json"
    other.write_text('{"mean": 0, "std": 1}')
    assert networks.open_embedder(path, contract_file=other).contract == InputContract(
        mean=0, std=1
    )
    both = networks.open_embedder(path, changes={"std": 2.0}, contract_file=other).contract
    assert both == InputContract(mean=0, std=2)
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="a run's input contract is fixed"):
        networks.open_embedder(tmp_path / "run", changes={"std": 2.0})


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must be a JSON object"),
        ("{", "not JSON"),
        ('{"colour_order": "BGR"}', "unknown entry 'colour_order'; did you mean color_order"),
        ('{"color_order": "GRB"}', "is not a valid input contract: GRB"),
        ('{"std": 0}', "is not a valid input contract"),
        ('{"std": "1"}', "std is '1'"),
        ('{"mean": NaN}', "is not a valid input contract"),
        ('{"width": 96}', "takes images of 112 x 112, but its contract says 112 x 96"),
        ('{"height": true}', "height is True"),
    ],
)
def test_contracts_that_are_none(tmp_path, text, message):
    path = channel_means(tmp_path / "a.onnx")
    sidecar(path).write_text(text)
    with pytest.raises(ValueError, match=message):
        networks.open_embedder(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("network", ["mbf_tiny", "r18"])
def test_backbone_files_are_recognised_by_their_tensors(tmp_path, network, suffix):
    torch.manual_seed(0)
    module = BACKBONES[network](embedding_size=48).eval()
    path = tmp_path / f"backbone{suffix}"
    if suffix == ".pt":
        torch.save(module.state_dict(), path)
    else:
        safetensors.torch.save_file(module.state_dict(), path)
    embedder = networks.open_embedder(path, changes={"color_order": "BGR"})
    assert embedder.facts["network"] == network and embedder.facts["embedding_size"] == 48
    x = torch.from_numpy(IMAGES[..., ::-1].transpose(0, 3, 1, 2).copy()).float()
    with torch.no_grad():
        expected = module(x.div(255).sub(0.5).div(0.5)).numpy()
    np.testing.assert_allclose(embedder(IMAGES), expected, atol=2e-5 * abs(expected).max())


def test_files_that_are_no_backbone(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="a.pt is not a backbone"):
        networks.open_embedder(tmp_path / "a.pt")
    torch.save({"x": torch.ones(2, 3)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: its 1 tensors \(x\) fit none of our networks"):
        networks.open_embedder(tmp_path / "b.pt")


def swapped(path):
    """Means of the channels whose red matters: a network that was trained on BGR."""
    channel_means(path)
    model = onnx.load(path)
    del model.graph.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(np.array([4, 1, 0.1], np.float32), "w"))
    onnx.save(model, path)
    return path


def test_a_wrong_channel_order_is_warned_of(tmp_path, capsys):
    import pickle

    import cv2

    rng = np.random.default_rng(0)
    images, labels = [], []
    for i in range(120):  # people differ in red; green and blue are the light
        same = i % 2 == 0
        reds = [rng.uniform(30, 220)] * 2 if same else rng.uniform(30, 220, 2)
        for red in reds:
            pixels = np.empty((112, 112, 3), np.uint8)
            pixels[:] = [rng.uniform(0, 255), rng.uniform(100, 155), red]  # BGR
            images.append(cv2.imencode(".png", pixels)[1].tobytes())
        labels.append(same)
    (tmp_path / "red.bin").write_bytes(pickle.dumps((images, labels)))
    # The embedding is the channels as they arrive, the first weighed most: it should be red.
    model = swapped(tmp_path / "a.onnx")
    assert cli.main(["lfw", str(model), str(tmp_path / "red.bin"), "--color-order", "BGR"]) == 0
    err = capsys.readouterr().err
    assert "verify better with --color-order RGB" in err and "is the input contract" in err
    assert cli.main(["lfw", str(model), str(tmp_path / "red.bin")]) == 0
    assert "verify better" not in capsys.readouterr().err
    cli.main(["lfw", str(model), str(tmp_path / "red.bin"), "--color-order", "BGR",
              "--no-contract-check"])  # fmt: skip
    assert "verify better" not in capsys.readouterr().err


def test_flags_reach_the_network_and_the_result(tmp_path, capsys, bin_file):
    model = channel_means(tmp_path / "a.onnx")
    flags = ["--mean", "0", "--std", "1", "--color-order", "BGR", "--json"]
    words = ["lfw", str(model), str(bin_file), *flags, "--results", str(tmp_path / "r")]
    assert cli.main(words) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["model"]["input"]["color_order"] == "BGR" and out["model"]["input"]["mean"] == 0
    saved = json.loads((tmp_path / "r" / "lfw-colors.json").read_text())
    assert saved["contract"]["input"] == "BGR, 112 x 112, (pixel - 0) / 1"
    assert set(saved["contract"]) >= {"alignment", "flip", "score", "accuracy", "far_rules"}
