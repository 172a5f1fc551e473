"""An evaluation through every single fault: the same numbers, or an error that names the path; and
no result that a later report takes for whole."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest

from data_tools.common.errors import USER_ERRORS
from eval.report import results
from tests.faults import positions
from tests.faults.judging import Fault, Scene, assert_each_kind_survived, assert_survived, recorded
from tests.faults.shim import ROOT, Worker

# Embeddings taken from the cache, and computed: the result of another network is replaced. Then
# the page that shows both. The quick part does the first, which costs least.
SCENES = ("cached", "computed", "reported")

Numbers = dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]  # name -> (metrics, arrays)


class Evaluation:
    """Evaluates a run on a .bin and on a list of images under the worker's root."""

    def __init__(self, worker: Worker, faces: pathlib.Path, directory: pathlib.Path) -> None:
        self.worker, self.directory, self.root = worker, directory, worker.root
        self.page = self.root / "report.html"
        shutil.rmtree(self.root)
        shutil.copytree(faces, self.root / "faces")
        people = sorted(path.name for path in faces.iterdir() if path.is_dir())
        lines = [f"{p}/000{i}.jpg {p}/000{i + 1}.jpg 1" for p in people[:2] for i in range(3)]
        lines += [f"{p}/000{i}.jpg {people[-1]}/000{i}.jpg 0" for p in people[:2] for i in range(3)]
        (self.root / "list.txt").write_text("\n".join(lines) + "\n")
        packing = ["--shards", 2, "--hold-out", 2, "--pairs", 20]
        self._do("pack", "pack", faces, self.root / "set", *packing)
        self._do(
            "train", ROOT / "launch" / "configs" / "demo.py", f"rec={self.root / 'set'}",
            f"output={self.root / 'run'}", "val_targets=", "embedding_size=16", "num_workers=1",
            "preflight_seconds=0", "global_batch_size=4", "checkpoint_every=1", "max_steps=2",
        )  # fmt: skip
        self._make_templates()

    def arguments(self, model: str) -> list[object]:
        root = self.root
        return [
            "lfw", root / model, root / "set" / "heldout.bin",
            f"{root / 'list.txt'}:{root / 'faces'}", "--results", root / "results",
            "--cache", root / "cache", "--no-contract-check", "--json",
        ]  # fmt: skip

    def report(self) -> None:
        self._do("eval", "report", self.root / "results", "--out", self.page)

    def scene(self, name: str) -> Scene:
        """The results of step 1 lie there, and a report of them; step 2 takes their place."""
        template = self.directory / name
        if name == "reported":
            arguments: list[object] = ["report", self.root / "results", "--out", self.page]
            return Scene("eval", arguments, template, self.judge_report)
        return Scene("eval", self.arguments("run"), template, self.judge)

    def _make_templates(self) -> None:
        """A directory for each scene, and what is right before and after it."""
        cached, computed, reported = (self.directory / name for name in SCENES)
        self._do("eval", *self.arguments("run/checkpoints/step-1"))
        self.report()
        self.former, self.former_page = self._numbers(), self._page()
        shutil.copytree(self.root, computed)
        self._do("eval", *self.arguments("run"))
        self.expected = self._numbers()
        shutil.copytree(self.root, reported)
        self.report()
        self.expected_page = self._page()
        assert not _equal(self.former, self.expected) and self.former_page != self.expected_page
        shutil.copytree(reported, cached)
        shutil.rmtree(cached / "results")
        shutil.copytree(computed / "results", cached / "results")

    def judge(self, fault: Fault) -> list[str]:
        wrong = []
        if fault.outcome.code == 0 and not self._said_numbers(fault.outcome.said):
            wrong.append("exit code 0, but other numbers are printed")
        try:
            found = self._numbers()
        except USER_ERRORS as error:
            found = None
            if fault.outcome.code == 0:
                wrong.append(f"exit code 0, but its results are refused: {error}")
        for name, own in (found or {}).items():
            allowed = [self.expected] if fault.outcome.code == 0 else [self.expected, self.former]
            if not any(_equal({name: own}, {name: each[name]}) for each in allowed):
                wrong.append(f"the result {name} is neither the former nor the new one")
        if fault.known:
            return wrong
        again = self.worker.run("eval", *self.arguments("run"))
        if again.code != 0:
            return [*wrong, f"the next run fails: {again.said.splitlines()[-1:]}"]
        if not self._said_numbers(again.said) or not _equal(self._numbers(), self.expected):
            wrong.append("the next run has other numbers")
        return wrong

    def judge_report(self, fault: Fault) -> list[str]:
        wrong = []
        for name, text in self._page().items():  # each takes its name alone
            former = [self.former_page[name]] * (fault.outcome.code != 0)
            if text not in [self.expected_page[name], *former]:
                wrong.append(f"{name} is neither the former nor the new one")
        if fault.known:
            return wrong
        again = self.worker.run("eval", "report", self.root / "results", "--out", self.page)
        if again.code != 0 or self._page() != self.expected_page:
            wrong.append(f"the next report is another one: {again.said.splitlines()[-1:]}")
        return wrong

    def _numbers(self) -> Numbers:
        return {
            result.name: (result.metrics, result.arrays)
            for result in results.load_all(self.root / "results")
        }

    def _page(self) -> dict[str, str]:
        """The report's files without the time in them."""
        time = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"
        paths = [self.page.with_suffix(suffix) for suffix in (".html", ".json", ".md")]
        return {path.name: re.sub(time, "", path.read_text()) for path in paths}

    def _said_numbers(self, said: str) -> bool:
        printed = json.loads(said.splitlines()[-1])["sets"]
        return printed == json.loads(json.dumps({n: m for n, (m, _) in self.expected.items()}))

    def _do(self, command: str, *arguments: object) -> None:
        done = self.worker.run(command, *arguments)
        assert done.code == 0, done.said


def _equal(one: Numbers, other: Numbers) -> bool:
    return one.keys() == other.keys() and all(
        one[name][0] == other[name][0]
        and one[name][1].keys() == other[name][1].keys()
        and all(np.array_equal(one[name][1][key], other[name][1][key]) for key in one[name][1])
        for name in one
    )


@pytest.fixture
def evaluation(faults_worker, faces_dir, tmp_path):
    return Evaluation(faults_worker, faces_dir, tmp_path)


@pytest.mark.timeout(1800)  # many runs: a busy machine needs more than the usual
def test_a_fault_of_each_kind(faults_worker, evaluation):
    scene = evaluation.scene("cached")
    assert_each_kind_survived(faults_worker, scene)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_fault_of_each_kind_in_any_scene(faults_worker, evaluation):
    seen: set[tuple[str, str]] = set()
    for name in SCENES:
        scene = evaluation.scene(name)
        assert_each_kind_survived(faults_worker, scene, seen)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENES)
def test_every_fault(faults_worker, evaluation, name):
    scene = evaluation.scene(name)
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))
