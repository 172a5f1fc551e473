"""Loss and gradient norm of a short run against a file: a refactor changes no number.

python -m pytest tests/recognition/run/test_golden.py --renew-golden      writes the file anew
"""

from __future__ import annotations

import pathlib

import cv2
import numpy as np
import pytest

from data_tools.recordio import Header, Writer
from recognition import config
from recognition.run import build, trainer
from tests import ranks
from tests.recognition import runs

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "mbf_tiny_arcface_2_ranks_fp64.txt"


def write_noise(directory):
    """16 classes x 8 images of integer noise, as PNG: the same bytes on every processor."""
    draw = np.random.Generator(np.random.Philox(7))
    with Writer(directory / "train.idx", directory / "train.rec") as writer:
        for key in range(128):
            coarse = draw.integers(0, 256, (14, 14, 3), dtype=np.uint8)
            pixels = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
            png = cv2.imencode(".png", pixels)[1].tobytes()
            writer.write(key, Header(0, float(key % 16), key, 0), png)
    (directory / "property").write_text("16,112,112\n")


def test_a_short_run_gives_the_numbers_on_file(tmp_path, request):
    write_noise(tmp_path)
    keys = {
        "rec": str(tmp_path), "network": "mbf_tiny", "precision": "fp64", "margin": "arcface",
        "accumulation": 2, "global_batch_size": 16, "output": str(tmp_path / "run"),
    }  # fmt: skip
    got = ranks.run(2, curve, keys)[0]
    if request.config.getoption("--renew-golden"):
        lines = [f"{step} {loss:.12g} {norm:.12g}" for step, loss, norm in got]
        GOLDEN.write_text("step loss grad_norm\n" + "\n".join(lines) + "\n")
    expected = [line.split() for line in GOLDEN.read_text().splitlines()[1:]]
    assert [int(step) for step, *_ in expected] == [step for step, *_ in got]
    for (_, loss, norm), line in zip(got, expected, strict=True):
        # fp64 rounding, and what other kernels of another processor may add to it in six steps.
        assert loss == pytest.approx(float(line[1]), rel=1e-8)
        assert norm == pytest.approx(float(line[2]), rel=1e-7)


def curve(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    steps = []
    with trainer.make_loader(state) as loader:
        batches = iter(loader)
        for step in range(1, 7):
            loss, norm = trainer.take_step(state, batches)
            steps.append((step, loss.item(), norm.item()))
    return steps
