"""Read the pickle inside a verification .bin without executing it.

A pickle is a program that may call anything. Here only the instructions that build lists, tuples,
bytes, bools and integers are known, and the few names that NumPy arrays and Python-2 strings need
stand for the functions below: nothing that a file names is imported or called. Python's own
interpreter of pickles is used, not the C one, because that one allocates whatever memo index
(up to 2^32 slots) and bytearray length a file claims; here no allocation exceeds the file by more
than the pointers of its lists.
"""

import io
import math
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.common import content, files
from data_tools.common.errors import UserError

_ALLOWED = (
    "PROTO FRAME MARK STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE "
    "SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS GET "
    "BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE"
)

_MAX_DIMENSIONS = 32  # NumPy's own limit when these files were written
_MINE = "a pickle"  # as content.py calls what is expected here
_SHOWN = 120  # characters of a file's own text in a message


_KINDS = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")  # b bool, u and i integers


class Array:
    """A NumPy array of bools or integers: its dtype, such as "u1", its shape and its raw bytes."""

    def __init__(self) -> None:
        self.dtype, self.shape, self.data = "u1", (0,), b""
        self._big = False  # the byte order of the elements

    def is_row(self) -> bool:
        """Whether it is [n], [n, 1], [1, n] and the like: at most one length is not 1."""
        return bool(self.shape) and sum(length != 1 for length in self.shape) <= 1

    def values(self) -> list[int]:
        """The elements in their order."""
        size = int(self.dtype[1])
        order: Literal["big", "little"] = "big" if self._big else "little"
        signed = self.dtype[0] == "i"
        return [
            int.from_bytes(self.data[at : at + size], order, signed=signed)
            for at in range(0, len(self.data), size)
        ]

    def build(self, state: tuple) -> None:
        _, shape, dtype, _, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise UserError("a NumPy array whose elements are not bools or integers")
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
            raise UserError("a NumPy array without a shape")
        if not all(isinstance(length, int) and 0 <= length < 2**63 for length in shape):
            raise UserError("a NumPy array whose shape is not of lengths")
        size = math.prod(shape)
        if size * int(dtype.name[1]) != len(data):
            raise UserError(f"a NumPy array of {size} elements with {len(data)} bytes of data")
        self.dtype, self.shape, self.data = dtype.name, shape, bytes(data)
        self._big = dtype.big


class _Dtype:
    def __init__(self, name: str | bytes, *_: object) -> None:
        name = name.decode("latin1") if isinstance(name, bytes) else name
        self.big = isinstance(name, str) and name.startswith(">")
        self.name = name.lstrip("<>=|") if isinstance(name, str) else name
        if self.name not in _KINDS:
            raise UserError(
                f"a NumPy array of type {_shown(self.name)}; only bools and integers are read"
            )

    def build(self, state: tuple) -> None:
        """Of (version, byte order, ...) the order counts."""
        self.big = self.big or state[1] in (">", b">")


def _shown(value: object) -> str:
    """For a message. Never the repr of a list: ten lists that share parts can print for ever."""
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN])
    return f"(a {type(value).__name__})"


def _reconstruct(*_: object) -> Array:
    return Array()  # shape and content follow in build()


def _frombuffer(buffer: bytes, dtype: _Dtype, shape: tuple, _order: str) -> Array:
    array = Array()
    array.build((1, shape, dtype, False, buffer))
    return array


def _scalar(dtype: _Dtype, data: bytes) -> bool | int:
    array = Array()
    array.build((1, (), dtype, False, data))
    (value,) = array.values()
    return bool(value) if dtype.name == "b1" else value


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise UserError(f"text in the encoding {_shown(encoding)}")
    return text.encode("latin1")  # how protocol 2 of Python 3 spells bytes


def _empty_bytes() -> bytes:
    return b""


_GLOBALS = {
    "numpy.ndarray": Array,  # only named, as an argument of _reconstruct
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _latin1,
    "__builtin__.bytes": _empty_bytes,
    "builtins.bytes": _empty_bytes,
}


class _Interpreter(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _ALLOWED.split())
    }

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in _GLOBALS:
            wanted = f"{module}.{name}"[:_SHOWN]
            raise UserError(f"the pickle asks for the forbidden global {wanted}")
        return _GLOBALS[f"{module}.{name}"]

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Array | _Dtype):
            raise UserError(f"the pickle sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].build(state)

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def load(path: str | Path) -> object:
    """The object in the pickle at `path`, made of list, tuple, bytes, str, bool, int and Array.

    Python-2 strings come back as bytes.

    Raises:
        ValueError: the file is truncated, damaged, or asks for anything else; the message names the
            file and the forbidden global.
        OSError: the file cannot be read.
    """
    with files.naming(path), open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise UserError(f"{path}: an empty file, not a pickle")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _load(mapped, str(path), "not a verification pickle")
            except UserError as error:
                raise UserError(f"{error}{content.hint(path, _MINE)}") from error.__cause__


def loads(pickled: bytes, where: str) -> object:
    """As load, of bytes that come from `where`. Raises: ValueError: as load."""
    return _load(io.BytesIO(pickled), where, "not a pickle of plain values")


def _load(file: Any, where: str, otherwise: str) -> object:
    try:
        return _Interpreter(file, encoding="bytes").load()
    except Exception as error:  # damaged bytes can fail anywhere in the interpreter
        if isinstance(error, EOFError):
            what = "the pickle ends early; is the file whole?"
        elif isinstance(error, KeyError):  # of `dispatch`
            what = f"the pickle uses the forbidden instruction {chr(error.args[0])!r}"
        else:
            what = f"{otherwise}: {error}"
        raise UserError(f"{where}: {what}") from error
