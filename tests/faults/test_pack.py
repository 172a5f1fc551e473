"""A pack through every single fault: the set is whole or absent, and finished shards stay."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest

from data_tools.common import partial_directory
from tests.faults import positions
from tests.faults.judging import (
    Fault,
    Scene,
    assert_survived,
    below,
    differences,
    files,
    recorded,
)
from tests.faults.shim import Position, Worker

SHARDS = 3
OPTIONS = ["--shards", SHARDS, "--workers", 1, "--hold-out", 2, "--pairs", 20]
SCENES = ("resumed", "new", "replaced")


class Pack:
    """Packs into OUT under the worker's root, and what is right afterwards."""

    def __init__(self, worker: Worker, faces: pathlib.Path, directory: pathlib.Path) -> None:
        self.worker, self.out = worker, worker.root / "set"
        self.faces, self.directory = faces, directory
        self.arguments: list[object] = ["pack", worker.root / "faces", self.out, *OPTIONS]
        self.expected = self._whole(self.arguments)
        self.former: dict[str, bytes] | None = None  # of the set that is to be replaced

    def scene(self, name: str) -> Scene:
        self._start()
        if name == "resumed":  # killed when two shards were finished
            kill = next(
                Position(call, "k", 0)
                for call in self.worker.run("pack", *self.arguments, record=True).calls
                if call.operation == "rename" and _finished(call.path) == 1
            )
            self._start()
            self.worker.run("pack", *self.arguments, position=kill)
            assert (self.worker.root / "set.partial").is_dir() and not self.out.exists()
        elif name == "replaced":
            self.former = self._whole([*self.arguments, "--seed", 1])
            self.arguments.append("--overwrite")
        template = self.directory / name
        shutil.copytree(self.worker.root, template)
        return Scene("pack", self.arguments, template, self.judge)

    def judge(self, fault: Fault) -> list[str]:
        wrong = []
        now = _whole_part(below(fault.after, "set"))
        if fault.outcome.code == 0 and differences(now, self.expected):
            wrong.append(f"exit code 0, but {differences(now, self.expected)} differ")
        if now not in ({}, self.expected, self.former):
            wrong.append("OUT is there and not whole")
        replaced = _whole_part(below(fault.after, "set.replaced"))
        if self.former and self.former not in (now, replaced):
            if now != self.expected:
                wrong.append("the former set is gone before the new one has its name")
        kept = {}
        for shard in self._finished_before(fault):
            place = self._place(shard)
            if place is None:
                wrong.append(f"finished shard {shard} is gone")
            else:
                kept[shard] = _identity(place)
        if fault.after == fault.before:
            return wrong  # the next run would be the undisturbed one
        again = self.worker.run("pack", *self.arguments)
        if again.code != 0:
            return [*wrong, f"the next run fails: {again.said.splitlines()[-1:]}"]
        now = below(files(self.worker.root), "set")
        if differences(now, self.expected):
            wrong.append(f"after the next run {differences(now, self.expected)} differ")
        if now not in ({}, self.expected) or self.former is None:
            for shard, identity in kept.items():
                if _identity(self.out / f"{shard}.rec") != identity:
                    wrong.append(f"finished shard {shard} was written again")
        left = sorted(path.name for path in self.worker.root.iterdir())
        left = [name for name in left if name != ".set.lock"]  # it says who had it last
        if left != ["faces", "set"]:
            wrong.append(f"left over: {left}")
        return wrong

    def _finished_before(self, fault: Fault) -> set[str]:
        """Shards that were in the journal when the fault came."""
        position, (*_, made_before) = fault.position, fault.outcome
        calls = [*made_before, position.call] if position.action == "k" else made_before
        names = {f"train-{n:05d}-of-{SHARDS:05d}" for n in range(SHARDS)}
        if any(call.operation == "rmdir" and call.path.endswith("journal") for call in calls):
            return set()  # the set was whole then
        there = {
            path for path in fault.before if path.startswith("set.partial/") and "journal" in path
        }
        there |= {call.path for call in calls if call.operation == "rename"}
        return {name for name in names for path in there if _is_entry(path, name)}

    def _place(self, shard: str) -> pathlib.Path | None:
        for directory in ("set.partial", "set"):
            if (path := self.worker.root / directory / f"{shard}.rec").exists():
                return path
        return None

    def _start(self) -> None:
        shutil.rmtree(self.worker.root)
        self.worker.root.mkdir()
        shutil.copytree(self.faces, self.worker.root / "faces")

    def _whole(self, arguments: list[object]) -> dict[str, bytes]:
        self._start()
        assert self.worker.run("pack", *arguments).code == 0
        return below(files(self.worker.root), "set")


def _whole_part(found: dict[str, bytes]) -> dict[str, bytes]:
    """A set without the marker and the journal, which the next pack clears from a complete one."""
    return {
        path: content
        for path, content in found.items()
        if path != partial_directory.MARKER and not path.startswith("journal/")
    }


def _is_entry(path: str, shard: str) -> bool:
    return "journal" in path and pathlib.Path(path).name == f"{shard}.npz"


def _finished(path: str) -> int | None:
    """The number of the shard that this name in the journal says is finished."""
    found = re.search(r"journal/train-(\d+)-of-\d+\.npz$", path)
    return int(found[1]) if found else None


def _identity(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@pytest.fixture
def pack(faults_worker, faces_dir, tmp_path):
    return Pack(faults_worker, faces_dir, tmp_path)


def test_a_fault_of_each_kind(faults_worker, pack):
    seen: set[tuple[str, str]] = set()
    for name in SCENES:
        scene = pack.scene(name)
        chosen = positions.one_of_a_kind(recorded(faults_worker, scene), seen)
        assert_survived(faults_worker, scene, chosen)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENES)
def test_every_fault(faults_worker, pack, name):
    scene = pack.scene(name)
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))
