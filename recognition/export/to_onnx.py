"""A trained backbone as an ONNX file that is measured against torch before it gets its name.

The graph: `input` float32 [batch, 3, 112, 112], RGB, (pixel - 127.5) / 127.5; `embedding` float32
[batch, D], not normalised; batch is free. The pixel normalisation stays outside on purpose:
InsightFace's client, and others that copied it, apply it themselves unless they find a Sub and a
Mul among the names of the first eight nodes. If it is baked in, the export names two nodes so that
they find them. `metadata_props` describes the input and the output.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from data_tools.common import files
from data_tools.common.errors import UserError
from recognition.backbones.input import INPUT_SIZE
from recognition.export.graph import OPSET, build_graph, check_graph, name_normalisation
from recognition.export.parity import BATCH_SIZES, LIMITS, ExportError, ParityLimits, measure
from recognition.export.quantise import PRECISIONS, to_fp16, to_int8

FORMAT_VERSION = 1  # of the metadata
PIXEL_MEAN = PIXEL_STD = 127.5  # of pixels 0..255

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class GraphOptions:
    """The steps that the graph contains beside the network."""

    normalise: bool = False  # takes pixels 0..255: (pixel - 127.5) / 127.5 is in the graph
    flip_sum: bool = False  # e(image) + e(mirror image)
    l2: bool = False  # embeddings of length 1

    def facts(self) -> dict[str, str]:
        """The facts of these steps that a caller needs."""
        embedding = "e(image) + e(mirror image)" if self.flip_sum else "e(image)"
        return {
            "mean": "0" if self.normalise else str(PIXEL_MEAN),
            "std": "1" if self.normalise else str(PIXEL_STD),
            "embedding": f"{embedding}, {'of length 1' if self.l2 else 'not normalised'}",
        }


class NetworkWithOptions(nn.Module):
    """The network with what `graph_options` adds: images [n, 3, 112, 112] -> embeddings [n, D]."""

    def __init__(self, network: nn.Module, graph_options: GraphOptions) -> None:
        super().__init__()
        self.network, self.graph_options = network, graph_options

    def forward(self, images: Tensor) -> Tensor:
        if self.graph_options.normalise:
            images = (images - PIXEL_MEAN) * (1 / PIXEL_STD)
        if self.graph_options.flip_sum:
            both = torch.stack([images, images.flip(3)], 1)  # [n, 2, 3, 112, 112]
            embeddings = self.network(both.flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)
        else:
            embeddings = self.network(images)
        if self.graph_options.l2:
            embeddings = nn.functional.normalize(embeddings)
        return embeddings


def export_onnx(
    module: nn.Module,
    path: str | Path,
    *,
    metadata: Mapping[str, str],
    example_images: Images | None = None,  # [n, 112, 112, 3] RGB
    precision: str = "fp32",
    graph_options: GraphOptions = GraphOptions(),  # noqa: B008, frozen
    calibration_images: Images | None = None,  # [n, 112, 112, 3] RGB, for int8
    limits: ParityLimits | None = None,  # None: LIMITS[precision]
    verify: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write `module` to `path` once ONNX Runtime agrees with torch, and report what was measured.

    The measure, on each of BATCH_SIZES: the cosine of the file's embedding with torch's, and
    max |e / ||e|| - e' / ||e'||| over all coordinates, on `example_images` (seeded noise without
    them). An existing file at `path` is replaced on success and untouched on failure.

    metadata: facts of the run (network, commit, margin, ...), written beside those of the input.
    module: in eval mode, fp32, on the CPU.
    verify: called with the finished file under a temporary name; its result is reported and written
        into the metadata as JSON, under "verification". It raises ExportError to refuse the file.

    Raises:
        ValueError: the module is in training mode, of another dtype or on another device; images of
            another shape or dtype; int8 without images to calibrate on.
        ExportError: the graph cannot be written with a free batch, is not valid ONNX, differs from
            torch beyond the limits, or its names would make clients skip or repeat the
            normalisation.
        OSError: the directory does not exist or cannot be written.
    """
    path = Path(path)
    check_module(module)
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
    images = noise_images() if example_images is None else check_examples(example_images)
    if precision == "int8" and calibration_images is None:
        raise UserError("int8 needs real images to set the ranges of its activations")
    if files.is_dir(path) or not files.is_dir(path.parent):
        reason = "is a directory" if files.is_dir(path) else f"{path.parent} is not a directory"
        raise OSError(f"cannot write {path}: {reason}")

    def prepare(pixels: Images) -> np.ndarray:
        return prepared(pixels, graph_options)

    whole = (
        NetworkWithOptions(module, graph_options).eval()
        if graph_options != GraphOptions()
        else module
    )
    model = build_graph(whole)
    size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    facts: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        model, facts["fp32_nodes"] = to_fp16(model, prepare(images))
    elif precision == "int8":
        assert calibration_images is not None
        model = to_int8(model, prepare(check_examples(calibration_images)))
        facts["calibrated_on"] = f"{len(calibration_images)} images"
    entries = {**metadata, **input_facts(graph_options)}
    entries |= {"embedding_size": str(size), "precision": precision}
    name_normalisation(model, graph_options.normalise)
    check_graph(model, graph_options.normalise)
    onnx.helper.set_model_props(model, entries)
    try:
        with files.replacing(path) as file:  # keeps an existing file at `path` until the end
            aside = Path(file.name)
            file.write(model.SerializeToString())
            file.flush()
            agreement = measure(whole, aside, images, prepare)
            agreement.check(limits or LIMITS[precision])
            facts |= agreement.facts()
            if verify is not None:
                facts["verification"] = verify(aside)
                entries["verification"] = json.dumps(facts["verification"])
            entries["agreement"] = json.dumps(facts["cosine"])
            onnx.helper.set_model_props(model, entries)
            content = model.SerializeToString()
            file.seek(0)
            file.truncate()
            file.write(content)
    except ExportError as error:
        raise ExportError(f"{error}; {path} was not written") from error
    return {
        "path": str(path),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "opset": OPSET,
        "embedding_size": size,
        **facts,
        "checked_on": "noise" if example_images is None else f"{len(images)} images",
        "metadata": entries,
    }


def check_module(module: nn.Module) -> None:
    """Raises: UserError for a module that would not export its fp32 inference."""
    if any(part.training for part in module.modules()):
        raise UserError("the module is in training mode: call eval() before the export")
    for name, tensor in module.state_dict().items():
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int64):
            raise UserError(
                f"{name} is {tensor.dtype} on {tensor.device}: the export takes float32 on cpu"
            )


def check_examples(images: Images) -> Images:
    """`images`, if they are uint8 [n, 112, 112, 3] with n > 0."""
    if images.ndim != 4 or images.shape[1:] != (INPUT_SIZE, INPUT_SIZE, 3) or not len(images):
        raise UserError(
            f"example images of shape {list(images.shape)}: "
            f"expected [n, {INPUT_SIZE}, {INPUT_SIZE}, 3] with n > 0"
        )
    if images.dtype != np.uint8:
        raise UserError(f"example images of {images.dtype}: expected uint8 pixels 0..255")
    return images


def noise_images() -> Images:
    """[n, 112, 112, 3] of seeded colour patches: networks see all pixel noise as alike."""
    patches = np.random.default_rng(0).integers(0, 256, (max(BATCH_SIZES), 8, 8, 3), dtype=np.uint8)
    return patches.repeat(INPUT_SIZE // 8, axis=1).repeat(INPUT_SIZE // 8, axis=2)


def input_facts(graph_options: GraphOptions = GraphOptions()) -> dict[str, str]:  # noqa: B008, frozen
    """The facts of the graph's input and output that a caller needs."""
    return {
        "format_version": str(FORMAT_VERSION),
        "input_size": f"{INPUT_SIZE},{INPUT_SIZE}",  # height, width
        "color_order": "RGB",
        **graph_options.facts(),  # mean and std: input = (pixel - mean) / std, pixels 0..255
    }


def prepared(images: Images, graph_options: GraphOptions) -> np.ndarray:
    """[n, 112, 112, 3] -> float32 [n, 3, 112, 112] as the graph takes them."""
    pixels = images.astype(np.float32)
    if not graph_options.normalise:
        pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
