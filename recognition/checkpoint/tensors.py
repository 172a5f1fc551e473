"""One file of tensors of a checkpoint: hashed while it is written, verified when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from data_tools.common import files
from recognition.checkpoint.directory import Damaged, missing

_CHUNK = 16 << 20  # bytes
_CHUNKS_PER_SYNC = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a .safetensors file and flush it to disk; returns its size and hash.

    The library's writer returns no hash, and reading many GB back costs as much again as a fast
    disk. So a second thread hashes what the first one writes, and a third makes the disk start
    before everything is written.

    Raises:
        OSError: it could not be written; the error names the file.
    """
    # The widest first: then each tensor starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    sha256 = hashlib.sha256()
    with (
        files.naming(path),
        open(path, "wb") as file,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as disk,
    ):
        begun = []
        for i, chunk in enumerate(itertools.chain([_header(ordered)], _chunks(ordered)), 1):
            begun.append(hashing.submit(sha256.update, chunk))
            file.write(chunk)
            if i % _CHUNKS_PER_SYNC == 0:
                begun.append(disk.submit(os.fdatasync, file.fileno()))
        file.flush()
        os.fsync(file.fileno())
        for each in begun:
            each.result()
        return {"bytes": file.tell(), "sha256": sha256.hexdigest()}


def _header(ordered: list[tuple[str, Tensor]]) -> memoryview:
    """The start of the file: the length of the JSON that follows (uint64, little endian), JSON."""
    described, start = {}, 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _chunks(ordered: list[tuple[str, Tensor]]) -> Iterator[memoryview]:
    for _, tensor in ordered:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(flat), _CHUNK):
            yield flat[start : start + _CHUNK]


def problems(
    path: str, manifest: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[str]:
    """What is wrong with the files of the checkpoint: absent ones, and those of another hash.

    names: which files to read; None means all of the manifest.

    Raises:
        OSError: a file cannot be read, so nobody knows; the error names it.
    """
    found = []
    for name in manifest["files"] if names is None else names:
        full = os.path.join(path, name)
        if name not in manifest["files"] or missing(full):
            found.append(f"{path} lacks {name}")
        elif files.sha256(full) != manifest["files"][name]["sha256"]:
            found.append(f"{full} is damaged: its sha256 is not the manifest's")
    return found


def read(path: str, name: str, manifest: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of a file of the checkpoint; compared with its hash if there is a manifest.

    Raises:
        Damaged: it is missing, or has changed.
    """
    if manifest is not None and (wrong := problems(path, manifest, [name])):
        raise Damaged(wrong[0])
    with readable(path, name):
        return safetensors.torch.load_file(os.path.join(path, name))


@contextlib.contextmanager
def readable(path: str, name: str) -> Iterator[None]:
    """Surround reading a file by safetensors.

    Raises:
        Damaged: the file is not a safetensors file, or lacks a tensor that the body reads.
        OSError: it cannot be opened or mapped.
    """
    full = os.path.join(path, name)
    with mapping(full):
        try:
            yield
        except safetensors.SafetensorError as error:
            raise Damaged(f"{full} is damaged: {error}") from error


@contextlib.contextmanager
def mapping(full: str) -> Iterator[None]:
    """Surround reading the file at `full` by safetensors, whose errors do not name the file.

    Raises:
        OSError: it cannot be opened or mapped; the error names it.
    """
    with open(full, "rb"):
        pass
    try:
        yield
    except Damaged:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if isinstance(error, RuntimeError) and f"<{full}>" not in str(error):
            raise  # not torch's error for a file that it cannot map
        raise OSError(f"{full}: {error}") from error
