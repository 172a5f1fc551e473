"""The ONNX graph of a module, and the names in it that clients read.

InsightFace's client, and others that copied it, look for a Sub and a Mul among the names of the
first eight nodes: with both, the pixel normalisation is taken to be in the graph.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import onnx
import torch
from torch import nn

from recognition.backbones.input import INPUT_SIZE
from recognition.export.parity import ExportError

OPSET = 18


def build_graph(module: nn.Module) -> onnx.ModelProto:
    """The module as an ONNX graph with a free batch, without traces of this machine's paths."""
    images = torch.zeros(2, 3, INPUT_SIZE, INPUT_SIZE)
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                input_names=["input"],
                output_names=["embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    except RuntimeError as error:
        raise ExportError(f"torch.onnx cannot export this module: {error}") from error
    assert program is not None
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.output):
        del part.metadata_props[:]  # stack traces
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of the exporter and the converters: the result is measured afterwards."""
    logs = [logging.getLogger(), logging.getLogger("torch.onnx")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def name_normalisation(model: onnx.ModelProto, inside: bool) -> None:
    """Names that clients read: Sub and Mul where the normalisation is inside, else neither."""
    for kind in ("Sub", "Mul"):
        nodes = [node for node in model.graph.node if node.op_type == kind]
        for index, node in enumerate(nodes):
            named = inside and index == 0
            node.name = f"{kind}_pixels" if named else f"node_{kind.lower()}_{index}"
    if inside:  # among the first nodes, before what other nodes do to the weights
        maker = {name: node for node in model.graph.node for name in node.output}
        found = [node for node in model.graph.node if node.name == "Mul_pixels"]
        for node in found:  # grows: what made its inputs
            found += [maker[name] for name in node.input if name in maker]
        names = {id(node) for node in found}
        nodes = [*reversed(found), *(n for n in model.graph.node if id(n) not in names)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def check_graph(model: onnx.ModelProto, normalised_inside: bool = False) -> None:
    """Refuse what onnx.checker refuses, a baked batch, and names that mislead clients."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the graph: {error}") from error
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(f"the batch of {value.name!r} is fixed in the graph")
    first = [node.name for node in model.graph.node[:8]]
    found = [
        any(name.startswith(prefix) for name in first for prefix in prefixes)
        for prefixes in (("Sub", "_minus"), ("Mul", "_mul"))
    ]
    if normalised_inside and not all(found):
        raise ExportError(
            f"no Sub and Mul among the first nodes ({', '.join(first)}): InsightFace's client "
            "would repeat the pixel normalisation, which is in the graph"
        )
    if not normalised_inside and any(found):
        raise ExportError(
            f"a Sub or Mul among the first nodes ({', '.join(first)}) tells InsightFace's client "
            "that the pixel normalisation is in the graph; it must stay outside"
        )
