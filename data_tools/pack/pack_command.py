"""`pack`: images -> shards. The same source and options give the same bytes, at any --workers.

1. The source is listed; --min-images, --hold-out, --split and --max-images select
   from it, using the seed.
2. --hold-out identities are left out of training and become heldout.bin.
3. All other images are shuffled as one list and cut into shards; a worker writes a shard at a time
   and reads each image once. What cannot be used is counted, and listed in skipped.txt; an identity
   of which nothing can be used gets no class.

Stopped by Ctrl-C, by a full or failing disk, or killed, the same command resumes after the last
finished shard and writes the same bytes as an uninterrupted one. OUT.partial holds the finished
shards until then; remove it to start afresh.

Several machines that share a file system pack one set together: each runs the same command with
--part 1/N, --part 2/N ...; when all have ended, one runs it with --finish. A part that was killed
continues when it is started again. See also launch/slurm/pack_array.sh.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from data_tools.common import cli
from data_tools.common.errors import UserError
from data_tools.common.messages import count, file_size
from data_tools.common.schema import add_flags, from_flags
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import HELD_OUT, SPLIT, PackOptions, Sources
from data_tools.pack.pairs import resized_text
from data_tools.pack.several_machines import Part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="a folder of identities (SOURCE/<identity>/<image>.jpg); zip or tar archives, or a "
        "directory of them; labelled tars of WebDataset; an LMDB database; Hugging Face parquet "
        "files or a directory of them; a .lst of im2rec or InsightFace; a .csv of path,label; an "
        "InsightFace directory or a .rec, with or without .idx; a set packed before",
    )
    parser.add_argument("out", type=Path, help="directory to make")
    add_flags(parser, Sources)
    add_flags(parser, PackOptions)
    cli.add_workers(parser, "processes, at most one per shard and none for small sets (all cores)")
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="on several machines that share OUT: write part I of N (1/N to N/N) into OUT.partial; "
        "all parts take the same command, with --shards; --finish then makes OUT of them",
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="check the shards of all parts, and join them to OUT; the same bytes as without parts",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a data set")


def other_size(images: int, size: int) -> str:
    if not images:
        return ""
    return (
        f"of which {images} {'is' if images == 1 else 'are'} of another size than {size}x{size}: "
        "align them (--align), or --resize them if the faces are aligned; "
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    options = from_flags(PackOptions, args)
    sources = from_flags(Sources, args, paths=args.sources)
    part = Part.parse(args.part) if args.part is not None else None
    if part and (args.finish or args.overwrite):
        raise UserError("--part writes shards only: leave out --finish and --overwrite")
    done = pack(sources, args.out, options, args.workers, args.overwrite, part, args.finish)
    if part:
        print(
            f"part {part} of {done['path']}: {count(done['shards'], 'shard')}"
            + (f" ({done['reused']} finished before)" if done["reused"] else "")
            + f", {count(done['images'], 'image')}, {file_size(done['bytes'])}, "
            f"{done['skipped']} skipped, {done['seconds']:.1f} s"
        )
        return done
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
    if SPLIT in done:
        print(
            f"{args.out / done[SPLIT]['directory']}: {count(done[SPLIT]['images'], 'image')} of "
            f"{count(done[SPLIT]['identities'], 'identity', 'identities')} set aside"
        )
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
