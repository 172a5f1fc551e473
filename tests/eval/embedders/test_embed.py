"""Runs and ONNX files as embedders: what reaches the network, in which batches, what is refused."""

import hashlib
import json

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper

from data_tools.common.errors import UserError
from eval.embedders.contract import InputContract
from recognition.backbones import BACKBONES
from recognition.checkpoint.manifest import FORMAT
from recognition.export.to_onnx import input_facts
from recognition.weights import networks

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)

METADATA = {"input_size": "112,112", "color_order": "RGB", "mean": "127.5", "std": "127.5"}


def channel_means(
    path, batch="n", names=("pool", "flat"), metadata=None, size=112, extra_inputs=()
):
    """An ONNX network whose embedding is the mean of each channel as it arrives."""
    kind = TensorProto.FLOAT
    image = helper.make_tensor_value_info("data", kind, [batch, 3, size, size])
    others = [helper.make_tensor_value_info(name, kind, [3]) for name in extra_inputs]
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["data"], ["p"], name=names[0]),
            helper.make_node("Flatten", ["p"], ["f"], name=names[1]),
            helper.make_node("Mul", ["f", "w"], ["fc1"], name="weighted"),
        ],
        "means",
        [image, *others],
        [helper.make_tensor_value_info("fc1", kind, [batch, 3])],
        [numpy_helper.from_array(np.ones(3, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


def make_run(path, network="mbf_tiny", seed=0):
    """A run directory with one checkpoint of a network as it was drawn."""
    torch.manual_seed(seed)
    module = BACKBONES[network](embedding_size=32)
    checkpoint = path / "checkpoints" / "step-7"
    checkpoint.mkdir(parents=True)
    safetensors.torch.save_file(module.state_dict(), checkpoint / "model.safetensors")
    content = (checkpoint / "model.safetensors").read_bytes()
    head = {"num_classes": 5, "embedding_size": 32, "num_subcenters": 1, "margin": "arcface"}
    manifest = {
        "format": FORMAT,
        "step": 7,
        "world": 1,
        "config": {"network": network, "embedding_size": 32},
        "heads": [{**head, "step": 7, "row_state": [], "margin_state": []}],
        "files": {
            "model.safetensors": {
                "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
            }
        },
    }  # fmt: skip
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "sha256": own}))
    return module.eval()


def means(images, mean=127.5, std=127.5):
    return (images.reshape(len(images), -1, 3).mean(axis=1) - mean) / std


def test_onnx_without_metadata_follows_insightface(tmp_path):
    embedder = networks.open_embedder(channel_means(tmp_path / "a.onnx"))
    output = embedder(IMAGES)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, means(IMAGES), atol=1e-5)


@pytest.mark.parametrize("names", [("Sub_0", "Mul_1"), ("_minusscalar0", "_mulscalar0")])
def test_onnx_that_normalises_by_itself_gets_raw_pixels(tmp_path, names):
    embedder = networks.open_embedder(channel_means(tmp_path / "a.onnx", names=names))
    np.testing.assert_allclose(embedder(IMAGES), means(IMAGES, 0, 1), rtol=1e-5)


def test_onnx_metadata_is_obeyed(tmp_path):
    metadata = METADATA | {"color_order": "BGR", "mean": "100.0", "std": "64.0", "network": "r50"}
    path = channel_means(tmp_path / "a.onnx", names=("Sub_0", "Mul_1"), metadata=metadata)
    embedder = networks.open_embedder(path)
    np.testing.assert_allclose(embedder(IMAGES), means(IMAGES, 100, 64)[:, ::-1], atol=1e-5)
    assert embedder.facts["input"] == {
        "height": 112, "width": 112, "color_order": "BGR", "mean": 100, "std": 64,
    }  # fmt: skip
    assert embedder.facts["network"] == "r50" and embedder.facts["metadata"] == metadata
    assert embedder.facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("batch, batch_size", [("n", 1), ("n", 2), ("n", 64), (1, 64), (3, 64)])
def test_any_number_of_images_through_any_batch(tmp_path, batch, batch_size):
    path = channel_means(tmp_path / "a.onnx", batch=batch)
    embedder = networks.open_embedder(path, batch_size=batch_size)
    for num in (1, 3, 5):
        np.testing.assert_allclose(embedder(IMAGES[:num]), means(IMAGES[:num]), atol=1e-5)


def test_weights_among_the_inputs_are_dropped(tmp_path):
    path = channel_means(tmp_path / "a.onnx", extra_inputs=("w", "nobody_asks_for_me"))
    np.testing.assert_allclose(networks.open_embedder(path)(IMAGES), means(IMAGES), atol=1e-5)


def small_network(path, nodes, weights, output):
    """An ONNX file of these nodes, from [n, 3, 112, 112] to a free number of rows."""
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("data", kind, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info(output, kind, ["n", None])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


POOL = helper.make_node("GlobalAveragePool", ["data"], ["p"])


@pytest.mark.parametrize("shape", [[1, 3], [1, -1]])
def test_a_batch_that_is_fixed_inside_the_graph_runs_one_by_one(tmp_path, shape):
    """arcface_torch's mbf: the input names the batch free, a Reshape fixes it. [1, -1] even runs:
    it makes one long row of two images."""
    nodes = [POOL, helper.make_node("Reshape", ["p", "shape"], ["e"])]
    model = small_network(tmp_path, nodes, {"shape": np.array(shape)}, "e")
    onnx.save(model, tmp_path / "a.onnx")
    embedder = networks.open_embedder(tmp_path / "a.onnx")
    np.testing.assert_allclose(embedder(IMAGES), means(IMAGES), atol=1e-5)
    assert embedder.fixed_batch == 1 and "one image at a time" in embedder.facts["note"]


def test_a_network_that_mixes_the_images_of_a_batch_runs_one_by_one(tmp_path):
    nodes = [
        POOL,
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("CumSum", ["f", "axis"], ["e"]),  # row 1 holds row 0 too
    ]
    model = small_network(tmp_path, nodes, {"axis": np.array(0)}, "e")
    onnx.save(model, tmp_path / "a.onnx")
    embedder = networks.open_embedder(tmp_path / "a.onnx")
    assert embedder.fixed_batch == 1 and "other embeddings" in embedder.facts["note"]


def test_prelu_slopes_of_one_dimension_are_those_of_the_channels(tmp_path):
    """MXNet's exporter writes [C]; ONNX would broadcast it along the width, which cannot run."""
    slope = np.array([0.5, 2.0, -1.0], np.float32)
    nodes = [
        helper.make_node("PRelu", ["data", "slope"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["p"]),
        helper.make_node("Flatten", ["p"], ["e"]),
    ]
    onnx.save(small_network(tmp_path, nodes, {"slope": slope}, "e"), tmp_path / "a.onnx")
    embedder = networks.open_embedder(tmp_path / "a.onnx")
    x = (IMAGES.astype(np.float64) - 127.5) / 127.5
    np.testing.assert_allclose(embedder(IMAGES), np.where(x < 0, x * slope, x).mean((1, 2)),
                               atol=1e-5)  # fmt: skip
    assert "PReLU" in embedder.facts["note"]


@pytest.mark.parametrize("as_inputs", [False, True])
def test_external_weights_lie_beside_the_model_and_count(tmp_path, monkeypatch, as_inputs):
    """Before: with weights among the inputs they came from the working directory, and what they
    made was kept under the digest of the right ones."""
    nodes = [POOL, helper.make_node("Flatten", ["p"], ["f"]),
             helper.make_node("Mul", ["f", "w"], ["e"])]  # fmt: skip

    def write(directory, weights):
        directory.mkdir(exist_ok=True)
        model = small_network(directory, nodes, {"w": np.float32(weights)}, "e")
        if as_inputs:
            model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]))
        onnx.save(model, directory / "a.onnx", save_as_external_data=True, size_threshold=0,
                  location="w.bin")  # fmt: skip
        return directory / "a.onnx"

    path, other = write(tmp_path / "here", [1, 2, 3]), write(tmp_path / "there", [7, 7, 7])
    monkeypatch.chdir(other.parent)
    embedder = networks.open_embedder(path)
    np.testing.assert_allclose(embedder(IMAGES), means(IMAGES) * [1, 2, 3], atol=1e-5)
    assert embedder.digest != networks.open_embedder(other).digest
    (path.parent / "w.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="w.bin is truncated"):
        networks.open_embedder(path)
    (path.parent / "w.bin").unlink()
    with pytest.raises(ValueError, match="here/w.bin, which does not exist"):
        networks.open_embedder(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 128}, "a.onnx: 128 x 128 images are not supported"),
        ({"metadata": {"mean": "0.5"}}, "input metadata: .*input_size"),
        ({"metadata": METADATA | {"mean": "none"}}, "input metadata: .*'none'"),
        ({"metadata": METADATA | {"color_order": "GRB"}}, "is not a valid input contract: GRB"),
        ({"metadata": METADATA | {"std": "0"}}, "'std': '0'.* is not a valid input contract"),
        ({"metadata": METADATA | {"input_size": "128,128"}}, "128 x 128 images are not supported"),
        (
            {"metadata": METADATA | {"input_size": "112,96"}},
            "metadata says 112 x 96 images, but",
        ),
    ],
)
def test_other_onnx_networks_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        networks.open_embedder(channel_means(tmp_path / "a.onnx", **options))


def test_files_that_are_no_network(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match="a.onnx is not an ONNX model"):
        networks.open_embedder(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match="absent"):
        networks.open_embedder(tmp_path / "absent.onnx")
    with pytest.raises(FileNotFoundError):
        networks.open_embedder(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"<html><body>404", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0", "compressed by gzip"),
        (b"PK\3\4x/data.pkl", "a file of torch.save"),
    ],
)
def test_another_file_under_the_name_of_a_network_is_named(tmp_path, content, what):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(UserError, match=f"a.onnx is not an ONNX model: .*; it is {what}"):
        networks.open_embedder(tmp_path / "a.onnx")


def test_the_entries_of_our_export_are_understood():
    entries = input_facts()
    assert InputContract.from_metadata(entries) == InputContract()
    assert {key: entries[key] for key in METADATA} == METADATA


@pytest.mark.parametrize("place", [".", "checkpoints/step-7"])
def test_run_embedder_is_the_network_in_eval_mode(tmp_path, place):
    module = make_run(tmp_path)
    embedder = networks.open_embedder(tmp_path / place, batch_size=2)
    x = torch.from_numpy((IMAGES.transpose(0, 3, 1, 2).astype(np.float64) - 127.5) / 127.5).float()
    with torch.no_grad():
        expected = torch.cat([module(row[None]) for row in x]).numpy()
    output = embedder(IMAGES)
    assert output.shape == (5, 32) and output.dtype == np.float32
    np.testing.assert_allclose(output, expected, atol=2e-5 * abs(expected).max())
    assert embedder.facts["network"] == "mbf_tiny"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_embedder_uses_the_gpu(tmp_path):
    make_run(tmp_path)
    embedder = networks.open_embedder(tmp_path)
    assert next(embedder.module.parameters()).is_cuda
    on_gpu = embedder(IMAGES)
    embedder.module, embedder.device = embedder.module.cpu(), torch.device("cpu")
    on_cpu = embedder(IMAGES)
    np.testing.assert_allclose(on_gpu, on_cpu, atol=5e-3 * abs(on_cpu).max())  # TF32 convolutions
