"""The benchmark of checkpoints, on a state that is too small to say anything."""

from __future__ import annotations

import json
import sys

import pytest

from launch.bench import checkpoint
from tests.conftest import command


def test_it_measures_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *words(tmp_path)])
    checkpoint.main()
    judge(json.loads(capsys.readouterr().out.splitlines()[-1]), tmp_path, processes=1)


@pytest.mark.long
def test_it_measures_on_two_processes_and_leaves_nothing(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    done = command(*torchrun, "launch/bench/checkpoint.py", *words(tmp_path))
    judge(json.loads(done.stdout.splitlines()[-1]), tmp_path, processes=2)


def words(directory):
    return [str(directory), "--gib", "0.02", "--rounds", "1"]


def judge(result, directory, processes):
    assert result["processes"] == processes and result["bytes"] > 0.019 * 2**30
    assert set(result["megabytes_per_second"]) == {"synchronous", "background", "dd"}
    assert (
        result["ratios"]["stall_of_synchronous"] > 0 and result["ratios"]["dd_of_synchronous"] > 0
    )
    assert not list(directory.iterdir())
