"""How a process of a run ends."""

import os
import signal

import pytest

from tests.conftest import run
from tests.launch.processes import TINY, Run, wait

# Registered before all other functions, so called after them: all that is left then is left for
# good, and a thread of gloo that still holds a tensor aborts the process.
_COUNT = """
import atexit, glob, sys
def left():
    names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
    print("threads at the end:", *names)
atexit.register(left)
from launch import {command}
sys.exit({command}.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "options"),
    [
        pytest.param("preflight", ["--seconds", "1"], marks=pytest.mark.long),
        ("train", ["max_steps=2"]),
    ],
)
def test_no_thread_of_a_group_outlives_it(shards_dir, tmp_path, command, options):
    ended = run(
        "-c", _COUNT.format(command=command), *TINY, f"rec={shards_dir}",
        f"output={tmp_path / 'run'}", *options,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    threads = ended.stdout.rpartition("threads at the end: ")[2].split()
    assert threads and not [name for name in threads if "gloo" in name]


@pytest.mark.long
def test_restarts_share_torchruns_store(shards_dir, tmp_path):
    """As it is by default; two ranks are killed, one after the other."""
    torchrun = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 2]
    keys = [
        f"rec={shards_dir}", "global_batch_size=12", "max_steps=400", "checkpoint_every=5",
    ]  # fmt: skip
    output = tmp_path / "r"
    with Run(tmp_path / "log", output, torchrun, keys) as run:
        for count in (1, 2):
            run.wait_for_step(run.step() + 8)
            os.kill(run.workers()[1], signal.SIGKILL)
            wait(lambda: run.text().count("continues after") == count, 60, run.text)  # noqa: B023
        run.wait_for_step(run.step() + 2)
        assert run.agent.poll() is None, run.text()
