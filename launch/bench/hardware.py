"""Where a figure comes from: the processor, its cores, the GPU; and what that GPU can do.

    python -m launch.bench.hardware [--side 8192] [--classes 131072]

prints one JSON line: the versions of what is installed, and the rate of matrix products in bf16
with fp32 sums, square and in the three shapes of the head, which others are compared with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from typing import Any

import torch

from data_tools.common import files

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "opencv-python-headless",
    "onnx",
    "onnxruntime",
    "tensorboard",
    "safetensors",
    "nvidia-dali-cuda130",
    "liger-kernel",
    "quack-kernels",
    "cut-cross-entropy",
)
_REPEATS = 10


def machine(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if files.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
        processor = named[1] if named else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"processor": processor, "cores": os.cpu_count(), "gpu": gpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=8192, help="of the square; default %(default)s")
    parser.add_argument("--classes", type=int, default=131_072, help="of a chunk of the head")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    installed: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    rows, size = 4096 * args.classes // 131_072, 512
    shapes = {  # of the factors: [n, k] x [k, m]
        "square": (args.side, args.side, args.side),
        "logits": (rows, size, args.classes),
        "gradient of the embeddings": (rows, args.classes, size),
        "gradient of the rows": (args.classes, rows, size),
    }
    report = {
        "machine": machine(device),
        "gpu_bytes": memory,
        "capability": torch.cuda.get_device_capability(device) if memory else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "installed": installed,
        "tflops": {name: _rate(*shape, device) for name, shape in shapes.items()},
    }
    print(json.dumps(report))


def _rate(n: int, k: int, m: int, device: torch.device) -> float:
    """1e12 floating-point operations a second of a bf16 product, the median of some."""
    left = torch.randn(n, k, device=device).bfloat16()
    right = torch.randn(k, m, device=device).bfloat16()
    out = left.new_empty(n, m)
    seconds = []
    for i in range(_REPEATS + 2):
        wait_for(device)
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        wait_for(device)
        if i >= 2:
            seconds.append(time.perf_counter() - began)
    return round(2e-12 * n * k * m / statistics.median(seconds), 3)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
