"""One file of tensors of a checkpoint: hashed while it is written, read back verified."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from data_tools.common.files import naming
from recognition.checkpoint.directory import Damaged, missing

_CHUNK = 16 << 20  # bytes
_CHUNKS_A_SYNC = 8
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a .safetensors file through to the disk; its size and hash.

    The library's own writer gives no hash, and reading a file of many GB back for it costs as much
    again as a fast disk: here a second thread hashes what the first one writes, and a third has the
    disk begin before all is written.

    Raises:
        OSError: it could not be written; the error names it.
    """
    # The widest first: then each starts at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    sha256 = hashlib.sha256()
    with (
        naming(path),
        open(path, "wb") as file,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as disk,
    ):
        begun = []
        for i, chunk in enumerate(itertools.chain([_header(ordered)], _chunks(ordered)), 1):
            begun.append(hashing.submit(sha256.update, chunk))
            file.write(chunk)
            if i % _CHUNKS_A_SYNC == 0:
                begun.append(disk.submit(os.fdatasync, file.fileno()))
        file.flush()
        os.fsync(file.fileno())
        for each in begun:
            each.result()
        return {"bytes": file.tell(), "sha256": sha256.hexdigest()}


def _header(ordered: list[tuple[str, Tensor]]) -> memoryview:
    """The file's beginning: the length of the JSON that follows as uint64, little endian; JSON."""
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


def problem(path: str, name: str, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of the checkpoint; None if it is as the manifest says.

    Wrong is what can be read and differs, or is absent. A file that cannot be read may be whole.

    Raises:
        OSError: it cannot be read; the error names it.
    """
    full = os.path.join(path, name)
    if name not in manifest["files"] or missing(full):
        return f"{path} lacks {name}"
    try:
        with open(full, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, full) from error
    if digest != manifest["files"][name]["sha256"]:
        return f"{full} is damaged: its sha256 is not the manifest's"
    return None


def is_intact(path: str, manifest: Mapping[str, Any]) -> bool:
    """Whether every file of the checkpoint is as its manifest says. Raises: OSError, as
    problem()."""
    return all(problem(path, name, manifest) is None for name in manifest["files"])


def read(path: str, name: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of the checkpoint, verified.

    Raises:
        Damaged: it is missing, or not what was written.
    """
    if wrong := problem(path, name, manifest):
        raise Damaged(wrong)
    with readable(path, name):
        return safetensors.torch.load_file(os.path.join(path, name))


@contextlib.contextmanager
def readable(path: str, name: str) -> Iterator[None]:
    """Around reading a file by safetensors, which calls every error that it meets a damage.

    Raises:
        Damaged: the file holds no tensors, or not those that the body wants.
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
    """Around reading the file at `full` by safetensors, which maps it and names it in no error.

    Raises: OSError, if it cannot be opened or mapped; it names the file.
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
            raise  # not torch's own, of a file that it cannot map
        raise OSError(f"{full}: {error}") from error
