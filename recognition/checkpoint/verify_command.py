"""Hold every file of a checkpoint, or of all of a run directory, against its hash."""

import argparse
import os
from typing import Any

from rich.console import Console

from data_tools.common.errors import UserError
from recognition.checkpoint.directory import (
    Damaged,
    complete,
    directory_of,
    find,
    older,
    read_manifest,
)
from recognition.checkpoint.tensors import problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The exit code is 0 if every file is what was written, 1 if not."
    parser.add_argument("path", metavar="DIR", help="a run directory, or a checkpoint of one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what is wrong.

    Raises:
        FileNotFoundError: neither a checkpoint nor a run directory with one.
    """
    paths = [find(args.path)]
    if not os.path.samefile(paths[0], args.path):
        paths = [directory_of(args.path, step) for step in complete(args.path)]
    problems: dict[str, list[str]] = {}
    with Console(stderr=True).status("reading") as status:
        for path in paths:
            status.update(f"reading {path}")
            problems[path] = check(path)
    for path, wrong in problems.items():
        for text in wrong:
            print(f"{text}{older(path)}")
        if not wrong:
            print(f"{path}: every file is what was written")
    return {"ok": not any(problems.values()), "problems": problems}


def check(path: str) -> list[str]:
    """What is wrong with a checkpoint."""
    try:
        manifest = read_manifest(path)
    except (Damaged, UserError) as error:
        return [str(error)]
    return [wrong for name in manifest["files"] if (wrong := problem(path, name, manifest))]
