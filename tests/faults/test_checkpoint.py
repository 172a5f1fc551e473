"""The commands that read a run's checkpoints, through every single fault: no whole checkpoint is
called damaged, nothing of the run changes, and what is made from it is whole or absent."""

from __future__ import annotations

import pathlib
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
from tests.faults.shim import Worker
from tests.faults.test_training import Training

SCENES = ("verified", "exported", "merged")
_BLAME = ("damaged", "lacks", "neither a checkpoint", "not a complete")


class Checkpoint:
    """A run of two checkpoints under the worker's root, and what the commands make of it."""

    def __init__(self, worker: Worker, faces: pathlib.Path, directory: pathlib.Path) -> None:
        self.worker, self.directory, self.root = worker, directory, worker.root
        Training(worker, faces, directory).scene("resumed")
        self.run = directory / "resumed" / "run"

    def scene(self, name: str) -> Scene:
        template = self.directory / name
        shutil.copytree(self.run, template / "run")
        self._start(template)
        if name == "verified":
            return Scene("checkpoint", ["verify", self.root / "run"], template, self.judge_verdict)
        command = {"exported": ["export", "--centres"], "merged": ["merge"]}[name]
        self.arguments = [*command, self.root / "run", self.root / "out"]
        self._do()
        self.expected = below(files(self.root), "out")
        return Scene("checkpoint", self.arguments, template, self.judge)

    def judge_verdict(self, fault: Fault) -> list[str]:
        said = fault.outcome.said
        wrong = self._changes(fault)
        whole = said.count("every file is what was written")
        if fault.outcome.code == 0 and whole != 2:
            wrong.append(f"exit code 0, but {whole} of 2 checkpoints are said to be whole")
        return wrong

    def judge(self, fault: Fault) -> list[str]:
        wrong = self._changes(fault)
        now = _without_marker(below(fault.after, "out"))
        if now not in ({}, self.expected):
            wrong.append("OUT is there and not whole")
        if fault.outcome.code == 0 and now != self.expected:
            wrong.append(f"exit code 0, but {differences(now, self.expected)} differ")
        if not now:
            self._do(wrong)
            now = below(files(self.root), "out")
            if now != self.expected:
                wrong.append(f"after the next one {differences(now, self.expected)} differ")
            left = sorted(path.name for path in self.root.iterdir())
            if left != ["out", "run"]:
                wrong.append(f"left over: {left}")
        return wrong

    def _changes(self, fault: Fault) -> list[str]:
        """What is wrong with the run, or with what is said of it: it is whole all the time."""
        wrong = [f"the error says {word!r}" for word in _BLAME if word in fault.outcome.said]
        if changed := differences(below(fault.before, "run"), below(fault.after, "run")):
            wrong.append(f"the run's {changed} changed")
        return wrong

    def _start(self, template: pathlib.Path) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(template, self.root)

    def _do(self, wrong: list[str] | None = None) -> None:
        done = self.worker.run("checkpoint", *self.arguments)
        if wrong is None:
            assert done.code == 0, done.said
        elif done.code != 0:
            wrong.append(f"the next one fails: {done.said.splitlines()[-1:]}")


def _without_marker(found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in found.items() if path != partial_directory.MARKER}


@pytest.fixture
def checkpoint(faults_worker, faces_dir, tmp_path):
    return Checkpoint(faults_worker, faces_dir, tmp_path)


def test_a_fault_of_each_kind(faults_worker, checkpoint):
    seen: set[tuple[str, str]] = set()
    for name in SCENES:
        scene = checkpoint.scene(name)
        chosen = positions.one_of_a_kind(recorded(faults_worker, scene), seen)
        assert_survived(faults_worker, scene, chosen)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENES)
def test_every_fault(faults_worker, checkpoint, name):
    scene = checkpoint.scene(name)
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))
