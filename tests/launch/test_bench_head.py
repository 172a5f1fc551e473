"""launch/bench/head.py as a person runs it, at a size of no meaning."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.bench import head
from tests.conftest import command, run

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


def test_a_size_alone_where_it_fits():
    wanted = ["--alone", "--storage", "auto", "--processes", 1]
    report = json.loads(command(SCRIPT, *SMALL, *wanted).stdout.splitlines()[-1])
    assert set(report["ms"]) == {"ours"} and report["storage"] == "device"
    done = run(SCRIPT, *SMALL, *wanted, "--classes", 10**12)
    assert done.returncode == 1 and "1000000000000 classes need" in done.stderr


@pytest.mark.parametrize(
    "typed, words, code",
    [
        (["--batch", 7, "--processes", 2], "batch 7: not divisible by 2", 1),
        (["--suite", "tpu"], "invalid choice", 2),
        (["--kernel", "native"], "--kernel native: head_kernel=native: the plain form is taken", 1),
        (["--suite", "cpu"], "--classes is of one case", 2),
        (["--classes", 0], "--classes 0: at least 1", 2),
        (["--pairs", 0], "--pairs 0: at least 1", 2),
        (["--sample-rate", 2], "--sample-rate 2", 2),
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


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_commands_for_a_gpu_run(tmp_path):
    """launch/bench/gpu.sh from end to end on the CPU, so that no command of it is misspelt."""
    done = subprocess.run(
        ["bash", "launch/bench/gpu.sh", tmp_path], capture_output=True, text=True, timeout=1100,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "REHEARSAL": "1", "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("head", "largest", "r50", "losses", "loader", "stages"):
        json.loads((tmp_path / f"{name}.json").read_text().splitlines()[-1])
    for name in ("bf16_cpu", "fp32_cpu", "bf16_dali"):
        lines = (tmp_path / f"r50_{name}" / "metrics.jsonl").read_text().splitlines()
        assert any("images_per_second" in line for line in lines)
