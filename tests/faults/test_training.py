"""A training through every single fault: the newest complete checkpoint is found, or an error names
the path; nothing complete is removed, and no run begins anew where there is one."""

from __future__ import annotations

import json
import pathlib
import re
import shutil

import pytest

from tests.faults import positions
from tests.faults.judging import (
    Fault,
    Scene,
    assert_each_kind_survived,
    assert_survived,
    below,
    complete_checkpoints,
    differences,
    files,
    recorded,
)
from tests.faults.shim import ROOT, Worker

# A save and a load, a start from nothing, and starts from the network of another run and from a
# file of weights.
SCENES = ("resumed", "new", "from a run", "from a file")
_SOURCES = {"from a run": "former", "from a file": "released/model.safetensors"}


class Training:
    """Trains into `run` under the worker's root, and what is right afterwards."""

    def __init__(self, worker: Worker, faces: pathlib.Path, directory: pathlib.Path) -> None:
        self.worker, self.directory = worker, directory
        shutil.rmtree(worker.root)
        worker.root.mkdir()
        assert worker.run("pack", "pack", faces, worker.root / "set", "--shards", 2).code == 0
        self.packed = directory / "set"
        shutil.copytree(worker.root / "set", self.packed)
        self.source: str | None = None  # what init_from= names, below the root

    def arguments(self, steps: int) -> list[object]:
        root = self.worker.root
        return [
            ROOT / "launch" / "configs" / "demo.py", f"rec={root / 'set'}",
            f"output={root / 'run'}", "val_targets=", "embedding_size=16", "log_every=1",
            "num_workers=1", "preflight_seconds=0", "global_batch_size=4", "checkpoint_every=1",
            "keep_checkpoints=2", "head_kernel=plain", f"max_steps={steps}",
            *([f"init_from={root / self.source}"] if self.source else []),
        ]  # fmt: skip

    def scene(self, name: str) -> Scene:
        starts = name == "new" or name in _SOURCES
        self.steps = 1 if starts else 3
        self.had = 0 if starts else 2  # step of the newest checkpoint before the fault
        self.source = _SOURCES.get(name)
        self._start()
        if self.had:
            self.train(self.had)
        template = self.directory / name.replace(" ", "-")
        shutil.copytree(self.worker.root, template)
        self.train(self.steps)
        found = files(self.worker.root)
        self.expected = below(found, f"run/checkpoints/step-{self.steps}")
        return Scene("train", self.arguments(self.steps), template, self.judge)

    def train(self, steps: int) -> None:
        done = self.worker.run("train", *self.arguments(steps))
        assert done.code == 0, done.said

    def judge(self, fault: Fault) -> list[str]:
        wrong = self._wrong_checkpoints(fault)
        if self.had and re.search(r"^step [12]/", fault.outcome.said, re.MULTILINE):
            wrong.append("a step that is saved was done again")
        if self.source and below(fault.after, "former") != below(fault.before, "former"):
            wrong.append("the run that this one starts from has changed")
        metrics = fault.before.get("run/metrics.jsonl", b"")
        if not fault.after.get("run/metrics.jsonl", b"").startswith(metrics):
            wrong.append("metrics.jsonl has lost what it had")
        if fault.known:
            return wrong
        again = self.worker.run("train", *self.arguments(self.steps))
        if again.code != 0:
            return [*wrong, f"the next run fails: {again.said.splitlines()[-1:]}"]
        if self.had and re.search(r"^step [12]/", again.said, re.MULTILINE):
            wrong.append("the next run does a step again that is saved")
        found = files(self.worker.root)
        if changed := self._differences(found):
            wrong.append(f"after the next run {changed} differ")
        steps = [json.loads(line)["step"] for line in found["run/metrics.jsonl"].splitlines()]
        if sorted(set(steps)) != list(range(1, self.steps + 1)):
            wrong.append(f"metrics.jsonl holds the steps {steps}")
        return wrong

    def _wrong_checkpoints(self, fault: Fault) -> list[str]:
        """What the fault did to the checkpoints: those that were complete stay as they were, until
        a newer one is complete."""
        wrong = []
        before = complete_checkpoints(fault.before, "run")
        after = complete_checkpoints(fault.after, "run")
        newest = max(after.values(), default=0)
        if newest < self.had:
            wrong.append(f"step {self.had} was complete, now there are {sorted(after)}")
        if any("damaged" in name for name in after):
            wrong.append(f"a complete checkpoint is called damaged: {sorted(after)}")
        for name, step in before.items():
            if name not in after and step not in after.values() and newest <= self.had:
                wrong.append(f"{name} is gone")
        if fault.outcome.code == 0 and fault.position.action != "k":
            if self.steps in after.values() and (changed := self._differences(fault.after)):
                wrong.append(f"exit code 0, but {changed} differ")
        return wrong

    def _differences(self, found: dict[str, bytes]) -> list[str]:
        """Files of the last checkpoint that are not those of an undisturbed run."""
        now = below(found, f"run/checkpoints/step-{self.steps}")
        return [path for path in differences(now, self.expected) if path != "manifest.json"]

    def _start(self) -> None:
        shutil.rmtree(self.worker.root)
        self.worker.root.mkdir()
        shutil.copytree(self.packed, self.worker.root / "set")
        if self.source:
            source, self.source = self.source, None
            self.train(2)
            (self.worker.root / "run").rename(self.worker.root / "former")
            made = self.worker.run(
                "checkpoint", "export", self.worker.root / "former", self.worker.root / "released"
            )
            assert made.code == 0, made.said
            self.source = source


@pytest.fixture
def training(faults_worker, faces_dir, tmp_path):
    return Training(faults_worker, faces_dir, tmp_path)


@pytest.mark.timeout(1800)  # many runs: a busy machine needs more than the usual
def test_a_fault_of_each_kind(faults_worker, training):
    """In a run that loads and saves."""
    scene = training.scene("resumed")
    assert_each_kind_survived(faults_worker, scene)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_fault_of_each_kind_in_any_scene(faults_worker, training):
    seen: set[tuple[str, str]] = set()
    for name in SCENES:
        if name == "new":
            continue  # what it does is in the others
        scene = training.scene(name)
        assert_each_kind_survived(faults_worker, scene, seen)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENES)
def test_every_fault(faults_worker, training, name):
    scene = training.scene(name)
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))


def test_a_slow_disk_ends_no_run(faults_worker, training):
    """Each file's last fsync takes longer than the ranks wait for a collective."""
    scene = training.scene("resumed")
    scene = scene._replace(arguments=[*scene.arguments, "collective_timeout=1"])
    chosen = positions.slow(recorded(faults_worker, scene), milliseconds=1500)
    assert_survived(faults_worker, scene, chosen[:1])
