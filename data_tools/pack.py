"""Images -> shards. The same source and options give the same bytes, at any number of workers.

What is done, in order, stands in pack_command.py.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.alignment import Aligner, read_landmarks
from data_tools.convert import Conversion, Pointed, convert_all
from data_tools.detectors import detector_sha256
from data_tools.journal import Finished, Journal, WrittenShard, file_sha256
from data_tools.listing import Names
from data_tools.lists import ListSource
from data_tools.pairs import PairOptions, check_num_pairs, make_pairs
from data_tools.parallel import Advance, run_tasks
from data_tools.shard_writer import ShardWriter, renumber, write_index, write_shard
from data_tools.sources import JOINS, Images, JoinedSource, Source, open_source
from data_tools.split import Choice, Parts, choose
from data_tools.wording import count

HELD_OUT = "heldout"
SPLIT = "split"  # the second set, a directory in the first
MAX_SIZE = 1024  # pixels: a slip of the finger beyond it would run for hours and fill the disk
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
    split: str = ""  # "images=SHARE" or "identities=SHARE": set aside as a second set
    min_images: int = 1  # of an identity
    max_images: int = 0  # of an identity; 0: all
    pass_through: bool = False
    exif: str = ""  # "ignore" | "follow"; default: ignored, followed when aligning
    align: bool = False
    landmarks: Path | None = None
    detector: Path | None = None

    def __post_init__(self) -> None:
        lowest = {
            "shards": 1, "seed": 0, "size": 1, "quality": 1, "hold_out": 0, "pairs": 0,
            "min_images": 1, "max_images": 0,
        }  # fmt: skip
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
        if (self.landmarks or self.detector) and not self.align:
            raise ValueError("--landmarks and --detector are of --align: say that too")
        if self.align and self.pass_through:
            raise ValueError("--align makes new images: it cannot --pass-through old ones")
        self.choice().share()

    def choice(self) -> Choice:
        return Choice(self.seed, self.hold_out, self.split, self.min_images, self.max_images)

    def conversion(self) -> Conversion:
        aligner = None
        if self.align:
            aligner = Aligner(self.size, str(self.detector) if self.detector else None)
        exif = self.exif or ("follow" if self.align else "ignore")
        return Conversion(self.size, self.quality, self.pass_through, exif, aligner)

    def recorded(self) -> dict[str, Any]:
        """As index.json keeps them: what was left at its default is not there."""
        recorded = dataclasses.asdict(self)
        optional = {field.name: field.default for field in dataclasses.fields(self)[6:]}
        for name, default in optional.items():
            if recorded[name] == default:
                del recorded[name]
        if not self.hold_out:
            del recorded["pairs"]
        if self.landmarks:
            recorded["landmarks"] = file_sha256(self.landmarks)
        if self.detector:
            recorded["detector"] = detector_sha256(str(self.detector))
        return recorded


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the images come from."""

    paths: Sequence[Path]
    join: str = "offset"  # or "name"
    nested: bool = False
    root: Path | None = None
    relabel: Path | None = None

    def open(self) -> Source:
        if self.join not in JOINS:
            raise ValueError(f"--join {self.join}: must be one of {', '.join(JOINS)}")
        if self.relabel and len(self.paths) > 1:
            raise ValueError("--relabel is of one set: pack the others by themselves")
        opened = [open_source(p, self.nested, self.root, self.relabel) for p in self.paths]
        return opened[0] if len(opened) == 1 else JoinedSource(opened, self.join)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))


def pack(
    paths: Path | Sources, out: Path, options: Options, workers: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Pack a source into the data set directory `out` and describe it.

    An `out` packed before from the same, unchanged source with the same options is left as it is
    (`status` is then "reused"); one whose pack was killed is continued ("resumed").

    Raises: ValueError, FileNotFoundError for a source that cannot be packed; FileExistsError if
    `out` holds something else; OSError if a disk is full or fails. `out` is then as it was.
    """
    started = time.monotonic()
    asked = paths if isinstance(paths, Sources) else Sources([paths])
    for path in asked.paths:
        _check_apart(path, out)
    source = asked.open()
    recorded = options.recorded()
    if not overwrite and _is_packed(source, out, recorded):
        return _summary(out, shards.read_index(out), "reused", time.monotonic() - started)
    if options.hold_out and any(path.stem == HELD_OUT for path in source.bins):
        raise ValueError(f"{asked} already holds {HELD_OUT}.bin: pack without --hold-out")
    points, unused = _points(source, options)
    with ShardWriter(out, overwrite, {**_describe(source), **recorded}) as writer:
        packing = _Packing(source, points, options, writer.partial, writer.journal, workers)
        about = packing.run()
        about["source"] = {"path": str(_where(asked)), **_describe(source)}
        about["options"] = recorded
        if unused:
            about["landmarks_unused"] = unused
        names = [source.identities[k] for k in packing.trained]
        index = writer.finish(packing.written, names, (options.size, options.size), about)
    status = "resumed" if packing.taken_over else "packed"
    return _summary(out, index, status, time.monotonic() - started)


class _Packing:
    """The work between an opened source and the index of its shards."""

    def __init__(
        self,
        source: Source,
        points: np.ndarray | None,  # float32 [N, 5, 2]
        options: Options,
        directory: Path,
        journal: Journal,
        workers: int,
    ) -> None:
        self.source, self.options, self.directory = source, options, directory
        self._points, self._journal, self._workers = points, journal, workers
        self.skipped: Skipped = list(source.skipped)
        self.resized = self.readable = 0
        self.taken_over = 0  # shards that a killed pack had finished
        self.written: list[WrittenShard] = []
        self.trained = np.empty(0, np.int64)  # identity of each class

    def run(self) -> dict[str, Any]:
        """Writes everything but the index; what the index says of it."""
        source, options = self.source, self.options
        try:
            parts = choose(source.labels, len(source.identities), options.choice())
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}{self._reasons()}") from error
        about: dict[str, Any] = {}
        empty = [parts.without]
        if len(parts.held):
            about["held_out"], unreadable = self._hold_out(parts.held)
            empty.append(unreadable)
        if len(parts.aside_images):
            about[SPLIT] = self._set_aside(parts)
        self.written = self._write(parts.images, parts.trained, self.directory, options.shards, "")
        self._check_readable(parts.trained)
        self.trained, lost = self._drop_empty(parts.trained)
        empty.append(lost)
        about["resized"] = {"count": self.resized, "of": self.readable}
        for path in source.bins:
            shutil.copyfile(path, self.directory / path.name)
        about["skipped"] = self._list_skipped()
        about["empty_identities"] = [
            source.identities[k] for k in np.sort(np.concatenate(empty)).tolist()
        ]
        about["too_few_images"] = {"identities": len(parts.few)}
        about["beyond_max_images"] = parts.over
        about["ignored_files"] = source.ignored
        return about

    def _images(self, indices: np.ndarray) -> Images:
        chosen = self.source.select(indices)
        return chosen if self._points is None else Pointed(chosen, self._points[indices])

    def _reasons(self) -> str:
        return "".join(f"; {where}: {why}" for where, why in self.skipped[:3])

    def _hold_out(self, held: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """The verification set of these identities written; those of them without an image."""
        options, labels = self.options, self.source.labels
        chosen = np.flatnonzero(np.isin(labels, held))
        pair_options = PairOptions(options.pairs, options.seed, options.conversion(), fewer=True)
        path = self.directory / f"{HELD_OUT}.bin"
        try:
            (made,) = run_tasks(
                lambda images, advance: make_pairs(
                    images, labels[chosen], path, pair_options, self.skipped, advance
                ),
                [self._images(chosen)],
                workers=1,
                total=len(chosen),
                title="held out",
            )
        except ValueError as error:
            raise ValueError(f"--hold-out {options.hold_out}: {error}") from error
        self.resized += made["resized"]
        self.readable += made["readable"]
        unreadable = np.setdiff1d(held, made.pop("readable_identities"))
        names = b"".join(os.fsencode(self.source.identities[k]) + b"\n" for k in held)
        (self.directory / f"{HELD_OUT}.txt").write_bytes(names)
        asked = {"pairs_asked": options.pairs}
        made = {**made, **asked, "identities": len(held), "names": f"{HELD_OUT}.txt"}
        return made, unreadable

    def _set_aside(self, parts: Parts) -> dict[str, Any]:
        """The second set, complete in its own directory."""
        directory = self.directory / SPLIT
        directory.mkdir(exist_ok=True)
        num_shards = min(self.options.shards, max(1, len(parts.aside_images) // 1000))
        written = self._write(parts.aside_images, parts.aside, directory, num_shards, f"{SPLIT}-")
        names = [self.source.identities[k] for k in parts.aside]
        size = (self.options.size, self.options.size)
        index = write_index(directory, written, names, size, {"split": self.options.split})
        return {"directory": SPLIT, "images": index["images"], "identities": len(names)}

    def _write(
        self,
        images: np.ndarray,  # of the source
        identities: np.ndarray,  # identity of each class
        directory: Path,
        num_shards: int,
        prefix: str,
    ) -> list[WrittenShard]:
        """These images in shards, shuffled; what came of them joins skipped, resized, readable."""
        if len(images) < num_shards:
            raise ValueError(
                f"{count(len(images), 'image')} cannot fill {num_shards} shards: ask for fewer"
            )
        class_of = np.full(len(self.source.identities), -1, np.int64)
        class_of[identities] = np.arange(len(identities))
        shuffled = np.random.default_rng([self.options.seed, 0]).permutation(images)
        cuts = np.array_split(shuffled, num_shards)
        names = [f"{prefix}train-{s:05d}-of-{num_shards:05d}" for s in range(num_shards)]
        found = {name: self._journal.find(name) for name in names} if not prefix else {}
        finished = {name: shard for name, shard in found.items() if shard is not None}
        self.taken_over += len(finished)
        left = [
            (name, some) for name, some in zip(names, cuts, strict=True) if name not in finished
        ]
        journal = None if prefix else self._journal
        tasks = _Tasks(
            len(left),
            (
                (
                    self._images(some), class_of[self.source.labels[some]], directory, name,
                    self.options.conversion(), journal,
                )
                for name, some in left
            ),
        )  # fmt: skip
        total = sum(len(some) for _, some in left)
        made = run_tasks(_write_one, tasks, self._workers, total, "images")
        finished |= {name: shard for (name, _), shard in zip(left, made, strict=True)}
        for name in names:
            shard, resized, faults = finished[name]
            self.skipped += faults
            self.resized += resized
            self.readable += len(shard.labels)
        return [finished[name].shard for name in names]

    def _check_readable(self, trained: np.ndarray) -> None:
        labels = np.concatenate([shard.labels for shard in self.written])
        readable = len(np.unique(labels))
        if readable < 2:
            raise ValueError(
                f"{self.source.path}: {readable} of {len(trained)} identities have a readable "
                f"image; 2 to train on are needed{self._reasons()}"
            )
        for shard in self.written:
            if not len(shard.labels):
                raise ValueError(
                    f"no image of {shard.entry['name']} can be read: ask for fewer shards"
                    f"{self._reasons()}"
                )

    def _drop_empty(self, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes none of whose images could be read leave no gap in the numbers."""
        sizes = sum(np.bincount(shard.labels, minlength=len(trained)) for shard in self.written)
        has = np.asarray(sizes) > 0
        if not has.all():
            new_class = np.cumsum(has) - 1
            self.written = [renumber(self.directory, shard, new_class) for shard in self.written]
        return trained[has], trained[~has]

    def _list_skipped(self) -> dict[str, Any]:
        if not self.skipped:
            return {"count": 0}
        lines = b"".join(os.fsencode(f"{where}\t{why}\n") for where, why in self.skipped)
        (self.directory / "skipped.txt").write_bytes(lines)
        no_face = sum(why in ("no face found", "no landmarks") for _, why in self.skipped)
        without = {"without_face": no_face} if self.options.align else {}
        return {"count": len(self.skipped), "file": "skipped.txt", **without}


class _Tasks:
    """Tasks that are made when they are asked for, of a known number."""

    def __init__(self, number: int, tasks: Iterator[Any]) -> None:
        self._number, self._tasks = number, tasks

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Any]:
        return self._tasks


def _write_one(task: tuple, advance: Advance) -> Finished:
    """The shard written, and written down."""
    images, labels, directory, name, conversion, journal = task
    skipped: Skipped = []
    resized = 0

    def labelled() -> Iterator[tuple[int, bytes]]:
        nonlocal resized
        for done in convert_all(images, conversion, skipped, advance):
            resized += done.resized
            yield int(labels[done.i]), done.encoded

    shard = write_shard(directory, name, labelled())
    finished = Finished(shard, resized, skipped)
    if journal is not None:
        journal.add(finished)
    return finished


def _points(source: Source, options: Options) -> tuple[np.ndarray | None, int]:
    """Landmarks float32 [N, 5, 2] to align by, NaN where unknown; lines of the file without use."""
    unaligned = isinstance(source, ListSource) and bool(source.unaligned.any())
    if not options.align:
        if unaligned and isinstance(source, ListSource):
            raise ValueError(
                f"{source.path}: {int(source.unaligned.sum())} of its images are not aligned yet "
                f"(0 in the first column): say --align"
            )
        return None, 0
    if options.landmarks:
        points, unused = read_landmarks(
            options.landmarks, Names.of(source.name(i) for i in range(len(source)))
        )
        if np.isnan(points).all():
            raise ValueError(
                f"--landmarks {options.landmarks}: names no image of {source.path}, whose first is "
                f"{os.fsdecode(source.name(0))!r}"
            )
        return points, unused
    if isinstance(source, ListSource) and source.landmarks is not None:
        own = source.landmarks.reshape(-1, 2, 5).transpose(0, 2, 1)
        return np.ascontiguousarray(own), 0
    if not options.detector:
        raise ValueError("--align needs five points: give --landmarks FILE or --detector FILE.onnx")
    return None, 0


def _where(asked: Sources) -> str:
    return ", ".join(str(path.resolve()) for path in asked.paths)


def _check_apart(source: Path, out: Path) -> None:
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{source} and {out} contain one another: keep source and output apart")


def _is_packed(source: Source, out: Path, recorded: dict[str, Any]) -> bool:
    """Whether `out` is this source packed with these options.

    Raises: FileExistsError saying in what it differs; ValueError if it is damaged.
    """
    if not (out / shards.INDEX).is_file():
        return False
    index = shards.read_index(out)
    was = {**index["source"], **index["options"]}
    now = {**_describe(source), **recorded}
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
        **{key: index[key] for key in (SPLIT, "landmarks_unused") if key in index},
        "seconds": round(seconds, 3),
    }
