"""Write a checkpoint anew with the class rows of all ranks in one file: rows-0-<classes>.

Runs do not need it: they load at any number of processes. It is for scripts that read the rows. It
takes the memory of all rows and their optimiser's state.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_tools.partial import PartialDirectory
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import (
    FORMAT,
    Damaged,
    RowFile,
    all_rows,
    digest,
    find,
    older,
    read_manifest,
    sync,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", help="a checkpoint, or a run: its newest one")
    parser.add_argument("out", metavar="OUT", type=Path, help="the checkpoint directory to make")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUT, complete or not at all.

    Raises:
        FileExistsError: OUT is there.
        Damaged: a file of the checkpoint is not what was written.
    """
    path = find(args.path)
    if args.out.exists():
        raise FileExistsError(f"{args.out} is there already")
    manifest = checked(path)
    with PartialDirectory(args.out) as partial:
        files = {}
        by_head = [all_rows(path, manifest, k) for k in range(len(manifest["heads"]))]
        merged = sum(by_head, [])
        for name in sorted(set(manifest["files"]) - {file.name for file in merged}):
            shutil.copyfile(os.path.join(path, name), partial.path / name)
            files[name] = manifest["files"][name]
        for k, head in enumerate(manifest["heads"]):
            prefix = f"head{k}-" if len(manifest["heads"]) > 1 else ""
            name = f"{prefix}rows-0-{head['num_classes']}.safetensors"
            rows = joined(path, by_head[k], head["num_classes"])
            files[name] = tensors.write(str(partial.path / name), rows)
        manifest |= {"format": FORMAT, "files": files, "world": 1}
        with open(partial.path / "manifest.json", "w", encoding="utf-8") as file:
            json.dump({**manifest, "sha256": digest(manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(str(partial.path))
        partial.rename()
    print(f"{args.out}: {len(merged)} files of rows as {len(manifest['heads'])}")
    return {"path": str(args.out), "from": path, "files": files}


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
