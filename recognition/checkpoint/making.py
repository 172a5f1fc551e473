"""What the commands share that make a new directory from a checkpoint: DIR OUT."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_tools.partial import PartialDirectory
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import Damaged, RowFile, find, older, read_manifest


def add_paths(parser: argparse.ArgumentParser, made: str) -> None:
    """DIR and OUT, `made` says what the latter is."""
    parser.add_argument("path", metavar="DIR", help="a checkpoint, or a run: its newest one")
    parser.add_argument("out", metavar="OUT", type=Path, help=f"the {made} to make")


@contextmanager
def making(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(the checkpoint's path, an empty directory that becomes OUT when the body has succeeded).

    Raises:
        FileNotFoundError: no checkpoint at DIR.
        FileExistsError: OUT is there.
    """
    path = find(args.path)
    if args.out.exists():
        raise FileExistsError(f"{args.out} is there already")
    with PartialDirectory(args.out) as partial:
        yield path, partial.path
        partial.rename()


def checked(path: str) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all what was written.

    Raises:
        Damaged: one is not; the message names it and the checkpoint before.
    """
    try:
        manifest = read_manifest(path)
        for name in manifest["files"]:
            if wrong := tensors.problem(path, name, manifest):
                raise Damaged(wrong)
    except Damaged as error:
        raise Damaged(f"{error}{older(path)}") from error
    return manifest


def joined(
    path: str, files: list[RowFile], num_classes: int, only: str | None = None
) -> dict[str, Tensor]:
    """All that is held by class, or one kind of it, [C, ...] by name, from the files of the ranks.

    Raises:
        Damaged: a file holds something else than its name says.
    """
    held: dict[str, Tensor] = {}
    for name, start, stop in files:
        with tensors.readable(path, name), safe_open(os.path.join(path, name), "pt") as file:
            for key in file.keys() if only is None else [only]:  # noqa: SIM118  no mapping
                part = file.get_tensor(key)
                if len(part) != stop - start:
                    raise Damaged(f"{os.path.join(path, name)}: {key} is {list(part.shape)}")
                if key not in held:
                    held[key] = torch.empty(num_classes, *part.shape[1:], dtype=part.dtype)
                held[key][start:stop] = part
    return held
