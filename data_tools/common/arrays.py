"""NumPy files: read without a traceback for a damaged one, and written with a hash of their bytes.

A hashed array is a .npy file with a trailer after the numbers: _MARK and the SHA-256 of all bytes
before it. np.load reads it as any other .npy. Flipped bits of embeddings make no error by
themselves, only another result.
"""

import hashlib
import io
import os
from typing import Any

import numpy as np

from data_tools.common import content, files
from data_tools.common.errors import UserError

_MARK = b"arcline-sha256:"
_TRAILER = len(_MARK) + hashlib.sha256().digest_size


def load_npy(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """The array of a .npy file, or the NpzFile of an .npz; never a pickle. mmap: mapped, read-only.

    Raises:
        UserError: no such file by its content, or damaged; it names the path.
        OSError: it cannot be read.
    """
    with files.naming(path):
        try:
            return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # NumPy parses the header as Python: tokenize's and many others
            raise not_numbers(path, error) from error


def not_numbers(path: str | os.PathLike[str], error: Exception) -> UserError:
    """What to raise where NumPy found a file damaged; its advice to load a pickle is left out."""
    why = "it holds no array, or Python objects" if "pickle" in str(error) else str(error)
    return UserError(
        f"{path} is no whole .npy or .npz of numbers: {why}{content.hint(path, 'NumPy')}"
    )


def write_hashed(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write an array with its hash, whole or not at all, for its owner alone."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    numbers = buffer.getbuffer()
    with files.replacing(path, permissions=files.PRIVATE_FILE) as file:
        file.write(numbers)
        file.write(_MARK + hashlib.sha256(numbers).digest())


def load_hashed(path: str | os.PathLike[str], mmap: bool = False, check: bool = True) -> np.ndarray:
    """What write_hashed wrote. check: compare the hash, which reads all of it.

    Raises:
        UserError: damaged, or written without a hash; it names the path.
        OSError: it cannot be read.
    """
    if check:
        _check(path)
    array = load_npy(path, mmap)
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz archive: a single array (.npy) is needed")
    return array


def _check(path: str | os.PathLike[str]) -> None:
    total = hashlib.sha256()
    with files.naming(path), open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _TRAILER
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            total.update(part)
            left -= len(part)
        trailer = file.read()
    if trailer[: len(_MARK)] != _MARK or len(trailer) != _TRAILER:
        raise UserError(
            f"{path} ends without a hash of its content: cut short, or not written by arcline"
        )
    if trailer[len(_MARK) :] != total.digest():
        raise UserError(
            f"{path}: its content contradicts its hash: the file was changed or damaged"
        )
