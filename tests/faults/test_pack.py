"""A pack through every single fault: the set is whole or absent, and finished shards stay."""

from __future__ import annotations

import errno
import pathlib
import re
import shutil

import pytest

from data_tools.common import partial_directory
from tests.faults import positions
from tests.faults.judging import (
    Fault,
    Scene,
    assert_each_kind_survived,
    assert_survived,
    below,
    differences,
    files,
    prepare,
    recorded,
)
from tests.faults.shim import Call, Position, Worker

SHARDS = 3
OPTIONS = ["--shards", SHARDS, "--workers", 1, "--hold-out", 2, "--pairs", 20]
SCENES = ("resumed", "new", "replaced", "replaced and resumed")


class Pack:
    """Packs into OUT under the worker's root, and what is right afterwards."""

    def __init__(self, worker: Worker, faces: pathlib.Path, directory: pathlib.Path) -> None:
        self.worker, self.out = worker, worker.root / "set"
        self.faces, self.directory = faces, directory
        self.plain: list[object] = ["pack", worker.root / "faces", self.out, *OPTIONS]
        self.expected = self._whole(self.plain)

    def scene(self, name: str) -> Scene:
        self._start()
        self.former: dict[str, bytes] | None = None  # of the set that is to be replaced
        self.arguments = self.plain
        if "replaced" in name:
            self.arguments = [*self.plain, "--overwrite"]
            self.former = self._whole([*self.plain, "--seed", 1])
        if "resumed" in name:  # killed when two shards were finished
            before = self.directory / "before"
            shutil.copytree(self.worker.root, before)
            kill = next(
                Position(call, "k", 0)
                for call in self.worker.run("pack", *self.arguments, record=True).calls
                if call.operation == "rename" and _finished(call.path) == 1
            )
            shutil.rmtree(self.worker.root)
            shutil.move(before, self.worker.root)
            self.worker.run("pack", *self.arguments, position=kill)
            assert self._place(_name(1), complete=False)
        template = self.directory / name.replace(" ", "-")
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
        complete = now == self.expected
        kept = {}
        for shard in self._finished_before(fault):
            place = self._place(shard, complete)
            if place is None:
                wrong.append(f"finished shard {shard} is gone")
            else:
                kept[shard] = _identity(place)
        if fault.known:
            return wrong
        again = self.worker.run("pack", *self.arguments)
        if again.code != 0:
            return [*wrong, f"the next run fails: {again.said.splitlines()[-1:]}"]
        now = below(files(self.worker.root), "set")
        if differences(now, self.expected):
            wrong.append(f"after the next run {differences(now, self.expected)} differ")
        if self.former is None or not complete:  # --overwrite packs a complete set again
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
        names = {_name(number) for number in range(SHARDS)}
        if any(call.operation == "rmdir" and call.path.endswith("journal") for call in calls):
            return set()  # the set was whole then
        there = {
            path for path in fault.before if path.startswith("set.partial/") and "journal" in path
        }
        there |= {call.path for call in calls if call.operation == "rename"}
        return {name for name in names for path in there if _is_entry(path, name)}

    def _place(self, shard: str, complete: bool) -> pathlib.Path | None:
        """Where a finished shard lies; a set that is not the new one has others."""
        directory = "set" if complete else "set.partial"
        path = self.worker.root / directory / f"{shard}.rec"
        return path if path.exists() else None

    def _start(self) -> None:
        shutil.rmtree(self.worker.root)
        self.worker.root.mkdir()
        shutil.copytree(self.faces, self.worker.root / "faces")

    def _whole(self, arguments: list[object]) -> dict[str, bytes]:
        self._start()
        assert self.worker.run("pack", *arguments).code == 0
        return below(files(self.worker.root), "set")


def _name(shard: int) -> str:
    return f"train-{shard:05d}-of-{SHARDS:05d}"


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


@pytest.mark.timeout(1800)  # hundreds of runs: a busy machine needs more than the usual
def test_a_fault_of_each_kind(faults_worker, pack):
    seen: set[tuple[str, str]] = set()
    for name in SCENES:
        scene = pack.scene(name)
        assert_each_kind_survived(faults_worker, scene, seen)


def test_a_full_disk_says_how_to_go_on(faults_worker, pack):
    scene = pack.scene("resumed")
    prepare(faults_worker, scene)
    full = Position(Call("create", f"set.partial/{_name(2)}.rec", 1), "e", errno.ENOSPC)
    outcome = faults_worker.run(scene.command, *scene.arguments, position=full)
    assert outcome.code == 1 and re.search(
        r"No space left on device: '\S*set\.partial/train-00002-of-00003\.rec'; 2 of 3 shards that "
        r"are finished are kept in \S*set\.partial: the same command goes on from there; to start "
        r"afresh, remove that directory$",
        outcome.said,
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENES)
def test_every_fault(faults_worker, pack, name):
    scene = pack.scene(name)
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))
