"""What the Triton programs need on sm_90, compiled without a GPU: one JSON line a program.

python -m tests.recognition.head.kernels.sm90 [bf16] [fp16] [tf32] [fp32]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recognition.head.kernels import triton_ops

TARGET = GPUTarget("cuda", 90, 32)
SIZE = 512  # D
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32,
          "fp32": torch.float32}  # fmt: skip


def main(names: list[str]) -> int:
    if not os.path.exists(triton.knobs.nvidia.ptxas.path):
        print("ptxas is missing", file=sys.stderr)
        return 1
    for name in names or DTYPES:
        torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
        narrow = "fp32" if name == "tf32" else name
        common = {"x": f"*{narrow}", "unit": f"*{narrow}", "own": "*i64"}
        common |= {"num_rows": "i32", "num": "i32", "start": "i32", "limit": "fp32"}
        for blocks in triton_ops.blocks_for(DTYPES[name]):
            options = triton_ops.product_options(blocks, torch.empty(1, SIZE, dtype=DTYPES[name]))
            options["HAS_LIMIT"] = False
            what = f"{blocks} {name}"
            say(triton_ops._masses, common | {"parts": "*fp32"}, options, what)
            more = {"base": "*fp32", "weights": f"*{narrow}", "stride": "i32"}
            say(triton_ops._weights, common | more, options, what)
        rows = triton_ops.row_options(SIZE)
        wide = {"weight": "*fp32", "inverse": "*fp32", "num": "i32"}
        tiny = {"HAS_INDEX": True, "TINY": torch.finfo(torch.float32).tiny}
        say(
            triton_ops._unit_rows, wide | {"index": "*i64", "unit": f"*{narrow}"}, rows | tiny, name
        )
    more = {"grad": "*fp32", "factor": "*fp32", "out": "*fp32"}
    say(triton_ops._project, wide | more, rows, "fp32")
    return 0


def say(program: Any, types: dict[str, str], options: dict[str, Any], what: str) -> None:
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: v for name, v in options.items() if name not in settings}
    signature = {
        name: "constexpr" if name in constants else types[name] for name in program.arg_names
    }
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(program.arg_names)
        if signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(program, signature, constants, divisible)
    compiled = triton.compile(source, target=TARGET, options=settings)
    print(
        json.dumps(
            {
                "program": program.__name__, "what": what,
                "shared_bytes": compiled.metadata.shared, **resources(compiled.asm["ptx"]),
                "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
            }
        )
    )  # fmt: skip


def resources(ptx: str) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, from ptxas."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", file.name,
             "-o", "/dev/null"], check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return {"registers": int(registers[1]), "spilled_bytes": int(spilled[1])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
