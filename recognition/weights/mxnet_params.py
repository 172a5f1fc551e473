"""MXNet's .params files without MXNet: a list of named dense arrays.

Little-endian: u64 0x112, u64 0, u64 count, the arrays, u64 count, the names (u64 length, bytes).
An array: u32 magic (V2 0xF993FAC9 with an i32 storage type, V1 0xF993FAC8, else it is the old
form's number of dimensions), u32 dimensions, their sizes (i64; u32 in the old form), i32 device
type, i32 device, i32 kind, the values (apache/mxnet src/ndarray/ndarray.cc). Names carry "arg:" or
"aux:".
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import content, files
from data_tools.common.errors import UserError

_LIST, _V1, _V2 = 0x112, 0xF993FAC8, 0xF993FAC9
_KINDS = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_MOST_DIMENSIONS = 32


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.content):
            raise UserError(f"it ends at byte {len(self.content)}, within {size} bytes more")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, form: str) -> int:
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize(form)))
        return value

    def array(self) -> np.ndarray[Any, Any]:
        magic = self.number("I")
        if magic == _V2 and self.number("i") != 0:
            raise UserError("it holds a sparse array")
        dims = self.number("I") if magic in (_V1, _V2) else magic
        if dims > _MOST_DIMENSIONS:
            raise UserError(f"it holds an array of {dims} dimensions")
        shape = [self.number("q" if magic in (_V1, _V2) else "I") for _ in range(dims)]
        if not shape:
            return np.zeros(0, np.float32)
        self.take(8)  # the device it was on
        kind = self.number("i")
        if kind not in _KINDS or min(shape) < 0:
            raise UserError(f"it holds an array of kind {kind} and shape {shape}")
        dtype = np.dtype(_KINDS[kind])
        values = self.take(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(values, dtype).reshape(shape).copy()


def read(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """{name with its "arg:" or "aux:": array} of a .params file.

    Raises:
        ValueError: not such a file, or a damaged one.
        OSError: it cannot be read.
    """
    reader = _Reader(files.read_bytes(path))
    try:
        if reader.number("Q") != _LIST:
            raise UserError("it does not begin as one")
        reader.take(8)
        arrays = [reader.array() for _ in range(reader.number("Q"))]
        names = [reader.take(reader.number("Q")).decode() for _ in range(reader.number("Q"))]
    except (ValueError, struct.error) as error:
        hint = content.hint(path, "an MXNet parameter file")
        raise UserError(f"{path} is no MXNet parameter file: {error}{hint}") from error
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise UserError(f"{path}: {len(arrays)} arrays under {len(set(names))} names")
    return dict(zip(names, arrays, strict=True))
