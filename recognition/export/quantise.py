"""An fp32 ONNX graph in half precision or in eight bits, by ONNX Runtime's converters.

Both keep float32 at the input and the output, so callers change nothing.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers import float16

from recognition.export.graph import quiet
from recognition.export.parity import open_session

PRECISIONS = ("fp32", "fp16", "int8")
NUM_CALIBRATION = 256  # images that set the ranges of int8's activations
_BATCH = 16  # of calibration and of the search for large values
# fp16 ends at 65504. A value above a quarter of that may exceed it on images not seen here.
_LARGEST = 65504 / 4
# They square or exponentiate their input, and cost little in fp32.
_ISLANDS = ["LayerNormalization", "ReduceL2", "ReduceSumSquare", "Softmax", "Pow"]
# The products that gain from 8 bits. PReLU and BatchNorm between them have no 8-bit form that is
# exact by channel, and sums stay in fp32 because they carry the residual.
_QUANTISED = ["Conv", "Gemm", "MatMul"]
_FEWEST_CHANNELS = 4  # that each output of a convolution sums over
_PERCENTILE = 99.99  # of the activations; outliers would take resolution from all others


def to_fp16(
    model: onnx.ModelProto,
    images: np.ndarray,  # float32 [n, 3, 112, 112] as the graph takes them
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph in fp16, and the names of the nodes that stay fp32 because values grow large.

    Nodes whose output passes a quarter of fp16's range on `images`, or whose kind squares its
    input, stay in fp32.
    """
    large = _large_nodes(model, images)
    kinds = [*float16.DEFAULT_OP_BLOCK_LIST, *_ISLANDS]
    whole = copy.deepcopy(model)
    _unshare(whole, [n for n in whole.graph.node if n.name in large or n.op_type in kinds])
    with quiet():
        converted = float16.convert_float_to_float16(
            whole, keep_io_types=True, op_block_list=kinds, node_block_list=large
        )
    ordered = ONNXModel(converted)
    ordered.topological_sort()  # the converter appends its casts
    del ordered.model.graph.value_info[:]  # types from before
    islands = [n.name for n in model.graph.node if n.op_type in _ISLANDS]
    return ordered.model, sorted({*large, *islands})


def _unshare(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Give each of the nodes weights of its own: the converter names its casts by the weight.

    The exporter stores equal weights once: the biases of an untrained ViT's LayerNorms, say.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    used: set[str] = set()
    for node in nodes:
        for i, name in enumerate(node.input):
            if name in used:
                own = model.graph.initializer.add()
                own.CopyFrom(weights[name])
                own.name = node.input[i] = f"{name}_of_{node.name}_{i}"
            elif name in weights:
                used.add(name)


def _large_nodes(model: onnx.ModelProto, images: np.ndarray) -> list[str]:
    """Names of the nodes with an output or a weight that fp16 might not hold."""
    probe = copy.deepcopy(model)
    known = {value.name for value in probe.graph.output}
    maker = {name: node for node in probe.graph.node for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(probe)
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    for name in maker:
        if name not in known and kinds.get(name) == onnx.TensorProto.FLOAT:
            probe.graph.output.append(onnx.ValueInfoProto(name=name))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "probe.onnx"
        onnx.save(probe, path)
        session = open_session(path)
        names = [output.name for output in session.get_outputs()]
        largest = dict.fromkeys(names, 0.0)
        for start in range(0, len(images), _BATCH):
            values = session.run(names, {"input": images[start : start + _BATCH]})
            for name, value in zip(names, values, strict=True):
                largest[name] = max(largest[name], float(np.abs(value).max(initial=0.0)))
    weights = {
        tensor.name: float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0.0))
        for tensor in probe.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    return [
        node.name
        for node in probe.graph.node
        if any(not largest.get(name, 0.0) < _LARGEST for name in node.output)
        or any(not weights.get(name, 0.0) < _LARGEST for name in node.input)
    ]


def to_int8(
    model: onnx.ModelProto,
    images: np.ndarray,  # float32 [n, 3, 112, 112] that set the ranges of the activations
) -> onnx.ModelProto:
    """The graph with 8-bit products: QuantizeLinear / DequantizeLinear around them (QDQ), static.

    Weights signed and by output channel, activations unsigned, their range that of all but the
    outermost _PERCENTILE of the values on `images`: what ONNX Runtime's CPU kernels use VNNI for.
    Weights take 7 of the 8 bits. Where a processor has no VNNI, those kernels add two products in
    16 bits, which saturate with weights of 8: the mean cosine of a small MobileFaceNet with fp32
    fell to 0.975 there, against 0.991 everywhere with 7 bits and 0.993 with 8 under VNNI.
    Products of two activations stay in fp32, and convolutions of few channels: the first one and
    those in small groups. VNNI adds four products at a time, so 8 bits gain them no time, and they
    carry half of the error of a MobileFaceNet.
    """
    model = without_batch_norms(model)
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    narrow = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and shapes[node.input[1]][1] < _FEWEST_CHANNELS
    ]
    with tempfile.TemporaryDirectory() as directory, quiet():
        source, target = Path(directory) / "fp32.onnx", Path(directory) / "int8.onnx"
        onnx.save(model, source)
        batches = _Batches(images)
        quantize_static(
            source,
            target,
            batches,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED,
            nodes_to_exclude=narrow,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.Percentile,
            use_external_data_format=False,
            extra_options={
                "MatMulConstBOnly": True,
                "CalibPercentile": _PERCENTILE,
                # A histogram after each batch: else the activations of all are held at once.
                "CalibStridedMinMax": 1,
            },
        )
        return onnx.load(target)


def without_batch_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with each BatchNormalization of feature maps as a product and a sum.

    8-bit convolutions keep channels last. ONNX Runtime moves its transpositions past products and
    sums, but not past a BatchNormalization: one before and one behind each would remain.
    """
    model = onnx.shape_inference.infer_shapes(model)
    known = [*model.graph.value_info, *model.graph.input]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in known}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [*model.graph.node]
    del model.graph.node[:]
    for node in nodes:
        if node.op_type != "BatchNormalization" or ranks.get(node.input[0]) != 4:
            model.graph.node.append(node)
            continue
        scale, shift, mean, variance = (
            onnx.numpy_helper.to_array(weights[name]).astype(np.float64) for name in node.input[1:]
        )
        epsilon = {a.name: a.f for a in node.attribute}.get("epsilon", 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        name, product = node.name, f"{node.output[0]}_product"
        for constant, values in (("factor", factor), ("term", shift - mean * factor)):
            wide = values.astype(np.float32).reshape(-1, 1, 1)  # [C, 1, 1]
            model.graph.initializer.append(onnx.numpy_helper.from_array(wide, f"{name}_{constant}"))
        make = onnx.helper.make_node
        model.graph.node.extend(
            [
                make("Mul", [node.input[0], f"{name}_factor"], [product], f"{name}_product"),
                make("Add", [product, f"{name}_term"], [*node.output], f"{name}_sum"),
            ]
        )
    used = {name for node in model.graph.node for name in node.input}
    left = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
    return model


class _Batches(CalibrationDataReader):
    """Batches in turn, or of a range of their numbers."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = np.array_split(images, -(-len(images) // _BATCH))
        self.set_range(0, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.range = iter(self.batches[start_index:end_index])

    def get_next(self) -> Any:
        batch = next(self.range, None)
        return None if batch is None else {"input": batch}
