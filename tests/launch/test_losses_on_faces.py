"""Every loss trained on real faces, same network, seed and steps: each must learn."""

from __future__ import annotations

import pytest

from launch.bench.train_losses import RUNS, train
from tests.conftest import command
from tests.real import real

STEPS, PAIRS = 150, 1000
LEAST_GAIN = 0.08  # of the accuracy; its deviation over 1000 pairs is 0.015 before training


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """900 people to train on, 284 others to verify."""
    out = tmp_path_factory.mktemp("lfw") / "shards"
    command(
        "-m", "data_tools", "pack", real("lfw112"), out, "--hold-out", 284, "--pairs", PAIRS,
    )  # fmt: skip
    return out


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_learns(name, shards, tmp_path):
    before, after, _ = train(shards, tmp_path, name, STEPS)
    print(f"| {name} | {100 * before:.2f} | {100 * after:.2f} |")
    assert after > before + LEAST_GAIN
