"""launch/bench/head.py as a person runs it, at a size of no meaning."""

from __future__ import annotations

import json

import pytest

from tests.conftest import command, run

SCRIPT = "launch/bench/head.py"
SMALL = ["--classes", 600, "--batch", 8, "--embedding-size", 32, "--pairs", 2, "--warmup", 1]


def test_a_case_on_two_processes():
    done = command(SCRIPT, *SMALL, "--sample-rate", 0.5)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["case"] == {
        "W": 2, "B": 8, "C": 600, "D": 32, "r": 0.5, "dtype": "fp32", "stored_mib": 64,
        "update_in_backward": False,
    }  # fmt: skip
    assert min(report["ms"].values()) > 0 and set(report["ms"]) == {"ours", "rival", "floor"}
    for name in ("time / rival", "time / floor"):
        assert report["median_ratio"][name] > 0
    assert min(report["peak_bytes"].values()) > 0 and report["products"] in (3, 4)


@pytest.mark.parametrize(
    "typed, words, code",
    [
        (["--batch", 7, "--processes", 2], "batch 7: not divisible by 2", 1),
        (["--suite", "tpu"], "invalid choice", 2),
    ],
)
def test_a_mistake_is_said(typed, words, code):
    done = run(SCRIPT, *SMALL, *typed)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
