"""One file of tensors of a checkpoint: written through to the disk with its hash, read verified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from io import BufferedRandom, BufferedReader
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from recognition.checkpoint.directory import older


def write(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file through to the disk; its size and hash.

    Raises:
        OSError: it could not be written.
    """
    try:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": os.path.getsize(path), "sha256": _sha256(file)}


def verified(path: str, name: str, manifest: Mapping[str, Any]) -> str:
    """The path of a file of the checkpoint, its content as the manifest says.

    Raises:
        OSError: it is missing or damaged.
    """
    full = os.path.join(path, name)
    try:
        with open(full, "rb") as file:
            if _sha256(file) != manifest["files"][name]["sha256"]:
                raise OSError(f"{full} is damaged: its sha256 is not the manifest's{older(path)}")
    except (FileNotFoundError, KeyError) as error:
        raise OSError(f"{path} lacks {name}{older(path)}") from error
    return full


def read(path: str, name: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of the checkpoint, verified."""
    return safetensors.torch.load_file(verified(path, name, manifest))


def _sha256(file: BufferedReader | BufferedRandom) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
