"""The benchmark of checkpoints, on a state that is too small to say anything."""

from __future__ import annotations

import json

from tests.conftest import command


def test_it_measures_on_two_processes_and_leaves_nothing(tmp_path):
    done = command(
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "launch/bench/checkpoint.py",
        tmp_path, "--gib", 0.02, "--rounds", 1,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["processes"] == 2 and result["bytes"] > 0.019 * 2**30
    assert set(result["megabytes_per_second"]) == {"synchronous", "background", "dd"}
    assert (
        result["ratios"]["stall_of_synchronous"] > 0 and result["ratios"]["dd_of_synchronous"] > 0
    )
    assert not list(tmp_path.iterdir())
