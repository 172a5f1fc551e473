"""`checkpoint verify` through every single fault: no whole checkpoint is called damaged."""

from __future__ import annotations

import pytest

from tests.faults import positions
from tests.faults.judging import Fault, Scene, assert_each_kind_survived, assert_survived, recorded
from tests.faults.test_training import Training

_BLAME = ("damaged", "lacks", "neither a checkpoint", "not a complete")


def judge(fault: Fault) -> list[str]:
    said = fault.outcome.said
    wrong = [f"it says {word!r}" for word in _BLAME if word in said]
    whole = said.count("every file matches its hash")
    if fault.outcome.code == 0 and whole != 2:
        wrong.append(f"exit code 0, but {whole} of 2 checkpoints are reported as whole")
    if fault.after != fault.before:
        wrong.append("the run has changed")
    return wrong


@pytest.fixture
def scene(faults_worker, faces_dir, tmp_path):
    template = Training(faults_worker, faces_dir, tmp_path).scene("resumed").template
    return Scene("checkpoint", ["verify", faults_worker.root / "run"], template, judge)


@pytest.mark.timeout(1800)  # hundreds of runs: a busy machine needs more than the usual
def test_a_fault_of_each_kind(faults_worker, scene):
    assert_each_kind_survived(faults_worker, scene)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_fault(faults_worker, scene):
    assert_survived(faults_worker, scene, positions.every(recorded(faults_worker, scene)))
