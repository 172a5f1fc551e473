"""launch/bench/head.py as a person runs it, at a size of no meaning."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch.nn import functional as F

from launch.bench import head
from launch.bench.rivals import RIVALS, Softmax
from launch.bench.sides import Case, batch_of
from tests.conftest import command

SCRIPT = "launch/bench/head.py"
SMALL = ["--classes", 600, "--batch", 8, "--embedding-size", 32, "--pairs", 2, "--warmup", 1]


@pytest.mark.long
def test_a_case_on_two_processes():
    done = command(SCRIPT, *SMALL, "--sample-rate", 0.5)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["case"] == {
        "W": 2, "B": 8, "C": 600, "D": 32, "r": 0.5, "dtype": "fp32", "stored_mib": 64,
        "update_in_backward": False, "kernel": "plain",
    }  # fmt: skip
    assert min(report["ms"].values()) > 0 and set(report["ms"]) == {"ours", "rival", "floor"}
    for name in ("time / rival", "time / floor"):
        assert report["median_ratio"][name] > 0
    assert min(report["peak_bytes"].values()) > 0 and report["products"] in (3, 4)
    assert report["forms"] == {} and report["left_out"] == {}
    assert report["taken"] == {"ours": "plain"}


def test_a_form_takes_its_turns_or_is_said_to_be_left_out():
    """In Triton's interpreter, and without it."""
    wanted = ["--forms", "triton", "--alone", "--processes", 1, "--dtype", "bf16"]
    for interpreting in (True, False):
        environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreting))}
        done = command(SCRIPT, *SMALL, *wanted, env=environment | {"CUDA_VISIBLE_DEVICES": ""})
        report = json.loads(done.stdout.splitlines()[-1])
        assert ("triton" in report["ms"]) is ("triton" in report["forms"]) is interpreting
        if interpreting:
            assert report["taken"] == {"ours": "plain", "triton": "triton-128x128"}
            assert set(report["forms"]["triton"]) == {"time / ours"}
        else:
            assert "Triton is for GPUs" in report["left_out"]["triton"]


def test_a_size_alone_where_it_fits(capsys):
    wanted = [*map(str, SMALL), "--alone", "--storage", "auto", "--processes", "1"]
    assert head.main(wanted) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["ms"]) == {"ours"} and report["storage"] == "device"
    assert head.main([*wanted, "--classes", str(10**12)]) == 1
    assert "1000000000000 classes need" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, words, code",
    [
        (["--batch", 7, "--processes", 2], "batch 7: not divisible by 2", 1),
        (["--suite", "tpu"], "invalid choice", 2),
        (
            ["--kernel", "native", "--processes", 1],
            "--kernel native: head_kernel=native: the plain form is taken",
            1,
        ),
        (["--suite", "cpu"], "--classes is of one case", 2),
        (["--classes", 0], "--classes 0: at least 1", 2),
        (["--pairs", 0], "--pairs 0: at least 1", 2),
        (["--sample-rate", 2], "--sample-rate 2", 2),
        (["--rivals", "--sample-rate", 0.5], "--rivals: one process, all classes", 2),
        (["--plot", "growth.txt"], "--plot growth.txt: give a name that ends in .svg", 2),
    ],
)
def test_a_mistake_is_said(typed, words, code, capsys, monkeypatch):
    monkeypatch.setenv("CC", "false")
    try:
        ended = head.main(list(map(str, [*SMALL, *typed])))
    except SystemExit as exit:  # of argparse
        ended = exit.code
    assert ended == code and words in capsys.readouterr().err


@pytest.mark.long
def test_the_picture_of_growth(tmp_path):
    picture = tmp_path / "growth.svg"
    done = command(SCRIPT, *SMALL, "--plot", picture)
    points = json.loads(done.stdout.splitlines()[-1])["ms"]
    assert list(points["classes"])[0::6] == ["150", "9600"] and list(points["batch"])[0] == "2"
    assert list(points["processes"]) == ["1", "2"] and len(points["sample rate"]) == 5
    assert all(ms > 0 for panel in points.values() for ms in panel.values())
    assert picture.read_text().rstrip().endswith("</svg>")


def test_beside_the_rivals_that_run_here():
    """Each with time, memory and an error of fp32's size; the others say why they are left out."""
    report = json.loads(command(SCRIPT, *SMALL, "--rivals").stdout.splitlines()[-1])
    ran = {"ours", "eager", "torch"}
    assert ran <= report["peak_bytes"].keys() == report["error"].keys()
    assert report["ms"].keys() == {*report["error"], "floor"} and min(report["ms"].values()) > 0
    assert set(RIVALS) | {"ours"} == report["error"].keys() | report["left_out"].keys()
    for name, errors in report["error"].items():
        assert errors.keys() == {"loss", "grad_x", "grad_weight"}
        assert max(errors.values()) < 1e-4, name


def test_a_rival_that_ends_the_process_costs_the_libraries_only(monkeypatch):
    """The first comparison dies, and torch's own operations are compared without the others."""
    tried = []

    def together(world, device, function, told):
        tried.append(told.names)
        if set(told.names) - {"eager", "torch"}:
            raise OSError("compare: a process was killed")
        return {"left_out": {}, "ms": {"ours": 1.0}}

    monkeypatch.setattr(head, "run_on_ranks", together)
    found = head._beside_rivals(Case(50, 8, embedding_size=16), 1, 0, "cpu")
    assert tried == [tuple(RIVALS), ("eager", "torch")] and found["ms"] == {"ours": 1.0}
    assert found["left_out"].keys() == {"liger-kernel", "quack-kernels", "cut-cross-entropy"}
    assert "a process was killed" in found["left_out"]["liger-kernel"]


def test_a_rival_whose_gradient_is_wrong_has_an_error(monkeypatch):
    device = torch.device("cpu")
    case = Case(50, 8, embedding_size=16)
    monkeypatch.setitem(
        RIVALS, "wrong", lambda: lambda x, w, y: F.cross_entropy((x * 1.01) @ w.T, y)
    )
    found = {}
    for name in ("eager", "wrong"):
        side = Softmax(name, case, device)
        found[name] = side.error(*side.operands(*batch_of(case, 0, 1, device)))
    assert max(found["eager"].values()) < 1e-4 < min(found["wrong"].values())
