"""A disk that is slow for one rank delays the run and does not end it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.conftest import run
from tests.launch.processes import Run, records

_SECONDS = 16  # of one fsync; the ranks' own time-out is 10
_TIMEOUT = 10


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory) -> str:
    """The path of the built faults.c."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = pathlib.Path(__file__).with_name("faults.c")
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return str(library)


def test_a_linux_that_ties_no_process_to_its_launcher_is_said(preloaded):
    code = (
        "from recognition.distributed import runtime\n"
        "with runtime.start() as here: print(here.world)"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--no-python", sys.executable]
    done = run(
        *torchrun, "-c", code, env={**os.environ, "LD_PRELOAD": preloaded, "NO_PDEATHSIG": "1"}
    )
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
    assert "does not tie this process to its launcher (Operation not permitted)" in done.stderr


@pytest.mark.parametrize("part", ["rows-", "manifest"], ids=["rank 1's rows", "rank 0's manifest"])
def test_a_slow_fsync_ends_no_run(preloaded, shards_dir, tmp_path, part):
    """Longer than collective_timeout, in a save: by the thread of one rank, or between the ranks'
    two agreements."""
    output = tmp_path / "r"
    keys = [
        f"rec={shards_dir}", "global_batch_size=12", "max_steps=4", "checkpoint_every=2",
        f"collective_timeout={_TIMEOUT}",
    ]  # fmt: skip
    slow = {
        "LD_PRELOAD": preloaded,
        "SLOW_FSYNC": f"{_SECONDS}:{part}",
        "SLOW_RANK": "1" if part == "rows-" else "0",
    }
    torchrun = ["--standalone", "--nproc-per-node", 2]
    with Run(tmp_path / "log", output, torchrun, keys, env=slow) as training:
        assert training.agent.wait(200) == 0, training.text()
        text = training.text()
    assert "slow fsync begins" in text and "slow fsync ends" in text
    assert "Killed or frozen" not in text and "error (rank" not in text
    assert [record["step"] for record in records(output)] == [1, 2, 3, 4]
    assert (output / "checkpoints" / "step-4" / "manifest.json").exists()
    assert (output / "checkpoints" / "step-2" / "manifest.json").exists()
