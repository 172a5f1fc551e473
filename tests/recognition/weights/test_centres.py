"""The class centres of a checkpoint, where its files are not what they should be."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from recognition import checkpoint
from recognition.weights.centres import Centres
from tests import ranks
from tests.recognition import runs


@pytest.fixture(scope="module")
def run_dir(shards_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("centres") / "run"
    ranks.run(2, runs.run, {"rec": str(shards_dir), "precision": "fp32", "output": str(output)}, 1)
    return output


def rows(path: pathlib.Path, *shape: int, name: str = "weight") -> None:
    save_file({name: np.ones(shape, np.float32)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "is damaged"),
        (lambda path: rows(path, 8, 32, name="bias"), "is damaged"),
        (lambda path: rows(path, 8, 16), r"have the shape \[8, 16\]"),
        (lambda path: rows(path, 5, 32), r"with shape \[5, 32\]"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["cut", "html", "other tensors", "shorter rows", "fewer rows", "absent"],
)
def test_a_damaged_file_is_named(run_dir, damage, words):
    (path,) = run_dir.glob("checkpoints/*/rows-8-16.safetensors")
    whole = path.read_bytes()
    try:
        centres = Centres(run_dir)
        assert centres.rows(0, 16).shape == (16, 1, 32)
        damage(path)
        with pytest.raises(OSError, match=words) as failure:
            centres.rows(0, 16)
        assert str(path) in str(failure.value)
        kinds = FileNotFoundError if "No such" in words else checkpoint.Damaged
        assert isinstance(failure.value, kinds)
        assert centres.rows(0, 8).shape == (8, 1, 32)
    finally:
        path.write_bytes(whole)
