"""fp16, int8 and what can be baked in: near torch, islands where needed, refused beyond limits."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from eval.embedders.embed_onnx import OnnxEmbedder
from recognition.backbones import BACKBONES, VisionTransformer
from recognition.export.graph import build_graph
from recognition.export.parity import LIMITS, Agreement, ExportError, ParityLimits
from recognition.export.quantise import to_int8, without_batch_norms
from recognition.export.to_onnx import GraphOptions, export_onnx
from tests.launch.test_export import (
    Linear,
    NormalisingInside,
    normalised,
    pixels,
    trained,
    unit,
)

TYPES = onnx.TensorProto


@pytest.fixture(scope="module")
def tiny():
    return trained("mbf_tiny")


def embed(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"input": batch})
    return embedding


@pytest.mark.parametrize("precision, least", [("fp16", 0.9999), ("int8", 0.95)])
def test_smaller_files_stay_near_torch(tiny, tmp_path, precision, least):
    path = tmp_path / "x.onnx"
    report = export_onnx(
        tiny, path, metadata={}, precision=precision, example_images=pixels(32),
        calibration_images=pixels(40),
    )  # fmt: skip
    whole = export_onnx(tiny, tmp_path / "fp32.onnx", metadata={})
    batch = normalised(pixels(9))
    with torch.no_grad():
        expected = unit(tiny(torch.from_numpy(batch)).numpy())
    cosines = (unit(embed(path, batch)) * expected).sum(1)
    assert cosines.min() > least and report["cosine"]["min"] > least
    assert report["cosine"]["min"] < 1 - 1e-9  # it is another precision
    assert report["bytes"] < 0.6 * whole["bytes"]
    model = onnx.load(path)
    kinds = {
        tensor.data_type
        for tensor in model.graph.initializer
        if len(tensor.dims) == 4 and tensor.dims[0] > 1 and tensor.dims[1] >= 4
    }
    assert kinds == {TYPES.FLOAT16 if precision == "fp16" else TYPES.INT8}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TYPES.FLOAT  # callers change nothing
    if precision == "int8":  # a scale for every output channel
        scales = {t.name: t for t in model.graph.initializer if t.name.endswith("_scale")}
        weights = [n for n in model.graph.node if n.op_type == "Conv"]
        makers = {name: n for n in model.graph.node for name in n.output}
        per_channel = [makers[n.input[1]].input[1] for n in weights if n.input[1] in makers]
        sizes = [list(scales[name].dims) for name in per_channel]
        assert all(len(size) == 1 and size[0] > 1 for size in sizes)


class Large(Linear):
    """Passes through values that fp16 cannot hold, to embeddings that it can."""

    def forward(self, images):
        return super().forward(images) * 1e6 * 1e-6


def test_values_beyond_fp16_stay_in_fp32(tmp_path):
    path = tmp_path / "x.onnx"
    report = export_onnx(
        Large().eval(), path, metadata={}, precision="fp16", example_images=pixels(8)
    )
    assert report["fp32_nodes"] and report["cosine"]["min"] > 0.9999
    assert np.isfinite(embed(path, normalised(pixels(8)))).all()


def test_int8_needs_images():
    with pytest.raises(ValueError, match="real images"):
        export_onnx(Linear().eval(), "x.onnx", metadata={}, precision="int8")


@pytest.mark.parametrize(
    "normalise, l2, flip_sum",
    [
        # Each pair of two switches has every combination in those that are not long.
        pytest.param(*switches, marks=[] if sum(switches) % 2 == 0 else pytest.mark.long)
        for switches in itertools.product([False, True], repeat=3)
    ],
)
def test_what_is_baked_in(tiny, tmp_path, normalise, flip_sum, l2):
    path = tmp_path / "x.onnx"
    graph_options = GraphOptions(normalise, flip_sum, l2)
    export_onnx(tiny, path, metadata={}, graph_options=graph_options)
    images = pixels(5)
    with torch.no_grad():
        x = torch.from_numpy(normalised(images))
        expected = tiny(x) + tiny(x.flip(3)) if flip_sum else tiny(x)
        expected = nn.functional.normalize(expected) if l2 else expected
    found = OnnxEmbedder(path)(images)  # reads mean and std from the metadata
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()
    names = [node.name for node in onnx.load(path).graph.node[:8]]
    assert any(n.startswith("Sub") for n in names) == normalise
    assert any(n.startswith("Mul") for n in names) == normalise


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_baked_normalisation_keeps_its_names_in_every_precision(tiny, tmp_path, precision):
    path = tmp_path / "x.onnx"
    export_onnx(
        tiny, path, metadata={}, precision=precision, graph_options=GraphOptions(normalise=True),
        example_images=pixels(8), calibration_images=pixels(16),
    )  # fmt: skip
    names = [node.name for node in onnx.load(path).graph.node[:8]]
    assert {"Sub_pixels", "Mul_pixels"} <= set(names)


def test_a_product_of_the_network_itself_misleads_nobody(tmp_path):
    export_onnx(NormalisingInside().eval(), tmp_path / "x.onnx", metadata={})
    names = [node.name for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert not any(n.startswith(("Sub", "Mul", "_minus", "_mul")) for n in names)


def test_limits_refuse_and_leave_nothing(tiny, tmp_path):
    for limits, words in [
        (ParityLimits(1.0, 0.9999999, 0.0, 0, 0), "least cosine"),
        (ParityLimits(1.0, 0.0, 0.9999999, 0, 0), "mean cosine"),
    ]:
        with pytest.raises(ExportError, match=words):
            export_onnx(
                tiny, tmp_path / "x.onnx", metadata={}, precision="int8", limits=limits,
                calibration_images=pixels(8),
            )  # fmt: skip
        assert not list(tmp_path.iterdir())
    Agreement({1: 0.0}, np.ones(3)).check(LIMITS["fp32"])
    with pytest.raises(ExportError, match="nan"):
        Agreement({1: float("nan")}, np.ones(3)).check(LIMITS["fp32"])


def test_a_verification_that_refuses_leaves_nothing(tiny, tmp_path):
    def refuse(path):
        assert path.is_file() and path.name != "x.onnx"
        raise ExportError("2.00 points are lost")

    with pytest.raises(ExportError, match="2.00 points are lost; .*x.onnx was not written"):
        export_onnx(tiny, tmp_path / "x.onnx", metadata={}, verify=refuse)
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """A network of transformers at a tenth of vit_t's time."""
    monkeypatch.setitem(BACKBONES, "vit_test", partial(VisionTransformer, 64, 2))


def test_fp16_where_layers_share_weights(tmp_path):
    """The exporter stores equal tensors once: those of the LayerNorms, which stay in fp32."""
    module = trained("vit_test")
    norms = [n for n in build_graph(module).graph.node if n.op_type == "LayerNormalization"]
    assert len({node.input[1] for node in norms}) < len(norms)
    export_onnx(module, tmp_path / "x.onnx", metadata={}, precision="fp16")


@pytest.mark.parametrize("name", ["mbf", "vit_test"])
def test_other_networks_take_any_batch(name, tmp_path):
    """Every kind of network; the sizes of one kind differ in numbers of blocks alone."""
    export_onnx(trained(name), tmp_path / "x.onnx", metadata={})


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "mbf_tiny"])
def test_every_network_in_every_precision(name, precision, tmp_path):
    """Untrained networks lose more in int8 than trained ones: their directions are near one."""
    report = export_onnx(
        trained(name), tmp_path / "x.onnx", metadata={}, precision=precision,
        example_images=pixels(16), calibration_images=pixels(32),
        limits=ParityLimits(1.0, 0.5, 0.6, 0, 0) if precision == "int8" else None,
    )  # fmt: skip
    assert report["cosine"]["count"] == 42


def test_convolutions_of_few_channels_stay_in_fp32(tiny, tmp_path):
    """The first one, of three, and the depthwise ones; every other product has 8-bit weights."""
    path = tmp_path / "x.onnx"
    export_onnx(tiny, path, metadata={}, precision="int8", calibration_images=pixels(40),
                example_images=pixels(32))  # fmt: skip
    graph = onnx.load(path).graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    floats = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = node.input[1]
            if weight in shapes:
                floats.append(shapes[weight][1])
            else:
                assert maker[weight].op_type == "DequantizeLinear"
                assert shapes[maker[weight].input[0]][1] >= 4
    assert sorted(floats) == [1] * 8 + [3]


def test_batch_norms_between_8_bit_convolutions_become_products_and_sums():
    """r18 has one before each block's first convolution, whose padding keeps it from folding."""
    module = trained("r18")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.copy_(torch.randn(norm.num_features, generator=generator))
                norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
    graph = build_graph(module)
    assert sum(node.op_type == "BatchNormalization" for node in graph.graph.node) >= 8
    spelled_out = without_batch_norms(graph)
    assert not any(node.op_type == "BatchNormalization" for node in spelled_out.graph.node)
    onnx.checker.check_model(spelled_out, full_check=True)
    images = normalised(pixels(4))
    before, after = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": images})[0]
        for model in (graph, spelled_out)
    )
    # One rounding more a BatchNorm, eighteen convolutions deep.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * np.abs(before).max())


def test_ranges_leave_out_the_outermost_values(tiny):
    """A pixel far from all others does not widen the range of the first layer's output."""
    images = normalised(pixels(40))
    wild = images.copy()
    wild[0, :, 0, 0] = 1000.0  # in one of 40 * 56 * 56 places of that output
    graph = build_graph(tiny)
    (output,) = next(node.output for node in graph.graph.node if node.op_type == "PRelu")
    plain, widened = (
        next(
            onnx.numpy_helper.to_array(tensor).item()
            for tensor in to_int8(graph, batch).graph.initializer
            if tensor.name == f"{output}_scale"
        )
        for batch in (images, wild)
    )
    assert widened == pytest.approx(plain, rel=0.2)
