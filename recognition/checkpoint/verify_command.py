"""Compare every file of a checkpoint, or of all checkpoints of a run, with its hash."""

import argparse
import os
from typing import Any

from rich.console import Console

from data_tools.common.errors import UserError
from recognition.checkpoint.directory import Damaged, complete, directory_of, find, predecessor
from recognition.checkpoint.manifest import read_manifest
from recognition.checkpoint.tensors import problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The exit code is 0 if no file has changed, 1 otherwise."
    parser.add_argument("path", metavar="DIR", help="a run directory, or a checkpoint of one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what is wrong.

    Raises:
        FileNotFoundError: neither a checkpoint nor a run directory with one.
    """
    paths = [find(args.path)]
    if not os.path.samefile(paths[0], args.path):
        paths = [directory_of(args.path, step) for step in complete(args.path)]
    found: dict[str, list[str]] = {}
    with Console(stderr=True).status("reading") as status:
        for path in paths:
            status.update(f"reading {path}")
            try:
                found[path] = problems(path, read_manifest(path))
            except (Damaged, UserError) as error:
                found[path] = [str(error)]
    for path, wrong in found.items():
        for text in wrong:
            print(f"{text}{predecessor(path)}")
        if not wrong:
            print(f"{path}: every file matches its hash")
    return {"ok": not any(found.values()), "problems": found}
