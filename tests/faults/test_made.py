"""Commands that make a directory out of another one, through every single fault: what they make is
whole or absent, and their source does not change."""

from __future__ import annotations

import pathlib
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
    recorded,
)
from tests.faults.shim import Worker
from tests.faults.test_training import Training

# name -> (command, arguments before the paths, source below the root, arguments after OUT)
SCENES: dict[str, tuple[str, list[object], str | None, list[object]]] = {
    "exported": ("checkpoint", ["export", "--centres"], "run", []),
    "merged": ("checkpoint", ["merge"], "run", []),
    "unpacked": ("pack", ["unpack"], "set", []),
    "unpacked for InsightFace": ("pack", ["unpack"], "set", ["--layout", "insightface"]),
    "synthesized": (
        "pack", ["synthesize"], None, ["--identities", 2, "--images", 2, "--workers", 1],
    ),
}  # fmt: skip


class Made:
    """A set and a run of two checkpoints under the worker's root, and what is made of them."""

    def __init__(self, worker: Worker, faces: pathlib.Path, directory: pathlib.Path) -> None:
        self.worker, self.directory, self.root = worker, directory, worker.root
        Training(worker, faces, directory).scene("resumed")
        self.sources = directory / "resumed"

    def scene(self, name: str) -> Scene:
        self.command, before, source, after = SCENES[name]
        template = self.directory / name.replace(" ", "-")
        template.mkdir()
        if source is not None:
            shutil.copytree(self.sources / source, template / source)
            before = [*before, self.root / source]
        self.source = source
        self.arguments = [*before, self.root / "out", *after]
        shutil.rmtree(self.root)
        shutil.copytree(template, self.root)
        done = self.worker.run(self.command, *self.arguments)
        assert done.code == 0, done.said
        self.expected = below(files(self.root), "out")
        return Scene(self.command, self.arguments, template, self.judge)

    def judge(self, fault: Fault) -> list[str]:
        wrong = []
        if any(fault.after.get(path) != content for path, content in fault.before.items()):
            wrong.append("the source has changed")
        if "damaged" in fault.outcome.said or "lacks" in fault.outcome.said:
            wrong.append("the source, which is whole, is called damaged")
        now = below(fault.after, "out")
        now.pop(partial_directory.MARKER, None)  # the directory has its name, and is whole
        if now not in ({}, self.expected):
            wrong.append("OUT is there and not whole")
        if fault.outcome.code == 0 and now != self.expected:
            wrong.append(f"exit code 0, but {differences(now, self.expected)} differ")
        return wrong if now or fault.known else wrong + self._after_the_next_run()

    def _after_the_next_run(self) -> list[str]:
        again = self.worker.run(self.command, *self.arguments)
        if again.code != 0:
            return [f"the next run fails: {again.said.splitlines()[-1:]}"]
        wrong = []
        if changed := differences(below(files(self.root), "out"), self.expected):
            wrong.append(f"after the next run {changed} differ")
        left = {path.name for path in self.root.iterdir()} - {"out", self.source}
        if left:
            wrong.append(f"left over: {sorted(left)}")
        return wrong


@pytest.fixture
def made(faults_worker, faces_dir, tmp_path):
    return Made(faults_worker, faces_dir, tmp_path)


@pytest.mark.timeout(1800)  # hundreds of runs: a busy machine needs more than the usual
def test_a_fault_of_each_kind(faults_worker, made):
    seen: set[tuple[str, str]] = set()
    for name in SCENES:
        scene = made.scene(name)
        assert_each_kind_survived(faults_worker, scene, seen)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENES)
def test_every_fault(faults_worker, made, name):
    scene = made.scene(name)
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))
