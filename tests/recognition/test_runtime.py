"""How a process of a run ends."""

import pytest

from tests.conftest import run
from tests.launch.processes import TINY

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
    ("command", "options"), [("preflight", ["--seconds", "1"]), ("train", ["max_steps=2"])]
)
def test_no_thread_of_a_group_outlives_it(shards_dir, tmp_path, command, options):
    ended = run(
        "-c", _COUNT.format(command=command), *TINY, f"rec={shards_dir}",
        f"output={tmp_path / 'run'}", *options,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    threads = ended.stdout.rpartition("threads at the end: ")[2].split()
    assert threads and not [name for name in threads if "gloo" in name]
