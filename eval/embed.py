"""Networks as functions from aligned faces to embeddings: a run of ours, or any recognition ONNX.

Letters: n images of a call, D embedding size.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from recognition.checkpoint import load_backbone


class InputContract(NamedTuple):
    """What a network expects: pixels 0..255 become (pixel - mean) / std, in this channel order."""

    size: int = 112  # pixels, both sides
    color_order: str = "RGB"
    mean: float = 127.5
    std: float = 127.5

    @classmethod
    def from_metadata(cls, entries: Mapping[str, str]) -> "InputContract":
        """The contract in an ONNX file that recognition.export wrote.

        Raises:
            ValueError: an entry is absent or says nothing that can be followed.
        """
        try:
            height, width = (int(side) for side in entries["input_size"].split(","))
            order, mean, std = entries["color_order"], float(entries["mean"]), float(entries["std"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"metadata of the input: {error!r} in {dict(entries)}") from error
        if height != width or order not in ("RGB", "BGR") or not std > 0:
            raise ValueError(f"metadata of the input cannot be followed: {dict(entries)}")
        return cls(height, order, mean, std)


class Embedder(Protocol):
    facts: dict[str, object]  # what a report says of the network

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 RGB [n, 112, 112, 3], any n >= 1 -> embeddings [n, D], not normalised."""


def open_embedder(path: str | Path, batch_size: int = 64) -> Embedder:
    """The network at `path`: a run or checkpoint directory, or an .onnx file.

    batch_size: images that the network sees at once.

    Raises:
        FileNotFoundError: there is nothing at `path`, or a directory without a checkpoint.
        ValueError: not a network for faces of 112 x 112.
    """
    path = Path(path)
    if path.is_dir():
        return RunEmbedder(path, batch_size)
    if not path.is_file():
        raise FileNotFoundError(f"no run directory and no .onnx file at {path}")
    return OnnxEmbedder(path, batch_size)


class RunEmbedder:
    """The backbone of a run or checkpoint directory in fp32, on the GPU where there is one."""

    def __init__(self, path: str | Path, batch_size: int = 64) -> None:
        module, config = load_backbone(str(path))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device)
        self.batch_size = batch_size
        self.facts: dict[str, object] = {
            "path": str(path),
            "network": config["network"],
            "embedding_size": config["embedding_size"],
            "input": InputContract()._asdict(),
            "runtime": f"torch {torch.__version__} on {self.device.type}",
        }

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = []
        for batch in torch.from_numpy(images).split(self.batch_size):
            x = batch.to(self.device).permute(0, 3, 1, 2).float()  # [n, 3, 112, 112]
            parts.append(self.module(x.div_(255).sub_(0.5).div_(0.5)).float().cpu())
        return torch.cat(parts).numpy()


class OnnxEmbedder:
    """An ONNX file through ONNX Runtime: one image input [n, 3, 112, 112], one output [n, D].

    The input's normalisation is what the file's metadata says (`InputContract`). Without metadata
    it is InsightFace's: RGB, (x - 127.5) / 127.5, unless one of the first eight nodes is named Sub*
    or _minus* and one Mul* or _mul*, which means that the graph does it itself.
    """

    def __init__(self, path: str | Path, batch_size: int = 64) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: old exporters cause a warning per weight
        try:
            graph, source = _read_graph(path)
            self.session = onnxruntime.InferenceSession(source, options, _providers())
        except Exception as error:  # protobuf's and ONNX Runtime's own kinds
            raise ValueError(f"{path} is not an ONNX model that can run: {error}") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4:
            raise ValueError(
                f"{path} has the inputs {[x.name for x in inputs]} and outputs "
                f"{[x.name for x in outputs]}; a recognition model has one image and one embedding"
            )
        self.name, self.dtype = inputs[0].name, _FLOATS.get(inputs[0].type)
        if self.dtype is None:
            raise ValueError(f"{path} takes {inputs[0].type}, not float images")
        entries = self.session.get_modelmeta().custom_metadata_map
        if "mean" in entries or "std" in entries:
            self.contract = InputContract.from_metadata(entries)
        else:
            self.contract = _insightface_contract(graph)
        fixed, *shape = inputs[0].shape
        if self.contract.size != 112 or any(
            isinstance(length, int) and length != expected
            for length, expected in zip(shape, (3, 112, 112), strict=True)
        ):
            raise ValueError(f"{path} takes images of {shape}, not [3, 112, 112]")
        self.fixed_batch = fixed if isinstance(fixed, int) else None
        self.batch_size = self.fixed_batch or batch_size
        self.facts: dict[str, object] = {
            "path": str(path),
            **({"network": entries["network"]} if "network" in entries else {}),
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            "input": self.contract._asdict(),
            "runtime": f"onnxruntime {onnxruntime.__version__}, {self.session.get_providers()[0]}",
            "metadata": dict(entries),
        }

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            num = len(batch)
            if self.fixed_batch is not None and num < self.fixed_batch:
                batch = np.resize(batch, (self.fixed_batch, *batch.shape[1:]))  # repeats images
            if self.contract.color_order == "BGR":
                batch = batch[..., ::-1]
            x = (batch.astype(np.float32) - self.contract.mean) / self.contract.std
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=self.dtype)
            (output,) = self.session.run(None, {self.name: x})
            parts.append(output[:num].astype(np.float32))
        return np.concatenate(parts)


_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _providers() -> list[str]:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in onnxruntime.get_available_providers()]


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
