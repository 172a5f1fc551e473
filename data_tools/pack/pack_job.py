"""The work of `pack` between an opened source and the index of its shards."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.journal import Finished, Journal, WrittenShard
from data_tools.common.messages import count
from data_tools.common.parallel import Advance, Tasks, run_tasks
from data_tools.images.decode import is_size_fault
from data_tools.pack.conversion import Pointed, convert_all
from data_tools.pack.pack_options import HELD_OUT, SPLIT, PackOptions
from data_tools.pack.pairs import PAIRS_STEP, PairOptions, check_possible, make_pairs, most_pairs
from data_tools.pack.several_machines import Part, missing_text, number_of_parts
from data_tools.pack.split import SplitParts, choose
from data_tools.shard_writer import renumber, write_index, write_shard
from data_tools.sources.parquet import ParquetImages
from data_tools.sources.source import Images, Joined, Source

IMAGES_PER_SHARD = 1000  # at least, where nobody asks for a number of shards
MOST_SHARDS = 8  # where nobody asks for more
STAGED = "staged"
_REASONS = 3  # in a message
Skipped = list[tuple[str, str]]  # (where, why)
_ONE_FIELD = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # a name may hold them


def plan(source: Source, options: PackOptions) -> tuple[PackOptions, SplitParts]:
    """The options with the number of shards that fits, and what becomes of each image.

    It looks at the listing only, and finds all that can be known from it: nothing that is on the
    disk need be touched for options that cannot be met.

    Raises: UserError if too little would be left to train on, to fill the shards or for a pair.
    """
    try:
        parts = choose(source.labels, len(source.identities), options.choice())
    except ValueError as error:
        raise UserError(f"{source.path}: {error}{_reasons(source.skipped)}") from error
    if len(parts.held):
        labels = source.labels[np.isin(source.labels, parts.held)]
        _check_pairs(options, labels)
    if options.shards is None:
        fitting = len(parts.images) // IMAGES_PER_SHARD
        options = replace(options, shards=min(max(fitting, 1), MOST_SHARDS))
    assert options.shards is not None
    if len(parts.images) < options.shards:
        raise UserError(
            f"{count(len(parts.images), 'image')} cannot fill {options.shards} shards: ask for "
            f"fewer"
        )
    return options, parts


def num_split_shards(options: PackOptions, parts: SplitParts) -> int:
    """The shards of the set that --split sets aside; 0 without one."""
    if not len(parts.aside_images):
        return 0
    assert options.shards is not None
    return min(options.shards, max(1, len(parts.aside_images) // IMAGES_PER_SHARD))


def shard_names(options: PackOptions, parts: SplitParts) -> list[str]:
    """The names of all shards, in the order in which parts count them."""
    assert options.shards is not None
    return _names("", options.shards) + _names(f"{SPLIT}-", num_split_shards(options, parts))


def _names(prefix: str, num_shards: int) -> list[str]:
    return [f"{prefix}train-{s:05d}-of-{num_shards:05d}" for s in range(num_shards)]


def _cuts(images: np.ndarray, num_shards: int, seed: int) -> list[np.ndarray]:
    """The images of each shard."""
    shuffled = np.random.default_rng([seed, 0]).permutation(images)
    return np.array_split(shuffled, num_shards) if num_shards else []


def _check_pairs(options: PackOptions, labels: np.ndarray) -> None:
    try:
        check_possible(labels, max(most_pairs(labels), PAIRS_STEP))
    except ValueError as error:
        raise UserError(f"--hold-out {options.hold_out}: {error}") from error


def _reasons(skipped: Skipped) -> str:
    """The most frequent reasons, each once with its first image; the number of the others."""
    kinds = ["size" if is_size_fault(why) else why for _, why in skipped]  # sizes differ
    first = dict(zip(reversed(kinds), reversed(skipped), strict=True))
    common = [(first[kind], times) for kind, times in Counter(kinds).most_common(_REASONS)]
    return "".join(
        f"; {where}{f' and {times - 1} more' if times > 1 else ''}: {why}"
        for (where, why), times in common
    )


class Packing:
    """A source's images, written as shards, verification pairs and what is set aside."""

    def __init__(
        self,
        source: Source,
        points: np.ndarray | None,  # float32 [N, 5, 2]
        options: PackOptions,
        parts: SplitParts,  # as plan() says, and the options
        directory: Path,
        journal: Journal,
        workers: int,
        join: bool = False,  # find every shard finished, as --finish does
    ) -> None:
        self.source, self.options, self.directory = source, options, directory
        self._points, self._journal, self._workers = points, journal, workers
        self._parts = parts
        self._join = join
        self._part: Part | None = None  # the shards that this process writes; None: all
        self.skipped: Skipped = list(source.skipped)
        self.resized = self.readable = 0
        self.several = 0  # images in which the detector found more than one face
        self.reused = 0  # shards that an interrupted pack had finished
        self.written: list[WrittenShard] = []
        self.trained = np.empty(0, np.int64)  # identity of each class

    def run(self) -> dict[str, Any]:
        """Writes everything but the index; what the index says of it."""
        source, options, parts = self.source, self.options, self._parts
        assert options.shards is not None
        self._stage(STAGED, self._all_images)
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
        if options.detector:
            about["several_faces"] = self.several
        about["empty_identities"] = [
            source.identities[k] for k in np.sort(np.concatenate(empty)).tolist()
        ]
        about["too_few_images"] = {"identities": len(parts.few)}
        about["beyond_max_images"] = parts.over
        for name in files.names(self.directory):
            if name.startswith(STAGED):
                files.remove_tree(self.directory / name)
        about["ignored_files"] = source.ignored
        if source.left_out:
            about["left_out"] = source.left_out
        if source.notes:
            about["notes"] = source.notes
        return about

    def run_part(self, part: Part) -> None:
        """Writes the shards of this part alone, and records them in the journal."""
        parts, options = self._parts, self.options
        assert options.shards is not None
        self._part = part
        staged = f"{STAGED}-{part.number}"
        self._stage(staged, lambda: self._images_of_part(part))
        self.written = self._write(parts.images, parts.trained, self.directory, options.shards, "")
        if len(parts.aside_images):
            self.written += self._write_aside()
        if files.exists(self.directory / staged):
            files.remove_tree(self.directory / staged)

    def _stage(self, name: str, needed: Callable[[], np.ndarray]) -> None:
        """Copy the images `needed` that cannot be read one by one (see parquet.py) beside the
        shards."""
        if isinstance(self.source, ParquetImages | Joined):
            self.source.stage(self.directory / name, needed())

    def _all_images(self) -> np.ndarray:
        """What run() reads."""
        parts = self._parts
        held = np.flatnonzero(np.isin(self.source.labels, parts.held))
        written = [] if self._join else [parts.aside_images, parts.images]
        return np.concatenate([held, *written]).astype(np.int64)

    def _images_of_part(self, part: Part) -> np.ndarray:
        parts, options = self._parts, self.options
        assert options.shards is not None
        main = _cuts(parts.images, options.shards, options.seed)
        aside = _cuts(parts.aside_images, num_split_shards(options, parts), options.seed)
        return np.concatenate([some for k, some in enumerate([*main, *aside]) if part.has(k)])

    def _images(self, indices: np.ndarray) -> Images:
        chosen = self.source.select(indices)
        return chosen if self._points is None else Pointed(chosen, self._points[indices])

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
            raise UserError(f"--hold-out {options.hold_out}: {error}") from error
        self.resized += made["resized"]
        self.readable += made["readable"]
        self.several += made.pop("several_faces")
        unreadable = np.setdiff1d(held, made.pop("readable_identities"))
        names = b"".join(os.fsencode(self.source.identities[k]) + b"\n" for k in held)
        files.write_bytes(self.directory / f"{HELD_OUT}.txt", names)
        asked = {"pairs_asked": options.pairs}
        made = {**made, **asked, "identities": len(held), "names": f"{HELD_OUT}.txt"}
        return made, unreadable

    def _set_aside(self, parts: SplitParts) -> dict[str, Any]:
        """The second set, complete in its own directory."""
        written = self._write_aside()
        directory = self.directory / SPLIT
        names = [self.source.identities[k] for k in parts.aside]
        size = (self.options.size, self.options.size)
        index = write_index(directory, written, names, size, {"split": self.options.split})
        return {"directory": SPLIT, "images": index["images"], "identities": len(names)}

    def _write_aside(self) -> list[WrittenShard]:
        """The shards of the second set, which are counted after those of the first."""
        parts, first = self._parts, self.options.shards or 0
        directory = self.directory / SPLIT
        directory.mkdir(exist_ok=True)
        num_shards = num_split_shards(self.options, parts)
        return self._write(
            parts.aside_images, parts.aside, directory, num_shards, f"{SPLIT}-", first
        )

    def _write(
        self,
        images: np.ndarray,  # of the source
        identities: np.ndarray,  # identity of each class
        directory: Path,
        num_shards: int,
        prefix: str,
        first: int = 0,  # the number of the first shard among those of all sets
    ) -> list[WrittenShard]:
        """These images in shards, shuffled; their counts join skipped, resized, readable.

        Of a part of several, its own shards.

        Raises: UserError: --finish, and a shard is damaged.
        """
        class_of = np.full(len(self.source.identities), -1, np.int64)
        class_of[identities] = np.arange(len(identities))
        cuts = _cuts(images, num_shards, self.options.seed)
        names = _names(prefix, num_shards)
        numbers = range(first, first + num_shards)
        if self._part is not None:
            own = [n - first for n in numbers if self._part.has(n)]
            names, cuts = [names[k] for k in own], [cuts[k] for k in own]
        found = {name: self._journal.find(name, directory) for name in names}
        finished = {name: shard for name, shard in found.items() if shard is not None}
        self.reused += len(finished)
        if self._join and len(finished) < len(names):
            bad = [n for n, name in zip(numbers, names, strict=True) if name not in finished]
            parts = number_of_parts(self.directory)
            raise UserError(f"{self.directory}: damaged, so {missing_text(bad, parts)}")
        left = [
            (name, some) for name, some in zip(names, cuts, strict=True) if name not in finished
        ]
        tasks = Tasks(
            len(left),
            (
                (
                    self._images(some),
                    class_of[self.source.labels[some]],
                    directory,
                    name,
                    self.options.conversion(),
                    self._journal,
                )
                for name, some in left
            ),
        )
        total = sum(len(some) for _, some in left)
        made = run_tasks(_write_one, tasks, self._workers, total, "images")
        finished |= {name: shard for (name, _), shard in zip(left, made, strict=True)}
        for name in names:
            shard, resized, faults, several = finished[name]
            self.skipped += faults
            self.resized += resized
            self.several += several
            self.readable += len(shard.labels)
        return [finished[name].shard for name in names]

    def _check_readable(self, trained: np.ndarray) -> None:
        labels = np.concatenate([shard.labels for shard in self.written])
        readable = len(np.unique(labels))
        if readable < 2:
            raise UserError(
                f"{self.source.path}: {readable} of {len(trained)} identities have a readable "
                f"image; 2 to train on are needed{_reasons(self.skipped)}"
            )
        for shard in self.written:
            if not len(shard.labels):
                raise UserError(
                    f"no image of {shard.entry['name']} can be read: ask for fewer shards"
                    f"{_reasons(self.skipped)}"
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
        lines = b"".join(
            os.fsencode(f"{where.translate(_ONE_FIELD)}\t{why.translate(_ONE_FIELD)}\n")
            for where, why in self.skipped
        )
        files.write_bytes(self.directory / "skipped.txt", lines)
        no_face = sum(why in ("no face found", "no landmarks") for _, why in self.skipped)
        without = {"without_face": no_face} if self.options.align else {}
        if other_size := sum(is_size_fault(why) for _, why in self.skipped):
            without["other_size"] = other_size
        return {"count": len(self.skipped), "file": "skipped.txt", **without}


def _write_one(task: tuple, advance: Advance) -> Finished:
    """The shard written, and recorded in the journal."""
    images, labels, directory, name, conversion, journal = task
    skipped: Skipped = []
    resized = several = 0

    def labelled() -> Iterator[tuple[int, bytes]]:
        nonlocal resized, several
        for done in convert_all(images, conversion, skipped, advance):
            resized += done.resized
            several += done.faces > 1
            yield int(labels[done.i]), done.encoded

    shard = write_shard(directory, name, labelled())
    finished = Finished(shard, resized, skipped, several)
    journal.add(finished)
    return finished
