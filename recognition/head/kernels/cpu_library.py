"""What the head does in one pass over the CPU's memory where torch takes several: cpu_library.c.

A centre is read with its norm, exponentials are made with their sums, and a row is updated in
place; torch reads, changes and writes each in turn. The machine's C compiler builds it for the
processor at hand when it is first asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.common.errors import UserError, UserTypeError

_SOURCE = Path(__file__).with_name("cpu_library.c")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_X86_FLAGS = ["-mprefer-vector-width=512"]
_SECONDS = 60  # for the compiler
_REALS = {torch.float32: "float", torch.float64: "double"}

_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class NotBuilt(Exception):
    """There is no program for this machine."""


class CpuLibrary:
    """The functions of cpu_library.c for tensors of one dtype on the CPU.

    Raises:
        NotBuilt: no compiler, or one that fails, or a dtype that is not fp32 or fp64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _REALS:
            raise NotBuilt(f"class rows are {dtype}, not float32 or float64")
        self.dtype = dtype
        library = _built(_REALS[dtype])
        if isinstance(library, str):
            raise NotBuilt(library)
        real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
        self._limits = torch.finfo(dtype).tiny, torch.finfo(dtype).max  # of a norm

        def function(name: str, *types: Any) -> Any:
            try:
                found = library[name]
            except AttributeError as error:
                raise NotBuilt(f"the compiled library cannot be used: {error}") from error
            found.argtypes, found.restype = [*types, _THREADS], None
            return found

        pointers, counts = [_POINTER] * 5, [_COUNT] * 3
        self._read_rows = function(
            "read_rows", *pointers[:2], *counts[:2], real, real, *pointers[:2]
        )
        self._leave_out = function("leave_out", *pointers[:3], *counts[:2])
        self._sum_exp = function("sum_exp", *pointers[:2], *counts[:2], _POINTER)
        self._slopes = function("slopes", *pointers[:3], *counts[:2], _POINTER)
        self._sgd = function("sgd", *pointers, *counts, real, real, real)

    def read_rows(
        self, table: Tensor, index: Tensor | None, out: Tensor | None, inverse: Tensor
    ) -> None:
        """Rows of the table [*, D] into `out` [n, D], where there is one, and 1 / |w| of each into
        `inverse` [n], 1 where w is 0. index: int64 [n] rows; None: the first n."""
        self._read_rows(
            self._at(table),
            _rows(index),
            inverse.shape[0],
            table.shape[1],
            *self._limits,
            self._at(out),
            self._at(inverse),
            torch.get_num_threads(),
        )

    def leave_out(self, z: Tensor, row: Tensor, column: Tensor) -> None:
        """z[row, column] = -inf. z: [B, n]; row, column: int64 [m]."""
        self._leave_out(self._at(z), _rows(row), _rows(column), row.shape[0], z.shape[1], 1)

    def sum_exp(self, z: Tensor, inverse: Tensor) -> Tensor:
        """Sum over n of exp(z * inverse): [B]. z: [B, n]."""
        mass = z.new_empty(z.shape[0])
        self._sum_exp(
            self._at(z), self._at(inverse), *z.shape, self._at(mass), torch.get_num_threads()
        )
        return mass

    def slopes(self, z: Tensor, inverse: Tensor, along: Tensor) -> Tensor:
        """With c = z * inverse and e = exp(c): z [B, n] becomes e * inverse, and what is returned
        is the sum over B of along * c * e: [n]. along: [B]."""
        radial = torch.empty_like(inverse)
        self._slopes(
            self._at(z),
            self._at(inverse),
            self._at(along),
            *z.shape,
            self._at(radial),
            torch.get_num_threads(),
        )
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
            self._at(tables["weight"]),
            self._at(velocity),
            self._at(grad),
            self._at(radial),
            _rows(index),
            *grad.shape,
            lr,
            momentum,
            decay,
            torch.get_num_threads(),
        )

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if tensor.dtype is not self.dtype or not tensor.is_cpu:
            raise UserTypeError(
                f"{tensor.dtype} on {tensor.device}, but head_kernel=native was chosen for "
                f"{self.dtype} on the CPU: choose after moving the head"
            )
        return _dense(tensor)


def _rows(index: Tensor | None) -> int | None:
    if index is None:
        return None
    if index.dtype is not torch.int64 or not index.is_cpu:
        raise UserTypeError(f"index: {index.dtype} on {index.device}, not int64 on the CPU")
    return _dense(index)


def _dense(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise UserError(
            f"head_kernel=native wants dense memory, not strides of {tensor.stride()} for "
            f"{tuple(tensor.shape)}: make it contiguous()"
        )
    return tensor.data_ptr()


@functools.cache
def _built(real: str) -> ctypes.CDLL | str:
    """The program, or why there is none."""
    named = os.environ.get("CC", "").strip()
    try:
        compiler = shlex.split(named) or [shutil.which("cc") or shutil.which("gcc") or ""]
    except ValueError as error:
        return f"CC={named}: {error}"
    if not compiler[0]:
        return "no C compiler was found: install gcc, or name one in the variable CC"
    flags = _FLAGS + (_X86_FLAGS if platform.machine() == "x86_64" else [])
    try:
        # What is loaded stays when its file is gone.
        with tempfile.TemporaryDirectory(
            prefix="arcline-passes-", ignore_cleanup_errors=True
        ) as folder:
            library = f"{folder}/passes.so"
            program = [f"-DREAL={real}", "-shared", "-fPIC", str(_SOURCE), "-o", library, "-lm"]
            return _compile([*compiler, *flags, *program]) or ctypes.CDLL(library)
    except OSError as error:
        return (
            f"{shlex.join(compiler)} (CC names another): {error}. TMPDIR names a directory that "
            "can be written to and from which programs may run"
        )


def _compile(command: list[str]) -> str:
    """Run the compiler. What it complained of; "" if of nothing."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_SECONDS} s; CC names another compiler"
    finally:
        if process.returncode is None:  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == 0:
        return ""
    first = (said.strip() or "no output").splitlines()[0]
    return f"{command[0]} ended with {process.returncode}: {first}; CC names another compiler"
