"""How much an ONNX file differs from its torch module, on the same images.

Letters: n images of a batch, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

BATCH_SIZES = (1, 2, 7, 32)  # on which the file must agree with torch

Floats = np.ndarray[Any, np.dtype[np.floating]]


class ExportError(RuntimeError):
    """The exported graph is not the network; no file was left."""


@dataclass(frozen=True)
class ParityLimits:
    """How much a precision may differ from torch.

    Cosines are between the embeddings of the file and of torch of the same image; drops are
    percentage points of accuracy and of TAR that are lost on a set of pairs.
    """

    max_abs_error: float  # of a coordinate of the normalised embeddings
    min_cosine: float
    mean_cosine: float
    accuracy_drop: float
    tar_drop: float


# Rounding alone. fp32: sums in another order. fp16: 11 bits through some fifty layers. int8: what
# networks of the field keep when they still recognise; the drops are what decides.
LIMITS = {
    "fp32": ParityLimits(1e-4, 1 - 1e-6, 1 - 1e-6, 0.1, 0.1),
    "fp16": ParityLimits(0.05, 0.999, 0.9995, 0.1, 0.2),
    "int8": ParityLimits(1.0, 0.8, 0.95, 0.5, 1.0),
}


@dataclass(frozen=True)
class Agreement:
    """The measurements on batches of BATCH_SIZES."""

    max_abs_error: dict[int, float]  # by batch size
    cosine: Floats  # [sum of the sizes], sorted

    def facts(self) -> dict[str, Any]:
        least, one, ten, half = np.quantile(self.cosine, [0, 0.01, 0.1, 0.5]).tolist()
        return {
            "max_abs_error": max(self.max_abs_error.values()),
            "max_abs_error_by_batch": {str(n): e for n, e in self.max_abs_error.items()},
            "cosine": {
                "min": least,
                "p1": one,
                "p10": ten,
                "median": half,
                "mean": float(self.cosine.mean()),
                "count": len(self.cosine),
            },
        }

    def check(self, limits: ParityLimits) -> None:
        """Raises: ExportError if the file is beyond the limits; it says by how much."""
        worst = max(self.max_abs_error.values())
        listed = ", ".join(f"batch {n}: {error:.2e}" for n, error in self.max_abs_error.items())
        if not worst < limits.max_abs_error:
            raise ExportError(
                f"the file differs from torch by {worst:.2e}, allowed is less than "
                f"{limits.max_abs_error:.0e} ({listed})"
            )
        for name, value, least in (
            ("least", self.cosine.min(), limits.min_cosine),
            ("mean", self.cosine.mean(), limits.mean_cosine),
        ):
            if not value >= least:
                raise ExportError(
                    f"the {name} cosine of the file's embeddings with torch's is {value:.6f}, "
                    f"allowed is {least:.6f} or more ({listed})"
                )


def measure(
    module: nn.Module,
    path: Path,
    images: np.ndarray,  # uint8 [any, 112, 112, 3], used in turn
    prepare: Callable[[np.ndarray], Floats],  # -> what both take, float32 [n, 3, 112, 112]
    sizes: Sequence[int] = BATCH_SIZES,
) -> Agreement:
    """Torch and the file on the same batches. Raises: ExportError if the file cannot run them."""
    session = open_session(path)
    errors, cosines, start = {}, [], 0
    for size in sizes:
        batch = prepare(images[np.arange(start, start + size) % len(images)])
        start += size
        with torch.inference_mode():
            expected = module(torch.from_numpy(batch)).numpy()  # [n, D]
        try:
            (embedding,) = session.run(["embedding"], {"input": batch})
        except Exception as error:  # onnxruntime's errors share no other base
            raise ExportError(f"ONNX Runtime fails on a batch of {size}: {error}") from error
        errors[size], cosine = difference(embedding, expected)
        cosines.append(cosine)
    return Agreement(errors, np.sort(np.concatenate(cosines)))


def open_session(path: str | Path) -> onnxruntime.InferenceSession:
    """On the CPU. Raises: ExportError if ONNX Runtime refuses the file."""
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the file: {error}") from error


def difference(actual: Floats, expected: Floats) -> tuple[float, Floats]:
    """max |a / ||a|| - e / ||e|||, and the cosines [n]; infinite and -1 without embeddings."""
    if actual.shape != expected.shape:
        raise ExportError(f"the file gives embeddings {actual.shape}, torch {expected.shape}")
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    a_norm, e_norm = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, e))  # [n, 1]
    if not (np.isfinite(e_norm).all() and e_norm.all()):
        raise ExportError(
            "the network itself gives zero or non-finite embeddings: it is untrained or damaged"
        )
    if not (np.isfinite(a_norm).all() and a_norm.all()):
        return float("inf"), np.full(len(a), -1.0)
    a, e = a / a_norm, e / e_norm
    return float(np.abs(a - e).max()), (a * e).sum(1)
