"""A trained backbone as an ONNX file that is proved equal to torch before it gets its name.

The graph: `input` float32 [batch, 3, 112, 112], RGB, (pixel - 127.5) / 127.5; `embedding` float32
[batch, D], not normalised; batch is free. The pixel normalisation stays outside on purpose:
InsightFace's client, and others that copied it, apply it themselves unless they find a Sub and a
Mul among the names of the first eight nodes. What the numbers mean stands in `metadata_props`.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from recognition.backbones.input import INPUT_SIZE

OPSET = 18
FORMAT_VERSION = 1  # of the metadata
BATCH_SIZES = (1, 2, 7)  # on which the file must agree with torch
PIXEL_MEAN = PIXEL_STD = 127.5  # of pixels 0..255

Images = np.ndarray[Any, np.dtype[np.uint8]]


class ExportError(RuntimeError):
    """The exported graph is not the network; no file was left."""


def export_onnx(
    module: nn.Module,
    path: str | Path,
    *,
    metadata: Mapping[str, str],
    example_images: Images | None = None,  # [n, 112, 112, 3] RGB
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Write `module` to `path` once ONNX Runtime agrees with torch, and report what was measured.

    The measure, on each of BATCH_SIZES: max |e / ||e|| - e' / ||e'||| over all coordinates, e from
    torch, e' from the file, on `example_images` (seeded noise without them). An existing file at
    `path` is replaced on success and untouched on failure.

    metadata: facts of the run (network, commit, margin, ...), written beside those of the input.
    module: in eval mode, fp32, on the CPU.

    Raises:
        ValueError: the module is in training mode, of another dtype or on another device; images of
            another shape or dtype.
        ExportError: the graph cannot be written with a free batch, is not valid ONNX, differs from
            torch by `tolerance` or more, or its names would make clients skip the normalisation.
        OSError: the directory does not exist or cannot be written.
    """
    path = Path(path)
    check_module(module)
    images = noise_images() if example_images is None else check_examples(example_images)
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a directory" if path.is_dir() else f"{path.parent} is not a directory"
        raise OSError(f"cannot write {path}: {reason}")
    model = build_graph(module)
    size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    facts = {**metadata, **input_facts(), "embedding_size": str(size)}
    onnx.helper.set_model_props(model, facts)
    check_graph(model)
    content = model.SerializeToString()
    with written_aside(path, content) as aside:
        errors = measure(module, aside, images)
        worst = max(errors.values())
        if worst >= tolerance:
            listed = ", ".join(f"batch {n}: {error:.2e}" for n, error in errors.items())
            raise ExportError(
                f"the file differs from torch by {worst:.2e}, allowed is less than "
                f"{tolerance:.0e} ({listed}); {path} was not written"
            )
    return {
        "path": str(path),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "opset": OPSET,
        "precision": "fp32",
        "embedding_size": size,
        "max_abs_error": worst,
        "max_abs_error_by_batch": {str(n): error for n, error in errors.items()},
        "tolerance": tolerance,
        "checked_on": "noise" if example_images is None else f"{len(images)} images",
        "metadata": facts,
    }


def check_module(module: nn.Module) -> None:
    """Refuse a module that would export something else than its inference."""
    if any(part.training for part in module.modules()):
        raise ValueError("the module is in training mode: call eval() before the export")
    for name, tensor in module.state_dict().items():
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int64):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}: the export takes float32 on cpu"
            )


def check_examples(images: Images) -> Images:
    """`images`, if they are uint8 [n, 112, 112, 3] with n > 0."""
    if images.ndim != 4 or images.shape[1:] != (INPUT_SIZE, INPUT_SIZE, 3) or not len(images):
        raise ValueError(
            f"example images of shape {list(images.shape)}: "
            f"expected [n, {INPUT_SIZE}, {INPUT_SIZE}, 3] with n > 0"
        )
    if images.dtype != np.uint8:
        raise ValueError(f"example images of {images.dtype}: expected uint8 pixels 0..255")
    return images


def noise_images() -> Images:
    """[7, 112, 112, 3] of seeded colour patches, for want of faces; pixel noise all looks alike."""
    patches = np.random.default_rng(0).integers(0, 256, (max(BATCH_SIZES), 8, 8, 3), dtype=np.uint8)
    return patches.repeat(INPUT_SIZE // 8, axis=1).repeat(INPUT_SIZE // 8, axis=2)


def input_facts() -> dict[str, str]:
    """What a caller must know to feed the graph."""
    return {
        "format_version": str(FORMAT_VERSION),
        "input_size": f"{INPUT_SIZE},{INPUT_SIZE}",  # height, width
        "color_order": "RGB",
        "mean": str(PIXEL_MEAN),  # input = (pixel - mean) / std, pixels 0..255
        "std": str(PIXEL_STD),
    }


def build_graph(module: nn.Module) -> onnx.ModelProto:
    """The module as an ONNX graph with a free batch, without traces of this machine's paths."""
    images = torch.zeros(2, 3, INPUT_SIZE, INPUT_SIZE)
    try:
        with quiet_exporter():
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
def quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on operators of packages that nobody installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse what onnx.checker refuses, a baked batch, and names that mislead clients."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the graph: {error}") from error
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(f"the batch of {value.name!r} is fixed in the graph")
    first = [node.name for node in model.graph.node[:8]]
    if any(name.startswith(("Sub", "_minus", "Mul", "_mul")) for name in first):
        raise ExportError(
            f"a Sub or Mul among the first nodes ({', '.join(first)}) tells InsightFace's client "
            "that the pixel normalisation is in the graph; it must stay outside"
        )


@contextmanager
def written_aside(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file of `content` beside `path` that takes its name if the body succeeds."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def measure(module: nn.Module, path: Path, images: Images) -> dict[int, float]:
    """{batch size: max abs difference of the normalised embeddings of torch and of the file}."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors = {}
    for size in BATCH_SIZES:
        chosen = images[np.arange(size) % len(images)]  # [size, 112, 112, 3]
        batch = ((chosen.astype(np.float32) - PIXEL_MEAN) / PIXEL_STD).transpose(0, 3, 1, 2)
        batch = np.ascontiguousarray(batch)  # [size, 3, 112, 112]
        with torch.inference_mode():
            expected = module(torch.from_numpy(batch)).numpy()  # [size, D]
        try:
            (embedding,) = session.run(["embedding"], {"input": batch})
        except Exception as error:  # onnxruntime's errors share no other base
            raise ExportError(f"ONNX Runtime fails on a batch of {size}: {error}") from error
        errors[size] = difference(embedding, expected)
    return errors


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |a / ||a|| - e / ||e|||; infinite where the file gives zero or non-finite embeddings."""
    if actual.shape != expected.shape:
        raise ExportError(f"the file gives embeddings {actual.shape}, torch {expected.shape}")
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    a_norm, e_norm = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, e))  # [n, 1]
    if not (np.isfinite(e_norm).all() and e_norm.all()):
        raise ExportError(
            "the network itself gives zero or non-finite embeddings: it is untrained or damaged"
        )
    if not (np.isfinite(a_norm).all() and a_norm.all()):
        return float("inf")
    return float(np.abs(a / a_norm - e / e_norm).max())
