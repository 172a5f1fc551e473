"""`embed`: compute the features of a data set with a run's network or an ONNX file.

Features are written in blocks; a second start computes only the missing ones. Several processes
share the blocks, by rank under torchrun or by --part I/N. Images that a relabel index drops are
embedded as well.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.clean import features
from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.networks import Network, networks
from data_tools.common.parallel import Advance, run_tasks
from data_tools.images.decode import check_size, decode, pixels_of

_CHUNK = 256  # images decoded at a time
_SIZE = 112  # pixels


def embed(
    data: shards.Shards,
    embedder: Network,
    out: Path,
    block: int,
    part: tuple[int, int],
    resize: bool = False,
) -> tuple[int, int]:
    """Make the missing blocks of this part; (how many were made, how many images were resized).

    Raises: FileExistsError if `out` holds features of another set or network.
    """
    facts = {key: value for key, value in embedder.facts.items() if key != "path"}
    size = embedder(np.zeros((1, 112, 112, 3), np.uint8)).shape[1]
    index = {
        "of": data.fingerprint,
        "images": len(data),
        "size": int(size),
        "block": block,
        "network": facts,
        **({"resize": True} if resize else {}),
    }
    files.make_private(out)
    if files.is_file(out / features.INDEX):
        there = features.read_index(out)
        if differ := [k for k in {**there, **index} if there.get(k) != index.get(k)]:
            raise FileExistsError(
                f"{out} holds features of another {', '.join(differ)}: choose another directory"
            )
    elif any(out.iterdir()):
        raise FileExistsError(f"{out} holds something else: choose another directory")
    else:
        features.write_index(out, index)
    todo = [
        (start, stop)
        for number, start, stop in features.missing_blocks(out, len(data), block)
        if number % part[1] == part[0]
    ]

    others: list[int] = []  # images that were resized; threads append to it

    def pixels(i: int) -> np.ndarray:
        where, encoded = f"{data.where(i)}, image {i}", data[i][1]
        if resize and check_size(*pixels_of(encoded, where), _SIZE, where, resize):
            others.append(i)
        return decode(encoded, _SIZE, where, resize)

    def make(task: tuple[int, int], advance: Advance) -> None:
        start, stop = task
        rows = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in range(start, stop, _CHUNK):
                ids = range(first, min(first + _CHUNK, stop))
                rows.append(embedder(np.stack(list(pool.map(pixels, ids)))))
                advance(len(ids))
        features.write_block(out, start, stop, np.concatenate(rows))

    run_tasks(make, todo, 1, sum(stop - start for start, stop in todo), "embedding")
    return len(todo), len(others)


def _part(text: str | None) -> tuple[int, int]:
    """This process's number and how many there are."""
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise UserError(f"--part {text}: give I/N, with I from 0 to N - 1")
    return int(number), int(of)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a data set directory")
    parser.add_argument("network", type=Path, help="a run or checkpoint directory, or an ONNX file")
    parser.add_argument("out", type=Path, help="directory of the features")
    parser.add_argument(
        "--block", type=int, default=65536, help="images in a file (default %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="images that the network processes at once (default %(default)s)",
    )
    parser.add_argument(
        "--resize", action="store_true", help="resize faces that are aligned at another size"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="compute every N-th block from I on; default: all, or by RANK under torchrun",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.block < 1 or args.batch_size < 1:
        raise UserError("--block and --batch-size must be 1 or more")
    data = shards.open(args.path, shards.NO_RELABEL)
    part = _part(args.part)
    embedder: Network = networks().open_embedder(args.network, args.batch_size)
    made, resized = embed(data, embedder, args.out, args.block, part, args.resize)
    missing = len(features.missing_blocks(args.out, len(data), args.block))
    print(
        f"{args.out}: {count(len(data), 'image')}, {count(made, 'block')} made, "
        f"{missing} left to other parts"
        + (f", {count(resized, 'image')} resized" if args.resize else "")
    )
    return {
        "path": str(args.out),
        "images": len(data),
        "made": made,
        "missing": missing,
        **({"resized": resized} if args.resize else {}),
    }
