"""Runs whose networks the tests of this folder invert."""

from __future__ import annotations

import pytest

from tests import ranks
from tests.recognition import runs


@pytest.fixture(scope="package")
def trained(shards_dir, tmp_path_factory):
    """A run on two processes, and another seed's."""
    made = {}
    for seed in (3, 4):
        made[seed] = str(tmp_path_factory.mktemp("inverted") / f"run-{seed}")
        keys = {"rec": str(shards_dir), "output": made[seed], "seed": seed, "max_steps": 2}
        ranks.run(2, runs.run, keys)
    return made
