"""Write a copy of a checkpoint with the class rows of all ranks in one file: rows-0-<classes>.

Runs do not need it: they load at any number of processes. It is for scripts that read the rows. It
needs memory for all rows and their optimiser's state.
"""

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.common import files
from data_tools.common.messages import count
from data_tools.common.partial_directory import PartialDirectory
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import Damaged, find, naming_predecessor
from recognition.checkpoint.manifest import FORMAT, read_manifest, row_files, write_manifest
from recognition.checkpoint.reading import joined

# What a killed command of ours may have left in OUT.partial, hidden files among it.
_OURS = r"\..*|manifest\.json|card\.json|(?:[a-z0-9-]+)\.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_paths(parser, "checkpoint directory")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUT, completely or not at all.

    Raises:
        FileExistsError: OUT exists already.
        Damaged: a file of the checkpoint has changed.
    """
    with new_directory(args) as (path, out):
        manifest = read_intact(path)
        heads = manifest["heads"]
        merged = [file.name for k in range(len(heads)) for file in row_files(manifest, k)]
        entries = {}
        for name in sorted(set(manifest["files"]) - set(merged)):
            shutil.copyfile(os.path.join(path, name), out / name)
            entries[name] = manifest["files"][name]
        for k, head in enumerate(heads):
            prefix = f"head{k}-" if len(heads) > 1 else ""
            name = f"{prefix}rows-0-{head['num_classes']}.safetensors"
            entries[name] = tensors.write(str(out / name), joined(path, manifest, k))
        write_manifest(str(out), manifest | {"format": FORMAT, "files": entries, "world": 1})
        files.sync_directory(out)
    print(f"{args.out}: {count(len(merged), 'file')} of class rows merged into {len(heads)}")
    return {"path": str(args.out), "from": path, "files": entries}


# --- For every command that makes a new directory from a checkpoint -------------------------------


def add_paths(parser: argparse.ArgumentParser, result: str) -> None:
    """Add DIR and OUT. result: what OUT is, for the help."""
    parser.add_argument("path", metavar="DIR", help="a checkpoint, or a run: its newest one")
    parser.add_argument("out", metavar="OUT", type=Path, help=f"the {result} to make")


@contextmanager
def new_directory(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(the checkpoint's path, an empty directory that becomes OUT when the body has succeeded).

    Raises:
        FileNotFoundError: no checkpoint at DIR.
        FileExistsError: OUT exists; or OUT.partial does, and was not left by a killed command.
    """
    path = find(args.path)
    if os.path.lexists(args.out):
        raise FileExistsError(f"{args.out} already exists")
    left = args.out.with_name(args.out.name + files.PARTIAL)
    if os.path.lexists(left):
        foreign = None  # not a directory
        if files.is_dir(left) and not left.is_symlink():
            foreign = [name for name in files.names(left) if not re.fullmatch(_OURS, name)]
        if foreign is None or foreign:
            holds = f" with {', '.join(foreign[:4])}" if foreign else ""
            raise FileExistsError(
                f"{left}{holds} was not written by this command, which would remove it: choose "
                "another OUT, or move it away"
            )
    with PartialDirectory(args.out) as partial:
        yield path, partial.path
        partial.rename()


def read_intact(path: str) -> dict[str, Any]:
    """The manifest of a checkpoint after comparing all its files with their hashes.

    Raises:
        Damaged: a file has changed; the message names it and the preceding checkpoint.
    """
    with naming_predecessor(path):
        manifest = read_manifest(path)
        if wrong := tensors.problems(path, manifest):
            raise Damaged(wrong[0])
    return manifest
