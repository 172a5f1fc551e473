"""A teacher many times the student's size, trained here: the student with it beats it alone."""

from __future__ import annotations

import pytest

from launch.bench.distill import compare, parameters
from tests.conftest import command

LEAST_GAIN = 0.05  # of the accuracy; the deviation of a student's over seeds is about 0.03


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_bigger_teacher_lifts_the_student(tmp_path):
    """The demo's data. The teacher takes some eight minutes of two cores, a student one or two."""
    command("-m", "data_tools", "synthesize", tmp_path / "faces",
            "--identities", 900, "--images", 20, timeout=900)  # fmt: skip
    command("-m", "data_tools", "pack", tmp_path / "faces", tmp_path / "shards",
            "--hold-out", 100, "--pairs", 1000, timeout=900)  # fmt: skip
    found = compare(tmp_path / "shards", tmp_path / "runs", seeds=2)
    assert parameters("r18") > 100 * parameters("mbf_tiny")
    for row in found["students"]:
        assert found["teacher"] > row["alone"] + LEAST_GAIN
        assert row["taught"] > row["alone"] + LEAST_GAIN
