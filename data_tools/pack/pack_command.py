"""`pack`: images -> shards. The same source and options give the same bytes, at any --workers.

1. The source is listed; --min-images, --hold-out, --split, --max-images choose of it by the seed.
2. --hold-out identities are left out of training and become heldout.bin.
3. All other images are shuffled as one list and cut into shards; a worker writes a shard at a time
   and reads each image once. What cannot be used is counted, and listed in skipped.txt; an identity
   of which nothing can be used gets no class.

Stopped by Ctrl-C, by a full or failing disk, or killed, the same command resumes after the last
finished shard and writes the same bytes as an uninterrupted one. OUT.partial holds the finished
shards until then; remove it to start afresh.
"""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_tools.common.errors import UserError
from data_tools.common.messages import count, file_size
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import HELD_OUT, Options, Sources
from data_tools.pack.pairs import resized_text
from data_tools.sources.source import JOINS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    standard = Options()
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="a folder of identities (SOURCE/<identity>/<image>.jpg); zip or tar archives, or a "
        "directory of them; a .lst of im2rec or InsightFace; an InsightFace directory or a .rec, "
        "with or without .idx; a set packed before",
    )
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument(
        "--join",
        choices=JOINS,
        default="offset",
        help="several sources: nobody of one is in another (offset), or the same name is the same "
        "person (name)",
    )
    parser.add_argument(
        "--nested",
        action="store_true",
        help="folders: look for identities at any depth; every folder with images is one",
    )
    parser.add_argument(
        "--identity-level",
        type=int,
        default=0,
        metavar="N",
        help="folders: the first N folders of an image's path name its identity; 1 joins CFP's "
        "frontal/ and profile/ of each person",
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="where the paths of a .lst start (beside it)"
    )
    parser.add_argument(
        "--relabel", type=Path, metavar="FILE", help="follow this relabel index of a record source"
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=standard.shards,
        help="files to cut the images into (one for each 1000 images, 1 to 8)",
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
    parser.add_argument(
        "--split",
        default="",
        metavar="WHAT=SHARE",
        help="set images=SHARE of each identity, or identities=SHARE, aside as the set OUT/split",
    )
    parser.add_argument(
        "--min-images", type=int, default=1, metavar="N", help="leave out identities with fewer (1)"
    )
    parser.add_argument(
        "--max-images", type=int, default=0, metavar="N", help="of an identity, drawn (all)"
    )
    parser.add_argument(
        "--pass-through",
        action="store_true",
        help="keep the bytes of every image and do not decode it: damaged pixels show only in "
        "`verify --deep`",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="the faces are aligned at another size: resize square images (with --pass-through "
        "keep them, and train with resize=true); without it an image of another size than --size "
        "is skipped",
    )
    parser.add_argument(
        "--exif",
        choices=("ignore", "follow"),
        default="",
        help="an orientation that an image states (ignored; followed with --align)",
    )
    parser.add_argument(
        "--align",
        action="store_true",
        help="warp each face to the template by five points: of --landmarks, of the .lst, or found",
    )
    parser.add_argument(
        "--landmarks", type=Path, metavar="FILE", help="lines: path [score] x1 y1 .. x5 y5"
    )
    parser.add_argument(
        "--detector",
        type=Path,
        metavar="FILE",
        help="an ONNX file of YuNet or SCRFD that finds the five points",
    )
    parser.add_argument(
        "--walk", action="store_true", help="read an InsightFace .rec without its .idx"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a data set")


def other_size(images: int, size: int) -> str:
    if not images:
        return ""
    return (
        f"of which {images} are of another size than {size}x{size}: align them (--align), or "
        "--resize them if the faces are aligned; "
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be 1 or more")
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    sources = Sources(
        args.sources,
        args.join,
        args.nested,
        args.root,
        args.relabel,
        args.identity_level,
        args.walk,
    )
    done = pack(sources, args.out, options, args.workers, args.overwrite)
    if done["skipped"] or done["empty_identities"]:
        print(
            f"warning: {done['skipped']} "
            f"{'image or folder' if done['skipped'] == 1 else 'images or folders'} skipped "
            f"(listed in {args.out}/skipped.txt), "
            f"{other_size(done.get('other_size', 0), args.size)}"
            f"{count(done['empty_identities'], 'identity', 'identities')} without any image",
            file=sys.stderr,
        )
    for note in done.get("notes", ()):
        print(f"warning: {note}", file=sys.stderr)
    if done["left_out"]:
        left_out = ", ".join(f"{number} {ending}" for ending, number in done["left_out"].items())
        print(
            f"warning: {count(sum(done['left_out'].values()), 'file')} left out, for the ending "
            f"is no image's: {left_out}",
            file=sys.stderr,
        )
    _print_faces(done)
    if done["resized"] and done["resized"]["count"]:
        text = resized_text(done["resized"]["count"], done["resized"]["of"], args.size)
        print(f"warning: {text}", file=sys.stderr)
    people = count(done["held_out_identities"], "person", "people")
    if done["pairs_made"] < done["pairs_asked"]:
        print(
            f"warning: {done['pairs_made']} pairs made, not {done['pairs_asked']}: the {people} "
            f"held out have no more",
            file=sys.stderr,
        )
    if done["pairs_made"]:
        print(f"{HELD_OUT}.bin: {done['pairs_made']} pairs of {people} held out")
    print(
        f"{done['status']} {done['path']}: {count(done['images'], 'image')}, "
        f"{count(done['classes'], 'class', 'classes')}, {count(done['shards'], 'shard')}, "
        f"{file_size(done['bytes'])}, {done['seconds']:.1f} s{_left_out(done, args.min_images)}"
    )
    return done


def _left_out(done: dict[str, Any], min_images: int) -> str:
    """Everything of the source that is not in the set, for the last line; empty if all is."""
    without_face = done.get("without_face", 0)
    faces = f" ({without_face} without a face or landmarks)" if without_face else ""
    few = count(done["too_few_images"], "identity", "identities")
    parts = {
        f"{done['skipped']} skipped{faces}": done["skipped"],
        f"{count(done['ignored_files'], 'file')} ignored": done["ignored_files"],
        f"{few} with fewer than {min_images} images": done["too_few_images"],
        f"{count(done['beyond_max_images'], 'image')} beyond --max-images": (
            done["beyond_max_images"]
        ),
        f"{count(done['empty_identities'], 'identity', 'identities')} without an image": (
            done["empty_identities"]
        ),
        f"{count(done['held_out_identities'], 'person', 'people')} held out": (
            done["held_out_identities"]
        ),
    }
    said = [text for text, number in parts.items() if number]
    return f"; left out: {', '.join(said)}" if said else ""


def _print_faces(done: dict[str, Any]) -> None:
    """What alignment found: pictures without a face, and with several."""
    if "without_face" not in done:
        return
    if "several_faces" in done:
        text = (
            f"{count(done['without_face'], 'picture')} without a face (skipped), "
            f"{count(done['several_faces'], 'picture')} with several (the large central one is "
            f"packed)"
        )
    else:
        text = f"{count(done['without_face'], 'picture')} without landmarks (skipped)"
    print(f"faces: {text}")
