"""Data sets of more shards than a process may have files open."""

import resource
import subprocess
import sys

import pytest

from data_tools.shard_writer import ShardWriter, write_shard
from tests.real import ROOT

SHARDS, LIMIT = 140, 96


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A sound set with an image in each of its shards."""
    out = tmp_path_factory.mktemp("many") / "set"
    with ShardWriter(out) as writer:
        written = [
            write_shard(
                writer.partial, f"train-{s:05d}-of-{SHARDS:05d}", [(s % 2, b"image %d" % s)]
            )
            for s in range(SHARDS)
        ]
        writer.finish(written, ["a", "b"], (112, 112), {})
    return out


def limited(hard, *arguments):
    """Run a program under `ulimit -Sn LIMIT`, and the hard limit given."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard)),
    )


READ = "import sys; from data_tools import shards; print(len(shards.open(sys.argv[1])))"


def test_the_soft_limit_is_raised_to_the_hard_one(many):
    done = limited(resource.getrlimit(resource.RLIMIT_NOFILE)[1], "-c", READ, str(many))
    assert (done.returncode, done.stdout) == (0, f"{SHARDS}\n"), done.stderr


def test_a_hard_limit_that_is_too_low_is_named_with_the_remedy(many):
    done = limited(LIMIT, "-c", READ, str(many))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"the limit of this process is {LIMIT}" in last and "ulimit -n" in last
    assert ".rec" in last and "fewer --shards" in last


@pytest.mark.parametrize("workers", ["1", "2"])
def test_verify_needs_few_files_at_once(many, workers):
    program = (
        "import sys; from data_tools import __main__; from data_tools.common import parallel; "
        "parallel.ITEMS_PER_WORKER = 1; "
        "sys.exit(__main__.main())"
    )
    done = limited(LIMIT, "-c", program, "verify", str(many), "--workers", workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{many}: {SHARDS} records, 0 faults"
