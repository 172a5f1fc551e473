"""`pack`: images -> shards. The same source and options give the same bytes, at any --workers.

1. Of each identity one image is decoded, more if it fails: one without any gets no class.
2. --hold-out identities, drawn by the seed, are left out of training and become heldout.bin.
3. All other images are shuffled as one list and cut into shards; a worker writes a shard at a time.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_tools.pack import HELD_OUT, Options, pack
from data_tools.pairs import resized_text
from data_tools.wording import count, file_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    standard = Options()
    parser.add_argument(
        "source",
        type=Path,
        help="folder of identities (SOURCE/<identity>/<image>.jpg), or an InsightFace directory "
        "(train.rec, train.idx, property), or a data set packed before",
    )
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument(
        "--shards", type=int, default=standard.shards, help="files to cut the images into (8)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes, at most one per shard and none for small sets (all cores)",
    )
    parser.add_argument("--seed", type=int, default=standard.seed, help="of every draw (0)")
    parser.add_argument(
        "--size", type=int, default=standard.size, help="side of the images in pixels (112)"
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=standard.quality,
        help="of images that are encoded again; a JPEG of the right size is kept as it is (95)",
    )
    parser.add_argument(
        "--hold-out",
        type=int,
        default=standard.hold_out,
        metavar="N",
        help=f"leave N identities out of training and make {HELD_OUT}.bin of them (0)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=standard.pairs,
        help="verification pairs of the identities held out, a multiple of 20; fewer where these "
        "people do not have so many (3000)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a data set")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: must be 1 or more")
    options = Options(args.shards, args.seed, args.size, args.quality, args.hold_out, args.pairs)
    done = pack(args.source, args.out, options, args.workers, args.overwrite)
    if done["skipped"] or done["empty_identities"]:
        print(
            f"warning: {done['skipped']} "
            f"{'image or folder' if done['skipped'] == 1 else 'images or folders'} skipped "
            f"(listed in {args.out}/skipped.txt), "
            f"{count(done['empty_identities'], 'identity', 'identities')} without any image",
            file=sys.stderr,
        )
    if done["resized"] and done["resized"]["count"]:
        text = resized_text(done["resized"]["count"], done["resized"]["of"], args.size)
        print(f"warning: {text}", file=sys.stderr)
    if done["pairs_made"] < done["pairs_asked"]:
        people = count(done["held_out_identities"], "person", "people")
        print(
            f"warning: {done['pairs_made']} pairs made, not {done['pairs_asked']}: the {people} "
            f"held out have no more",
            file=sys.stderr,
        )
    print(
        f"{done['status']} {done['path']}: {count(done['images'], 'image')}, "
        f"{count(done['classes'], 'class', 'classes')}, {count(done['shards'], 'shard')}, "
        f"{file_size(done['bytes'])}, {done['seconds']:.1f} s"
    )
    return done
