"""What the head does in one pass over the CPU's memory where torch takes several: passes.c.

A centre is read with its norm, exponentials are made with their sums, and a row is updated where it
stands, which torch must read, change and write in turn. The machine's C compiler builds it for the
processor at hand when it is first asked for.

Letters: B rows of the global batch, n classes of a piece, K sub-centres, D embedding.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("passes.c")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_X86_FLAGS = ["-mprefer-vector-width=512"]
_SECONDS = 60  # for the compiler
_REALS = {torch.float32: "float", torch.float64: "double"}

_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class NotBuilt(Exception):
    """There is no program for this machine."""


class Passes:
    """The functions of passes.c for tensors of one dtype on the CPU.

    Raises:
        NotBuilt: no compiler, or one that fails, or a dtype that is not fp32 or fp64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _REALS:
            raise NotBuilt(f"class rows are {dtype}, not float32 or float64")
        self.dtype = dtype
        library = _build(_REALS[dtype])
        real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
        self._tiny = torch.finfo(dtype).tiny

        def function(name: str, *types: Any) -> Any:
            found = library[name]
            found.argtypes, found.restype = [*types, _THREADS], None
            return found

        pointers, counts = [_POINTER] * 5, [_COUNT] * 3
        self._read_rows = function("read_rows", *pointers[:2], *counts[:2], real, *pointers[:2])
        self._sum_exp = function("sum_exp", *pointers[:2], *counts[:2], _POINTER)
        self._slopes = function("slopes", *pointers[:3], *counts[:2], _POINTER)
        self._sgd = function("sgd", *pointers, *counts, real, real, real)

    def read_rows(
        self, table: Tensor, index: Tensor | None, out: Tensor | None, inverse: Tensor
    ) -> None:
        """Rows of the table [*, D] into `out` [n, D], where there is one, and 1 / |w| of each into
        `inverse` [n], 1 where w is 0. index: int64 [n] rows; None: the first n."""
        self._read_rows(
            self._at(table), _rows(index), len(inverse), table.shape[1], self._tiny,
            self._at(out), self._at(inverse), torch.get_num_threads(),
        )  # fmt: skip

    def sum_exp(self, z: Tensor, inverse: Tensor) -> Tensor:
        """Sum over n of exp(z * inverse): [B]. z: [B, n]."""
        mass = z.new_empty(len(z))
        self._sum_exp(
            self._at(z), self._at(inverse), *z.shape, self._at(mass), torch.get_num_threads()
        )
        return mass

    def slopes(self, z: Tensor, inverse: Tensor, along: Tensor) -> Tensor:
        """With c = z * inverse and e = exp(c): z [B, n] becomes e * inverse, and what is returned
        is the sum over B of along * c * e: [n]. along: [B]."""
        radial = torch.empty_like(inverse)
        self._slopes(
            self._at(z), self._at(inverse), self._at(along), *z.shape, self._at(radial),
            torch.get_num_threads(),
        )  # fmt: skip
        return radial

    def sgd(
        self,
        tables: Mapping[str, Tensor],  # "weight" and "momentum", [*, K * D]
        index: Tensor | None,  # int64 [n] their rows, each once; None: the first n
        grad: Tensor,  # [n, K, D]
        radial: Tensor | None,  # [n * K] how much of each centre its gradient is to lose
        lr: float,
        momentum: float,
        decay: float,
    ) -> None:
        """optim.RowSGD's update, in place."""
        velocity = tables["momentum"] if momentum != 0 else None
        self._sgd(
            self._at(tables["weight"]), self._at(velocity), self._at(grad), self._at(radial),
            _rows(index), *grad.shape, lr, momentum, decay, torch.get_num_threads(),
        )  # fmt: skip

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise TypeError(
                f"{tensor.dtype} on {tensor.device}, but head_kernel=native was chosen for "
                f"{self.dtype} on the CPU: choose after moving the head"
            )
        return _dense(tensor)


def _rows(index: Tensor | None) -> int | None:
    if index is None:
        return None
    assert index.dtype == torch.int64 and index.device.type == "cpu"
    return _dense(index)


def _dense(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@functools.cache
def _build(real: str) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise NotBuilt("there is no C compiler (cc, gcc or what CC names)")
    flags = _FLAGS + (_X86_FLAGS if platform.machine() == "x86_64" else [])
    with tempfile.TemporaryDirectory(prefix="arcline-passes-") as folder:
        library = f"{folder}/passes.so"
        command = [
            *compiler.split(), *flags, f"-DREAL={real}", "-shared", "-fPIC", str(_SOURCE), "-o",
            library, "-lm",
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
            return ctypes.CDLL(library)  # stays when the file is gone
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip() or "without a word").splitlines()[0]
            raise NotBuilt(f"{compiler} ended with {error.returncode}: {said}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotBuilt(f"{compiler}: {error}") from error
