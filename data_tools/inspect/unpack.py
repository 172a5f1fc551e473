"""`unpack`: a data set back to files: a folder of identities, or InsightFace's classic layout.

--layout folder: OUT/<identity>/<number of the image>.<jpg, png ...>, the bytes as they are packed.
--layout insightface: train.rec, train.idx and property (as InsightFace's RecBuilder):
images with keys 1 .. N, those of an identity together; a record per identity with the range of its
keys; the header with key 0 last. Its ranges are float32: beyond 2^24 records they are rounded, as
in every file of that layout.
--layout parquet: a data set of Hugging Face: data/train-*.parquet with the columns image ({bytes,
path}) and label, and the names of the classes in the files and in README.md. Needs pyarrow.
--layout webdataset: train-*.tar with a .jpg and a .cls for each image, and classes.txt, whose
line c is the name of class c.
`pack` reads what each layout writes. The .bin files are copied. A relabel index in force is
applied.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.parallel import Advance, run_tasks
from data_tools.common.partial_directory import PartialDirectory
from data_tools.inspect import published
from data_tools.recordio import Header, Writer


def to_folder(data: shards.Shards, out: Path, advance: Advance) -> None:
    """Raises: ValueError for an identity whose name cannot be that of a folder."""
    names = data.identities
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") or part.startswith(".") for part in parts):
            raise UserError(f"the identity {name!r} cannot be the name of a folder")
    made = set()
    for i, (label, encoded) in enumerate(data):
        folder = out / names[label]
        if label not in made:
            folder.mkdir(parents=True, exist_ok=True)
            made.add(label)
        suffix = published.ending_of(encoded)
        path = folder / f"{i:08d}.{suffix}"
        with files.naming(path):
            path.write_bytes(encoded)
        advance(1)


def to_insightface(data: shards.Shards, out: Path, advance: Advance) -> None:
    order, ends = data.by_class()
    first_identity = len(data) + 1
    with Writer(out / "train.idx", out / "train.rec") as writer:
        for key, i in enumerate(order.tolist(), 1):
            label, encoded = data[i]
            writer.write(key, Header(0, float(label), key, 0), encoded)
            advance(1)
        for c in range(data.num_classes):
            keys = np.array([ends[c] + 1, ends[c + 1] + 1], np.float32)  # half open
            writer.write(first_identity + c, Header(2, keys, first_identity + c, 0), b"")
        keys = np.array([first_identity, first_identity + data.num_classes], np.float32)
        writer.write(0, Header(2, keys, 0, 1), b"")
    height, width = data.image_size or (112, 112)
    files.write_text(out / "property", f"{data.num_classes},{height},{width}\n")


LAYOUTS = {
    "folder": to_folder,
    "insightface": to_insightface,
    "parquet": published.to_parquet,
    "webdataset": published.to_webdataset,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a data set directory")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    data = shards.open(args.path)
    out = Path(os.path.abspath(args.out))
    if not files.is_free(out):
        raise FileExistsError(f"{args.out} exists: choose another directory")
    write = LAYOUTS[args.layout]
    with PartialDirectory(out) as aside:
        run_tasks(
            lambda _, advance: write(data, aside.path, advance), [None], 1, len(data), "unpacking"
        )
        for path in data.bin_paths():
            shutil.copyfile(path, aside.path / path.name)
        aside.rename()
    print(
        f"{args.out}: {count(len(data), 'image')} of "
        f"{count(data.num_classes, 'class', 'classes')} ({args.layout})"
    )
    return {
        "path": str(args.out),
        "layout": args.layout,
        "images": len(data),
        "classes": data.num_classes,
    }
