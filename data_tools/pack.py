"""Images -> shards. The same source and options give the same bytes, at any number of workers.

What is done, in order, stands in pack_command.py.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.pairs import PairOptions, check_num_pairs, make_pairs
from data_tools.parallel import Advance, run_tasks
from data_tools.shard_writer import ShardWriter, WrittenShard, write_shard
from data_tools.sources import Images, Source, open_source, read_jpegs
from data_tools.wording import count

HELD_OUT = "heldout"
MAX_SIZE = 1024  # pixels: a slip of the finger beyond it would run for hours and fill the disk
_PROBES = 64  # tasks of the first step
Skipped = list[tuple[str, str]]  # (where, why)


@dataclass(frozen=True, slots=True)
class Options:
    """What the bytes of the shards depend on, besides the source."""

    shards: int = 8
    seed: int = 0
    size: int = 112  # pixels
    quality: int = 95  # of images that have to be encoded again
    hold_out: int = 0  # identities
    pairs: int = 3000  # of the held-out identities, at most; nothing without them

    def __post_init__(self) -> None:
        lowest = {"shards": 1, "seed": 0, "size": 1, "quality": 1, "hold_out": 0, "pairs": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be {low} or more"
                )
        if self.size > MAX_SIZE:
            raise ValueError(f"--size {self.size}: must be {MAX_SIZE} or less")
        if self.quality > 100:
            raise ValueError(f"--quality {self.quality}: a JPEG's quality is at most 100")
        if self.hold_out:
            check_num_pairs(self.pairs)


def pack(
    source_path: Path, out: Path, options: Options, workers: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Pack a source into the data set directory `out` and describe it.

    An `out` packed before from the same, unchanged source with the same options is left as it is
    (`status` is then "reused").

    Raises: ValueError, FileNotFoundError for a source that cannot be packed; FileExistsError if
    `out` holds something else; OSError if a disk is full or fails. `out` is then as it was.
    """
    started = time.monotonic()
    _check_apart(source_path, out)
    source = open_source(source_path)
    if not overwrite and _is_packed(source, out, options):
        return _summary(out, shards.read_index(out), "reused", time.monotonic() - started)
    if options.hold_out and any(path.stem == HELD_OUT for path in source.bins):
        raise ValueError(f"{source_path} already holds {HELD_OUT}.bin: pack without --hold-out")
    with ShardWriter(out, overwrite) as writer:
        skipped = list(source.skipped)
        held, trained, empty = _split_identities(source, options, workers, skipped)
        about: dict[str, Any] = {}
        if len(held):
            about["held_out"] = _hold_out(source, held, writer.partial, options, skipped)
        written, resized = _write_shards(source, trained, writer.partial, options, workers, skipped)
        held_out = about.get("held_out", {"resized": 0, "readable": 0})
        about["resized"] = {
            "count": resized + held_out["resized"],
            "of": sum(len(shard.labels) for shard in written) + held_out["readable"],
        }
        for path in source.bins:
            shutil.copyfile(path, writer.partial / path.name)
        about["skipped"] = _list_skipped(skipped, writer.partial)
        about["empty_identities"] = [source.identities[k] for k in empty]
        about["ignored_files"] = source.ignored
        about["source"] = {"path": str(source_path.resolve()), **_describe(source)}
        about["options"] = _recorded(options)
        names = [source.identities[k] for k in trained]
        index = writer.finish(written, names, (options.size, options.size), about)
    return _summary(out, index, "packed", time.monotonic() - started)


def _check_apart(source: Path, out: Path) -> None:
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{source} and {out} contain one another: keep source and output apart")


def _is_packed(source: Source, out: Path, options: Options) -> bool:
    """Whether `out` is this source packed with these options.

    Raises: FileExistsError saying in what it differs; ValueError if it is damaged.
    """
    if not (out / shards.INDEX).is_file():
        return False
    index = shards.read_index(out)
    was = {**index["source"], **index["options"]}
    now = {**_describe(source), **_recorded(options)}
    changed = [
        f"{key} {was.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | was.keys() - {"path"})
        if was.get(key) != now.get(key)
    ]
    if changed:
        raise FileExistsError(
            f"{out} was packed from something else or otherwise ({', '.join(changed)}); "
            f"--overwrite replaces it"
        )
    shards.open(out)  # whole, as far as a look can tell
    return True


def _describe(source: Source) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "images": len(source),
        "identities": len(source.identities),
        "sha256": source.sha256,
    }


def _recorded(options: Options) -> dict[str, Any]:
    recorded = dataclasses.asdict(options)
    if not options.hold_out:
        del recorded["pairs"]
    return recorded


def _split_identities(
    source: Source, options: Options, workers: int, skipped: Skipped
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the identities held out, trained on (class c is the c-th), without an image."""
    order = np.argsort(source.labels, kind="stable")
    counts = np.bincount(source.labels, minlength=len(source.identities))
    ends = np.cumsum(counts)
    tasks = []
    for some in np.array_split(np.arange(len(counts)), min(_PROBES, len(counts))):
        images = source.select(order[ends[some[0]] - counts[some[0]] : ends[some[-1]]])
        tasks.append((images, counts[some], options))
    results = run_tasks(_probe, tasks, workers, len(counts), "identities")
    readable = np.concatenate([found for found, _ in results])
    for _, faults in results:
        skipped += faults
    usable, empty = np.flatnonzero(readable), np.flatnonzero(~readable)
    if len(usable) < 2 + options.hold_out:
        reasons = "".join(f"; {where}: {why}" for where, why in skipped[:3])
        if len(usable) > 2:
            reasons = f"; --hold-out can be at most {len(usable) - 2}" + reasons
        raise ValueError(
            f"{source.path}: {len(usable)} of {len(readable)} identities have a readable image; "
            f"{options.hold_out} to hold out and 2 to train on are needed{reasons}"
        )
    random = np.random.default_rng([options.seed, 1])
    held = np.sort(random.permutation(usable)[: options.hold_out])
    return held, np.setdiff1d(usable, held), empty


def _probe(
    task: tuple[Images, np.ndarray, Options], advance: Advance
) -> tuple[np.ndarray, Skipped]:
    """Whether each identity has a readable image, bool [m]; the faults of those that have none."""
    images, counts, options = task
    found = np.zeros(len(counts), bool)
    skipped: Skipped = []
    stop = 0
    for k, num_images in enumerate(counts):
        start, stop = stop, stop + num_images
        faults: Skipped = []
        one_by_one = images.select(np.arange(start, stop))
        jpegs = read_jpegs(one_by_one, options.size, options.quality, faults, lambda n: None)
        found[k] = next(jpegs, None) is not None
        if not found[k]:
            skipped += faults
        advance(1)
    return found, skipped


def _hold_out(
    source: Source, held: np.ndarray, directory: Path, options: Options, skipped: Skipped
) -> dict[str, Any]:
    """Write the verification set of the held-out identities, and their names."""
    chosen = np.flatnonzero(np.isin(source.labels, held))
    pair_options = PairOptions(
        options.pairs, options.seed, options.size, options.quality, fewer=True
    )
    path = directory / f"{HELD_OUT}.bin"
    try:
        (made,) = run_tasks(
            lambda images, advance: make_pairs(
                images, source.labels[chosen], path, pair_options, skipped, advance
            ),
            [source.select(chosen)],
            workers=1,
            total=len(chosen),
            title="held out",
        )
    except ValueError as error:
        raise ValueError(f"--hold-out {options.hold_out}: {error}") from error
    names = b"".join(os.fsencode(source.identities[k]) + b"\n" for k in held)
    (directory / f"{HELD_OUT}.txt").write_bytes(names)
    asked = {"pairs_asked": options.pairs}
    return {**made, **asked, "identities": len(held), "names": f"{HELD_OUT}.txt"}


def _write_shards(
    source: Source,
    trained: np.ndarray,  # identity of each class
    directory: Path,
    options: Options,
    workers: int,
    skipped: Skipped,
) -> tuple[list[WrittenShard], int]:
    """The shards, and how many of their images were resized."""
    class_of = np.full(len(source.identities), -1, np.int64)
    class_of[trained] = np.arange(len(trained))
    chosen = np.flatnonzero(class_of[source.labels] >= 0)
    if len(chosen) < options.shards:
        raise ValueError(
            f"{count(len(chosen), 'image')} cannot fill {options.shards} shards: ask for fewer"
        )
    chosen = np.random.default_rng([options.seed, 0]).permutation(chosen)
    tasks = []
    for s, some in enumerate(np.array_split(chosen, options.shards)):
        name = f"train-{s:05d}-of-{options.shards:05d}"
        images = source.select(some)
        tasks.append((images, class_of[source.labels[some]], directory, name, options))
    results = run_tasks(_write_one, tasks, workers, len(chosen), "images")
    for written, _, faults in results:
        skipped += faults
        if not len(written.labels):
            raise ValueError(
                f"no image of {written.entry['name']} can be read: ask for fewer shards; "
                f"{faults[0][0]}: {faults[0][1]}"
            )
    return [written for written, _, _ in results], sum(resized for _, resized, _ in results)


def _write_one(
    task: tuple[Images, np.ndarray, Path, str, Options], advance: Advance
) -> tuple[WrittenShard, int, Skipped]:
    """The shard, how many of its images were resized, and what was left out."""
    images, labels, directory, name, options = task
    skipped: Skipped = []
    resized = 0

    def labelled() -> Iterator[tuple[int, bytes]]:
        nonlocal resized
        for jpeg in read_jpegs(images, options.size, options.quality, skipped, advance):
            resized += jpeg.resized
            yield int(labels[jpeg.i]), jpeg.encoded

    return write_shard(directory, name, labelled()), resized, skipped


def _list_skipped(skipped: Skipped, directory: Path) -> dict[str, Any]:
    if not skipped:
        return {"count": 0}
    lines = b"".join(os.fsencode(f"{where}\t{why}\n") for where, why in skipped)
    (directory / "skipped.txt").write_bytes(lines)
    return {"count": len(skipped), "file": "skipped.txt"}


def _summary(out: Path, index: dict[str, Any], status: str, seconds: float) -> dict[str, Any]:
    held_out = index.get("held_out", {})
    return {
        "status": status,
        "path": str(out),
        "images": index["images"],
        "classes": index["classes"],
        "shards": len(index["shards"]),
        "bytes": sum(shard["bytes"] for shard in index["shards"]),
        "skipped": index["skipped"]["count"],
        "empty_identities": len(index["empty_identities"]),
        "resized": index["resized"],
        "held_out_identities": held_out.get("identities", 0),
        "pairs_asked": held_out.get("pairs_asked", 0),
        "pairs_made": held_out.get("pairs", 0),
        "verification": [entry["file"] for entry in index["verification"]],
        "seconds": round(seconds, 3),
    }
