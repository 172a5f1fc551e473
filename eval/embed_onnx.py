"""An ONNX recognition network of anybody's as an embedder."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from data_tools.common.errors import UserError
from eval.contract import InputContract


class OnnxEmbedder:
    """An ONNX file through ONNX Runtime: one image input [n, 3, H, W], one output [n, D].

    Where nothing states the contract it is InsightFace's: RGB, (x - 127.5) / 127.5, unless one of
    the first eight nodes is named Sub* or _minus* and one Mul* or _mul*, which means that the graph
    does it itself.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 64,
        stated: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: old exporters cause a warning per weight
        if threads := os.environ.get("OMP_NUM_THREADS"):  # torchrun shares the cores that way
            options.intra_op_num_threads = int(threads)
        try:
            graph, model = _read_graph(path)
            self.session = onnxruntime.InferenceSession(model, options, _providers())
        except Exception as error:  # protobuf's and ONNX Runtime's own kinds
            raise UserError(f"{path} is not an ONNX model that can run: {error}") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4:
            raise UserError(
                f"{path} has the inputs {[x.name for x in inputs]} and outputs "
                f"{[x.name for x in outputs]}; a recognition model has one image and one embedding"
            )
        self.name, self.dtype = inputs[0].name, _FLOATS.get(inputs[0].type)
        if self.dtype is None:
            raise UserError(f"{path} takes {inputs[0].type}, not float images")
        entries = self.session.get_modelmeta().custom_metadata_map
        fixed, channels, *sides = inputs[0].shape
        known = [side if isinstance(side, int) else 112 for side in sides]
        if channels not in (3, None) and isinstance(channels, int):
            raise UserError(f"{path} takes images of {inputs[0].shape[1:]}, not [3, H, W]")
        self.contract = _stated(path, graph, entries, known, dict(stated or {}), source)
        if [self.contract.height, self.contract.width] != known:
            raise UserError(
                f"{path} takes images of {known[0]} x {known[1]}, its contract says "
                f"{self.contract.height} x {self.contract.width}"
            )
        self.fixed_batch = fixed if isinstance(fixed, int) else None
        self.batch_size = self.fixed_batch or batch_size
        self.digest = _digest(Path(path), graph)
        self.facts: dict[str, object] = {
            "path": str(path),
            **({"network": entries["network"]} if "network" in entries else {}),
            "sha256": self.digest,
            "input": self.contract._asdict(),
            "runtime": f"onnxruntime {onnxruntime.__version__}, {self.session.get_providers()[0]}",
            "metadata": dict(entries),
        }

    def with_contract(self, contract: InputContract) -> "OnnxEmbedder":
        other = object.__new__(OnnxEmbedder)
        other.__dict__ = self.__dict__ | {"contract": contract}
        other.facts = self.facts | {"input": contract._asdict()}
        return other

    def prepare(self, images: NDArray[np.uint8]) -> NDArray:
        return self.contract.prepare(images, self.dtype)

    def forward(self, prepared: NDArray) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(prepared), self.batch_size):
            x = prepared[start : start + self.batch_size]
            num = len(x)
            if self.fixed_batch is not None and num < self.fixed_batch:
                x = np.resize(x, (self.fixed_batch, *x.shape[1:]))  # repeats images
            (output,) = self.session.run(None, {self.name: x})
            if output.ndim < 2 or len(output) != len(x):
                raise UserError(f"{self.facts['path']}: {len(x)} images gave an output of "
                                 f"{list(output.shape)}, not [{len(x)}, D]")  # fmt: skip
            parts.append(output.reshape(len(x), -1)[:num].astype(np.float32))
        return np.concatenate(parts)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.forward(self.prepare(images))


_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _stated(
    path: str | Path, graph: onnx.GraphProto, entries: Mapping[str, str], known: list[int],
    stated: dict[str, Any], source: str,
) -> InputContract:  # fmt: skip
    size = {"height": known[0], "width": known[1]}
    if "mean" in entries or "std" in entries:
        base = InputContract.from_metadata(entries)
        if (base.height, base.width) != tuple(known):
            raise UserError(f"{path}: its metadata say {base.height} x {base.width}, "
                             f"its input is not that: {known}")  # fmt: skip
    else:
        base = _insightface_contract(graph).changed(size, f"the input of {path}")
    return base.changed(stated, source)


def _digest(path: Path, graph: onnx.GraphProto) -> str:
    """sha256 of the file, and of the files beside it that hold its weights, where there are any."""
    beside = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    total = hashlib.sha256()
    for part in (path, *(path.parent / name for name in sorted(beside))):
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if not beside:
            return digest.hexdigest()
        total.update(digest.digest())
    return total.hexdigest()


def _providers() -> list[Any]:
    device = {"device_id": int(os.environ.get("LOCAL_RANK", 0))}
    wanted: tuple[tuple[str, dict[str, int]], ...] = (
        ("CUDAExecutionProvider", device),
        ("CPUExecutionProvider", {}),
    )
    return [entry for entry in wanted if entry[0] in onnxruntime.get_available_providers()]


def _read_graph(path: str | Path) -> tuple[onnx.GraphProto, str | bytes]:
    """The graph, and what ONNX Runtime should open: the path, or the model with its inputs mended.

    Some exporters list weights among the inputs, even ones that no node uses any more, and ONNX
    Runtime would then ask for them.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    asked = {name for node in graph.node for name in node.input} - {
        x.name for x in graph.initializer
    }
    inputs = [x for x in graph.input if x.name in asked]
    if len(inputs) == len(graph.input):
        return graph, str(path)
    del graph.input[:]
    graph.input.extend(inputs)
    return graph, model.SerializeToString()


def _insightface_contract(graph: onnx.GraphProto) -> InputContract:
    names = [node.name for node in graph.node[:8]]
    subtracts = any(name.startswith(("Sub", "_minus")) for name in names)
    multiplies = any(name.startswith(("Mul", "_mul")) for name in names)
    return InputContract(mean=0.0, std=1.0) if subtracts and multiplies else InputContract()
