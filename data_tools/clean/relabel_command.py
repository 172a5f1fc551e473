"""`relabel`: put a relabel index in force for a data set, take it back, or say what is in force.

The index becomes relabel.txt beside the shards, which stay as they are; training then sees the
cleaned set. An index of purify, merge or overlap holds what was in force before as well.
"""

import argparse
from pathlib import Path
from typing import Any

from data_tools import relabel, shards
from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a data set directory")
    parser.add_argument("index", type=Path, nargs="?", help="the relabel index to apply")
    parser.add_argument("--remove", action="store_true", help="take back what is in force")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.index and args.remove:
        raise UserError("give an index or --remove, not both")
    whole = shards.open(args.path, shards.NO_RELABEL)
    place = whole.path / relabel.NAME
    if args.index:
        shards.open(args.path, args.index)  # fits, or says why not
        relabel.write(place, relabel.read(args.index))
    elif args.remove:
        if not files.is_file(place):
            raise FileNotFoundError(f"{place}: no relabel index is in force")
        place.unlink()
    data = shards.open(args.path)
    print(
        f"{args.path}: {data.num_images} of {count(whole.num_images, 'image')}, "
        f"{data.num_classes} of {count(whole.num_classes, 'class', 'classes')}"
    )
    return {
        "path": str(args.path),
        "in_force": files.is_file(place),
        "images": data.num_images,
        "classes": data.num_classes,
        "images_before": whole.num_images,
        "classes_before": whole.num_classes,
    }
