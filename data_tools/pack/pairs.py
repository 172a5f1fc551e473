"""`pairs`: a verification set `<name>.bin` of the LFW form, from faces that training never sees.

The file is a pickle of (images, issame): 2P encoded images, pair i being images 2i and 2i + 1, and
P booleans. As in LFW's own list there are ten folds, one after the other, each with its pairs of
one person first and as many of two people after. A person may appear in several folds, unlike in
LFW: the folds choose a threshold here, they train nothing.

--hold-out N draws N people of a packed set, whose faces are aligned already, and writes beside
NAME.bin their names (NAME.txt) and a relabel index that leaves them out of training
(NAME.relabel.txt), for `relabel SET NAME.relabel.txt`.
"""

import argparse
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import relabel, shards
from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.parallel import Advance, run_tasks
from data_tools.common.schema import check_number
from data_tools.common.text import numbered_lines
from data_tools.decisions import write_decision
from data_tools.pack.conversion import Conversion, convert_all
from data_tools.sources.source import Images, RecordSource, Source, open_source

FOLDS = 10
MAX_SIZE = 1024  # pixels: a slip of the finger beyond it would run for hours and fill the disk
PAIRS_STEP = 2 * FOLDS  # one same and one different pair in each fold


@dataclass(frozen=True, slots=True)
class PairOptions:
    """What the pairs depend on, besides the images."""

    num_pairs: int  # asked for
    seed: int
    conversion: Conversion = Conversion()
    fewer: bool = False  # make as many as there are where those asked for are too many


def draw_pairs(labels: np.ndarray, num_pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of images as indices int64 [P, 2], and issame bool [P], in folds like LFW's.

    `labels` [n] are the identities of the images. Pairs of one person are dealt round by round, one
    to each identity that has one left, so that large identities do not fill the set; the others
    join two identities drawn evenly. The result depends on (labels, num_pairs, seed) only.

    Raises: ValueError if num_pairs is not a multiple of 20, or more than can be made.
    """
    check_possible(labels, num_pairs)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    groups = np.split(order, starts[1:])  # image indices of each identity
    half = num_pairs // 2
    random = np.random.default_rng([seed, 2])
    same = _draw_same(groups, half, random)
    different = _draw_different(groups, half, random)
    per_fold = half // FOLDS
    pairs = np.stack([same.reshape(FOLDS, per_fold, 2), different.reshape(FOLDS, per_fold, 2)], 1)
    issame = np.tile(np.repeat([True, False], per_fold), FOLDS)
    return pairs.reshape(-1, 2), issame


def check_possible(labels: np.ndarray, num_pairs: int) -> None:
    """Raises: ValueError if images of these identities do not make that many pairs."""
    check_num_pairs(num_pairs)
    half = num_pairs // 2
    identities = len(np.unique(labels))
    for name, possible in zip(("one person", "two people"), _possible(labels), strict=True):
        if half > possible:
            most = most_pairs(labels)
            raise UserError(
                f"{num_pairs} pairs need {half} of {name}, but {count(len(labels), 'image')} of "
                f"{count(identities, 'identity', 'identities')} make only {possible}: "
                + (f"ask for at most {most} pairs" if most else "more images or people are needed")
            )


def check_num_pairs(num_pairs: int) -> None:
    """Raises: ValueError if that many pairs do not make ten folds, half same, half different."""
    if num_pairs <= 0 or num_pairs % PAIRS_STEP:
        raise UserError(
            f"{num_pairs} pairs do not make {FOLDS} folds, half same and half different: take a "
            f"multiple of {PAIRS_STEP}"
        )


def most_pairs(labels: np.ndarray) -> int:
    """The largest number of pairs that `draw_pairs` can draw; 0 if there are not even 20."""
    return 2 * min(_possible(labels)) // PAIRS_STEP * PAIRS_STEP


def _possible(labels: np.ndarray) -> tuple[int, int]:
    """How many different pairs of one person, and of two people, there are."""
    sizes = np.unique(labels, return_counts=True)[1]
    same = int((sizes * (sizes - 1) // 2).sum())
    return same, len(labels) * (len(labels) - 1) // 2 - same


def _draw_same(groups: list[np.ndarray], wanted: int, random: np.random.Generator) -> np.ndarray:
    drawn: list[tuple[int, int]] = []
    taken: list[set[tuple[int, int]]] = [set() for _ in groups]
    while True:
        for g in random.permutation(len(groups)):
            size = len(groups[g])
            if len(taken[g]) == size * (size - 1) // 2:
                continue
            while True:
                i, j = sorted(random.choice(size, 2, replace=False).tolist())
                if (i, j) not in taken[g]:
                    break
            taken[g].add((i, j))
            drawn.append((int(groups[g][i]), int(groups[g][j])))
            if len(drawn) == wanted:
                return np.array(drawn, np.int64)


def _draw_different(
    groups: list[np.ndarray], wanted: int, random: np.random.Generator
) -> np.ndarray:
    drawn: dict[tuple[int, int], None] = {}  # in the order of drawing
    while len(drawn) < wanted:
        g, h = random.choice(len(groups), 2, replace=False)
        i, j = int(random.choice(groups[g])), int(random.choice(groups[h]))
        drawn[min(i, j), max(i, j)] = None
    return np.array(list(drawn), np.int64)


def write_bin(path: Path, images: list[bytes], pairs: np.ndarray, issame: np.ndarray) -> None:
    """Write pairs [P, 2] of `images` as InsightFace's loader reads them; whole or not at all.

    Raises: OSError naming the file if it cannot be written.
    """
    bins = [images[i] for i in pairs.ravel().tolist()]
    with files.replacing(path) as file:
        # Protocol 4: bytes as such, an image of several pairs once.
        pickle.dump((bins, [bool(same) for same in issame]), file, protocol=4)


def make_pairs(
    images: Images,
    labels: np.ndarray,  # [n] identity of each image
    path: Path,
    options: PairOptions,
    skipped: list[tuple[str, str]],
    advance: Advance,
) -> dict[str, Any]:
    """Draw pairs among the readable images and write them; unreadable ones join `skipped`.

    Raises: ValueError if there are not enough different pairs.
    """
    readable, resized, several = [], 0, 0
    for jpeg in convert_all(images, options.conversion, skipped, advance):
        readable.append(jpeg.i)
        resized += jpeg.resized
        several += jpeg.faces > 1
    num_pairs = options.num_pairs
    if options.fewer:
        num_pairs = min(num_pairs, max(most_pairs(labels[readable]), PAIRS_STEP))
    pairs, issame = draw_pairs(labels[readable], num_pairs, options.seed)
    used, pairs = np.unique(np.array(readable)[pairs], return_inverse=True)
    jpegs = convert_all(images.select(used), options.conversion, skipped, lambda n: None)
    write_bin(path, [jpeg.encoded for jpeg in jpegs], pairs.reshape(-1, 2), issame)
    return {
        "file": path.name,
        "pairs": len(issame),
        "identities": len(np.unique(labels[used])),
        "images": len(used),
        "readable": len(readable),
        "resized": resized,
        "several_faces": several,
        "readable_identities": np.unique(labels[readable]),
    }


def resized_text(resized: int, images: int, size: int) -> str:
    return (
        f"{resized} of {count(images, 'image')} {'was' if resized == 1 else 'were'} not "
        f"{size}x{size} and {'was' if resized == 1 else 'were'} resized (--resize)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of identities, or a data set directory")
    parser.add_argument("out", type=Path, help="the file to write: NAME.bin")
    parser.add_argument("--pairs", type=int, default=3000, help="a multiple of 20 (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--identities", type=Path, help="take only those named in FILE, one a line")
    parser.add_argument(
        "--hold-out",
        type=int,
        default=0,
        metavar="N",
        help="of a packed set: draw N people, and write a relabel index that drops them",
    )
    parser.add_argument("--size", type=int, default=112, help="side of the images in pixels (112)")
    parser.add_argument(
        "--resize", action="store_true", help="the faces are aligned at another size: resize them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_number("--seed", args.seed, 0)
    check_number("--size", args.size, 1, MAX_SIZE)
    if args.out.suffix != ".bin":
        raise UserError(f"{args.out}: the name of a verification set ends in .bin")
    if files.exists(args.out) and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; --overwrite replaces it")
    source = open_source(args.source)
    held = _draw_people(source, args)
    chosen = np.arange(len(source))
    if held is not None:
        chosen = np.flatnonzero(np.isin(source.labels, held))
    if args.identities:
        chosen = np.flatnonzero(np.isin(source.labels, _numbers_of(source, args.identities)))
    skipped = list(source.skipped)
    options = PairOptions(args.pairs, args.seed, Conversion(args.size, resize=args.resize))
    (made,) = run_tasks(
        lambda images, advance: make_pairs(
            images, source.labels[chosen], args.out, options, skipped, advance
        ),
        [source.select(chosen)],
        workers=1,
        total=len(chosen),
        title="reading faces",
    )
    del made["readable_identities"], made["several_faces"]  # pairs detects nothing
    index = None if held is None else _leave_out(args, source, held)
    for where, reason in skipped:
        print(f"skipped {where}: {reason}", file=sys.stderr)
    print(
        f"{args.out}: {made['pairs']} pairs of {count(made['images'], 'image')}, "
        f"{count(made['identities'], 'person', 'people')}"
    )
    if made["resized"]:
        print(
            f"warning: {resized_text(made['resized'], made['readable'], args.size)}",
            file=sys.stderr,
        )
    if index is not None:
        print(
            f"to leave these {count(args.hold_out, 'person', 'people')} out of training: "
            f"python -m data_tools relabel {args.source} {index}"
        )
        made["relabel"] = str(index)
    return {**made, "file": str(args.out), "skipped": len(skipped)}


def _draw_people(source: Source, args: argparse.Namespace) -> np.ndarray | None:
    """The numbers of the identities to hold out, None where none are asked for."""
    if not args.hold_out:
        return None
    if args.identities:
        raise UserError(
            "--hold-out draws the people that --identities would name: give one of the two"
        )
    if not isinstance(source, RecordSource):
        raise UserError(f"--hold-out: {args.source} is not packed yet: use `pack --hold-out`")
    people = np.unique(source.labels)
    if not 0 < args.hold_out <= len(people) - 2:
        raise UserError(
            f"--hold-out {args.hold_out}: {args.source} holds images of "
            f"{count(len(people), 'person', 'people')}, and 2 must be left to train on"
        )
    drawn = np.random.default_rng([args.seed, 1]).permutation(people)[: args.hold_out]
    return np.sort(drawn)


def _leave_out(args: argparse.Namespace, source: Source, held: np.ndarray) -> Path:
    """The relabel index that drops these people, beside what is in force; their names beside it."""
    data = shards.open(args.source)
    place = args.out.with_suffix(".relabel.txt")
    new = np.where(np.isin(data.labels, held), relabel.DROP, data.labels)
    write_decision(place, data, new, overwrite=True)
    names = b"".join(os.fsencode(source.identities[k]) + b"\n" for k in held.tolist())
    files.write_bytes(args.out.with_suffix(".txt"), names)
    return place


def _numbers_of(source: Source, path: Path) -> list[int]:
    number_of = {name: number for number, name in enumerate(source.identities)}
    names = [name for _, name in numbered_lines(path, errors="surrogateescape")]
    unknown = [name for name in names if name not in number_of]
    if unknown or not names:
        raise UserError(
            f"{path}: {len(unknown)} of {len(names)} names are no identities of {source.path}"
            + (f"; the first is {unknown[0]!r}" if unknown else "")
        )
    return [number_of[name] for name in names]
