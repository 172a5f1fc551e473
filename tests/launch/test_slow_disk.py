"""A disk that is slow for one rank delays the run and does not end it."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from tests.conftest import run
from tests.faults.shim import Call, Position, environment
from tests.launch.processes import Run, records

_SECONDS = 16  # of one fsync; the ranks' own time-out is 10
_TIMEOUT = 10


def test_a_linux_that_ties_no_process_to_its_launcher_is_said(faults_library, tmp_path):
    refused = Position(Call("pdeathsig", "*", 0), "e", errno.EPERM)
    code = (
        "from recognition.distributed import runtime\n"
        "with runtime.start() as here: print(here.world)"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python", sys.executable]
    fault = environment(faults_library, tmp_path, refused)
    done = run(*torchrun, "-c", code, env={**os.environ, **fault})
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
    assert "does not tie this process to its launcher (Operation not permitted)" in done.stderr


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        pytest.param("1", "rows-*", id="rank 1's rows"),
        pytest.param("0", "*manifest*", id="rank 0's manifest", marks=pytest.mark.long),
    ],
)
def test_a_slow_fsync_ends_no_run(faults_library, shards_dir, tmp_path, rank, name):
    """Longer than collective_timeout, in a save: by the thread of one rank, or between the ranks'
    two agreements."""
    output = tmp_path / "r"
    keys = [
        f"rec={shards_dir}", "global_batch_size=12", "max_steps=4", "checkpoint_every=2",
        f"collective_timeout={_TIMEOUT}",
    ]  # fmt: skip
    slow = Position(Call("fsync", f"checkpoints/*/{name}", 1), "s", _SECONDS * 1000)
    calls = tmp_path / "calls"
    fault = environment(faults_library, output, slow, FAULTS_RANK=rank, FAULTS_LOG=str(calls))
    torchrun = ["--standalone", "--nproc-per-node", 2]
    with Run(tmp_path / "log", output, torchrun, keys, env=fault) as training:
        assert training.agent.wait(200) == 0, training.text()
        text = training.text()
    slept = [line for line in calls.read_text().splitlines() if line.startswith(("!", "~"))]
    assert [line[0] for line in slept] == ["!", "~"]  # it began, and it ended
    assert "Killed or frozen" not in text and "error (rank" not in text
    assert [record["step"] for record in records(output)] == [1, 2, 3, 4]
    assert (output / "checkpoints" / "step-4" / "manifest.json").exists()
    assert (output / "checkpoints" / "step-2" / "manifest.json").exists()
