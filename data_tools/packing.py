"""The work of `pack` between an opened source and the index of its shards."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common.errors import UserError
from data_tools.convert import Pointed, convert_all
from data_tools.image_size import is_size_fault
from data_tools.journal import Finished, Journal, WrittenShard
from data_tools.pack_options import HELD_OUT, SPLIT, Options
from data_tools.pairs import PairOptions, make_pairs
from data_tools.parallel import Advance, Tasks, run_tasks
from data_tools.shard_writer import renumber, write_index, write_shard
from data_tools.sources import Images, Source
from data_tools.split import Parts, choose
from data_tools.wording import count

Skipped = list[tuple[str, str]]  # (where, why)
_ONE_FIELD = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # a name may hold them


class Packing:
    """A source's images, written as shards, verification pairs and what is set aside."""

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
            raise UserError(f"{source.path}: {error}{self._reasons()}") from error
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
        if source.left_out:
            about["left_out"] = source.left_out
        if source.notes:
            about["notes"] = source.notes
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
            raise UserError(f"--hold-out {options.hold_out}: {error}") from error
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
            raise UserError(
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
        tasks = Tasks(
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
            raise UserError(
                f"{self.source.path}: {readable} of {len(trained)} identities have a readable "
                f"image; 2 to train on are needed{self._reasons()}"
            )
        for shard in self.written:
            if not len(shard.labels):
                raise UserError(
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
        lines = b"".join(
            os.fsencode(f"{where.translate(_ONE_FIELD)}\t{why.translate(_ONE_FIELD)}\n")
            for where, why in self.skipped
        )
        (self.directory / "skipped.txt").write_bytes(lines)
        no_face = sum(why in ("no face found", "no landmarks") for _, why in self.skipped)
        without = {"without_face": no_face} if self.options.align else {}
        if other_size := sum(is_size_fault(why) for _, why in self.skipped):
            without["other_size"] = other_size
        return {"count": len(self.skipped), "file": "skipped.txt", **without}


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
