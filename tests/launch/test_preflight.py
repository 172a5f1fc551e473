"""What preflight finds, on real processes, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest

from launch.preflight_checks import interfaces, links, machine
from recognition import config
from tests.conftest import command, run
from tests.launch.processes import TINY

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def test_it_says_what_it_saw(shards_dir, tmp_path):
    done = command(
        *TORCHRUN, "launch/preflight.py", TINY[0], f"rec={shards_dir}",
        f"output={tmp_path / 'not' / 'yet'}", "--json", "--seconds", 2,
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["world"], said["machines"], said["warnings"]) == (2, 1, [])
    assert min(said[key] for key in ("latency_seconds", "bytes_per_second")) > 0
    assert said["clock_spread_seconds"] >= 0
    for words in ("all-reduce", "clocks within", "lo 127.0.0.1", "GB free", "5 files"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_data_that_differs_between_machines_is_an_error(shards_dir, tmp_path, monkeypatch):
    """One byte in the middle of a shard of the same size."""
    other = tmp_path / "other"
    shutil.copytree(shards_dir, other)
    rec = sorted(other.glob("*.rec"))[0]
    content = bytearray(rec.read_bytes())
    content[len(content) // 2 + 5] ^= 1
    rec.write_bytes(content)
    said = [machine._data(config.make({"rec": str(path)}))[0] for path in (shards_dir, other)]
    assert said[0] != said[1] and said[0].split(",")[:2] == said[1].split(",")[:2]


def test_training_refuses_what_preflight_refuses(shards_dir, tmp_path):
    keys = [key for key in TINY if not key.startswith("preflight")]
    done = run(
        *TORCHRUN, "launch/train.py", *keys, f"rec={shards_dir}", "max_steps=1",
        "global_batch_size=12", f"output={tmp_path / 'r'}", "network=r18",
        "embedding_size=40000000",
    )  # fmt: skip
    assert done.returncode != 0
    assert "GB free and one checkpoint takes about" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("share, warned", [(0.05, True), (0.2, True), (0.5, False)])
def test_far_below_the_link(share, warned):
    link = interfaces.Interface("eth0", "10.0.0.1", 100_000)
    words = links.far_below(share * 100e9 / 8, link)
    assert bool(words) == warned
    assert not words or f"{100 * share:.0f} % of the 100 Gb/s of eth0" in words[0]


def test_the_interface_towards_a_host():
    assert interfaces.towards("127.0.0.1")[:2] == ("lo", "127.0.0.1")
    assert interfaces.towards("no.such.host.invalid").name == "?"
