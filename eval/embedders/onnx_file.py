"""A third-party recognition network, read from an ONNX file: its graph, its weights, its hash.

How the peculiarities of other exporters are handled:

| in the file | here |
|---|---|
| weights in files beside it | read from beside it, from any working directory, and hashed |
| weights listed among the inputs | removed from the inputs: ONNX Runtime would require them |
| a PReLU slope [C] of a [n, C, h, w] (MXNet) | [C, 1, 1], if the file cannot run as it is |
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from data_tools.common import content as contents
from data_tools.common import files
from data_tools.common.errors import UserError, one_line

_MESSAGE = (1 << 31) - 1  # bytes of a protobuf message


class OnnxFile(NamedTuple):
    path: Path
    model: ModelProto  # with the weights and inputs that it runs with
    runnable: str | bytes  # what ONNX Runtime opens
    digest: str  # sha256 of the file and of any external files with its weights


def read(path: str | Path) -> OnnxFile:
    """The network in a file.

    Raises:
        UserError: not an ONNX file, or its weights are missing, truncated or outside its directory.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content = files.read_bytes(path)
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError, which onnx does not name
        hint = contents.hint(path, "an ONNX")
        raise UserError(f"{path} is not an ONNX model: {one_line(error)}{hint}") from error
    if not model.graph.node:  # protobuf reads an empty file, and some others, as an empty message
        hint = contents.hint(path, "an ONNX")
        raise UserError(f"{path} is not an ONNX model: it has no graph{hint}")
    digest = hashlib.sha256(content)
    outside = [x for x in tensors(model.graph) if x.data_location == TensorProto.EXTERNAL]
    changed = _without_weights_as_inputs(model.graph)
    if outside:
        weights = _External(path)
        total = len(content) + sum(weights.length(tensor) for tensor in outside)
        digest = hashlib.sha256(digest.digest() + b"".join(weights.digests()))
        if total > _MESSAGE:
            if changed:
                raise UserError(
                    f"{path} lists its {total >> 20} MiB of weights among its inputs, too many to "
                    "repair: export it again with keep_initializers_as_inputs=False"
                )
            return OnnxFile(path, model, str(path), digest.hexdigest())
        for tensor in outside:
            weights.move_into(tensor)
    runnable = model.SerializeToString() if outside or changed else str(path)
    return OnnxFile(path, model, runnable, digest.hexdigest())


def with_slopes_per_channel(file: OnnxFile) -> OnnxFile | None:
    """The network with PReLU slopes [C] of images [n, C, h, w] as [C, 1, 1]; None if it has none.

    ONNX broadcasts a slope from the right, so [C] would run along the width, while MXNet's
    exporter means the channels.
    """
    model = ModelProto.FromString(file.model.SerializeToString())
    slopes = {x.name: x for x in model.graph.initializer if len(x.dims) == 1 and x.dims[0] > 1}
    used = [
        node for node in model.graph.node if node.op_type == "PRelu" and node.input[1] in slopes
    ]
    ranks = _ranks(model)
    mended = {node.input[1] for node in used if ranks.get(node.input[0], 4) == 4}
    if not mended:
        return None
    for name in mended:
        slopes[name].dims.extend([1, 1])
    del model.graph.value_info[:]  # it may contain shapes inferred from the wrong slopes
    return OnnxFile(file.path, model, model.SerializeToString(), file.digest)


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constant tensors of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            inside: Iterable[GraphProto] = attribute.graphs
            for one in (attribute.g, *inside):
                yield from tensors(one)


class _External:
    """The external files beside a model that contain its weights."""

    def __init__(self, path: Path) -> None:
        self._model, self._contents = path, dict[str, bytes]()

    def length(self, tensor: TensorProto) -> int:
        return len(self._bytes(tensor))

    def digests(self) -> list[bytes]:
        """sha256 of each file, by name."""
        return [hashlib.sha256(self._contents[x]).digest() for x in sorted(self._contents)]

    def move_into(self, tensor: TensorProto) -> None:
        tensor.raw_data = bytes(self._bytes(tensor))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]

    def _bytes(self, tensor: TensorProto) -> memoryview:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{self._model}: the weights {tensor.name}"
        try:
            name = entries["location"]
            start = int(entries.get("offset") or 0)
            length = entries.get("length")
            stop = start + int(length) if length else None
        except (KeyError, ValueError) as error:
            raise UserError(f"{where} are in a file without a valid name: {entries}") from error
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{where} are outside its directory, in {name}: move them beside it")
        if name not in self._contents:
            try:
                self._contents[name] = files.read_bytes(self._model.parent / name)
            except FileNotFoundError as error:
                raise UserError(
                    f"{where} are in {self._model.parent / name}, which does not exist: copy "
                    f"{name} to the model's directory"
                ) from error
        found = memoryview(self._contents[name])[start:stop]
        if start < 0 or (stop is not None and len(found) != stop - start):
            raise UserError(f"{where}: {self._model.parent / name} is truncated")
        return found


def _without_weights_as_inputs(graph: GraphProto) -> bool:
    """Remove inputs that are weights or that no node uses; return whether there were any.

    Some exporters list weights as inputs, and ONNX Runtime would then require them.
    """
    asked = {name for node in graph.node for name in node.input} - {
        x.name for x in graph.initializer
    }
    inputs = [x for x in graph.input if x.name in asked]
    if len(inputs) == len(graph.input):
        return False
    del graph.input[:]
    graph.input.extend(inputs)
    return True


def _ranks(model: ModelProto) -> dict[str, int]:
    """The number of dimensions of the values between the nodes, where it can be inferred."""
    try:
        known = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # the graph contradicts itself, so no shape is known
        known = model.graph
    values = (*known.value_info, *known.input)
    return {
        x.name: len(x.type.tensor_type.shape.dim)
        for x in values
        if x.type.tensor_type.HasField("shape")
    }
