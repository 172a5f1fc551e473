"""What the commands share that make a new directory from a checkpoint: DIR OUT."""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_tools.common import files
from data_tools.common.partial_directory import PartialDirectory
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import Damaged, RowFile, find, older, read_manifest

# What may stand in a directory that a killed command left: files of ours, hidden ones among them.
_OURS = r"\..*|manifest\.json|card\.json|(?:[a-z0-9-]+)\.safetensors"


def add_paths(parser: argparse.ArgumentParser, made: str) -> None:
    """DIR and OUT, `made` says what the latter is."""
    parser.add_argument("path", metavar="DIR", help="a checkpoint, or a run: its newest one")
    parser.add_argument("out", metavar="OUT", type=Path, help=f"the {made} to make")


@contextmanager
def making(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(the checkpoint's path, an empty directory that becomes OUT when the body has succeeded).

    Raises:
        FileNotFoundError: no checkpoint at DIR.
        FileExistsError: OUT is there; or OUT.partial is, and not of a killed command of these.
    """
    path = find(args.path)
    if os.path.lexists(args.out):
        raise FileExistsError(f"{args.out} is there already")
    _refuse_foreign(args.out.with_name(args.out.name + files.PARTIAL))
    with PartialDirectory(args.out) as partial:
        yield path, partial.path
        partial.rename()


def _refuse_foreign(partial: Path) -> None:
    """Raises: FileExistsError, if there is something of the name that we would clear, and it is not
    what we write there."""
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not files.is_dir(partial):
        raise FileExistsError(f"{partial} is in the way: choose another OUT, or move it away")
    foreign = [name for name in files.names(partial) if not re.fullmatch(_OURS, name)]
    if foreign:
        raise FileExistsError(
            f"{partial} holds {', '.join(foreign[:4])}, not written by this command, which would "
            "clear it: choose another OUT, or move it away"
        )


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
    path: str, rows: list[RowFile], num_classes: int, only: str | None = None
) -> dict[str, Tensor]:
    """All that is held by class, or one kind of it, [C, ...] by name, from the files of the ranks.

    Raises:
        Damaged: a file holds something else than its name says.
    """
    held: dict[str, Tensor] = {}
    for name, start, stop in rows:
        with tensors.readable(path, name), safe_open(os.path.join(path, name), "pt") as file:
            for key in file.keys() if only is None else [only]:  # noqa: SIM118  no mapping
                part = file.get_tensor(key)
                if len(part) != stop - start:
                    raise Damaged(f"{os.path.join(path, name)}: {key} is {list(part.shape)}")
                if key not in held:
                    held[key] = torch.empty(num_classes, *part.shape[1:], dtype=part.dtype)
                held[key][start:stop] = part
    return held
