"""Any ONNX recognition network as an embedder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from data_tools.common.errors import UserError, one_line
from eval.embedders import onnx_file
from eval.embedders.contract import InputContract

# How far an embedding may move with its batch, relative to its length. Quantisation ranges that
# depend on the batch (int8) move it less than this; the embedding of another image is farther off.
SAME_IMAGE = 0.5


class OnnxEmbedder:
    """An ONNX file through ONNX Runtime: one image input [n, 3, H, W], one output [n, D].

    If nothing states the input contract, it is InsightFace's: RGB, (x - 127.5) / 127.5. If one of
    the first eight nodes is named Sub* or _minus* and another Mul* or _mul*, the graph normalises
    its input itself.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 64,
        stated: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        file = onnx_file.read(path)
        try:
            self._open(file, path, batch_size, dict(stated or {}), source)
        except _CannotRun:
            mended = onnx_file.with_slopes_per_channel(file)
            if mended is None:
                raise
            self._open(mended, path, batch_size, dict(stated or {}), source)
            self._note("its PReLU slopes [C] are read as one slope per channel")

    def _open(
        self,
        file: onnx_file.OnnxFile,
        path: str | Path,
        batch_size: int,
        stated: dict[str, Any],
        source: str,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: old exporters cause one warning per weight
        if threads := os.environ.get("OMP_NUM_THREADS"):  # torchrun divides the cores by it
            options.intra_op_num_threads = int(threads)
        try:
            self.session = onnxruntime.InferenceSession(file.runnable, options, _providers())
        except Exception as error:  # ONNX Runtime's errors share no other base class
            raise _CannotRun(f"{path}: ONNX Runtime cannot open it: {one_line(error)}") from error
        graph = file.model.graph
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
        self.contract = _stated(path, graph, entries, known, stated, source)
        if [self.contract.height, self.contract.width] != known:
            raise UserError(
                f"{path} takes images of {known[0]} x {known[1]}, but its contract says "
                f"{self.contract.height} x {self.contract.width}"
            )
        self.fixed_batch = fixed if isinstance(fixed, int) else None
        self.digest = file.digest
        self.facts: dict[str, object] = {
            "path": str(path),
            **({"network": entries["network"]} if "network" in entries else {}),
            "sha256": self.digest,
            "input": self.contract._asdict(),
            "runtime": f"onnxruntime {onnxruntime.__version__}, {self.session.get_providers()[0]}",
            "metadata": dict(entries),
        }
        self._try_batches()
        self.batch_size = self.fixed_batch or batch_size

    def _try_batches(self) -> None:
        """Find out whether the graph takes more than one image, regardless of its declared input.

        Some exporters declare a free batch size but fix it inside the graph, in a Reshape; such a
        file runs with one image only. A batch must also give each image the same embedding as the
        image alone.
        """
        patches = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        patches[0] //= 2  # darker: two images of pixel noise look alike to a network
        x = self.prepare(patches.repeat(14, axis=1).repeat(14, axis=2))
        if self.fixed_batch is not None:
            self._run(np.resize(x, (self.fixed_batch, *x.shape[1:])))
            return
        alone = np.concatenate([self._run(x[:1]), self._run(x[1:])]).astype(np.float64)
        try:
            both = self._run(x).astype(np.float64)
        except _CannotRun as error:
            reason = f"it cannot run two images: {one_line(error)}"
        else:
            length = np.maximum(*(np.linalg.norm(x, axis=1) for x in (both, alone)))
            if not (np.linalg.norm(both - alone, axis=1) > SAME_IMAGE * length).any():
                return
            reason = "a batch of two gives other embeddings than each image alone"
        self.fixed_batch = 1
        self._note(f"one image at a time: its batch is fixed inside the graph ({reason})")

    def _note(self, text: str) -> None:
        before = f"{self.facts['note']}; " if "note" in self.facts else ""
        self.facts["note"] = f"{before}{text}"

    def _run(self, x: NDArray) -> NDArray:
        """Embeddings [n, D] of exactly these images. Raises: UserError if ONNX Runtime fails."""
        quiet = onnxruntime.RunOptions()
        quiet.log_severity_level = 4  # the exception carries the message
        where = f"{self.facts['path']}: ONNX Runtime cannot run it on {list(x.shape)}"
        try:
            (output,) = self.session.run(None, {self.name: x}, quiet)
        except Exception as error:  # ONNX Runtime's errors share no other base class
            raise _CannotRun(f"{where}: {one_line(error)[:400]}") from error
        if output.ndim < 2 or len(output) != len(x):
            raise _CannotRun(
                f"{self.facts['path']}: {len(x)} images gave an output of shape "
                f"{list(output.shape)}, not [{len(x)}, D]"
            )
        return output.reshape(len(x), -1)

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
            parts.append(self._run(x)[:num].astype(np.float32))
        return np.concatenate(parts)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.forward(self.prepare(images))


class _CannotRun(UserError):
    """ONNX Runtime cannot open the file, or fails on images."""


_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _stated(
    path: str | Path,
    graph: onnx.GraphProto,
    entries: Mapping[str, str],
    known: list[int],
    stated: dict[str, Any],
    source: str,
) -> InputContract:
    size = {"height": known[0], "width": known[1]}
    if "mean" in entries or "std" in entries:
        base = InputContract.from_metadata(entries)
        if (base.height, base.width) != tuple(known):
            raise UserError(
                f"{path}: its metadata says {base.height} x {base.width} images, "
                f"but its input takes {known}"
            )
    else:
        base = _insightface_contract(graph).changed(size, f"the input of {path}")
    return base.changed(stated, source)


def _providers() -> list[Any]:
    device = {"device_id": int(os.environ.get("LOCAL_RANK", 0))}
    wanted: tuple[tuple[str, dict[str, int]], ...] = (
        ("CUDAExecutionProvider", device),
        ("CPUExecutionProvider", {}),
    )
    return [entry for entry in wanted if entry[0] in onnxruntime.get_available_providers()]


def _insightface_contract(graph: onnx.GraphProto) -> InputContract:
    names = [node.name for node in graph.node[:8]]
    subtracts = any(name.startswith(("Sub", "_minus")) for name in names)
    multiplies = any(name.startswith(("Mul", "_mul")) for name in names)
    return InputContract(mean=0.0, std=1.0) if subtracts and multiplies else InputContract()
