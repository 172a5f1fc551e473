"""Loss and gradient norm of a short run, step by step, against a file: a refactor changes no number.

python -m pytest tests/recognition/test_golden.py --renew-golden      writes the file anew
"""

from __future__ import annotations

import pathlib

import pytest

from recognition import build, config, trainer
from tests import ranks
from tests.recognition import runs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mbf_tiny_arcface_2_ranks_fp64.txt"


def test_a_short_run_gives_the_numbers_on_file(shards_dir, tmp_path, request):
    keys = {
        "rec": str(shards_dir), "precision": "fp64", "margin": "arcface", "accumulation": 2,
        "global_batch_size": 16, "output": str(tmp_path / "run"),
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
