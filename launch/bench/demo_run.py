"""A run of launch/configs/demo.py with overrides, for benchmarks that compare trainings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def train(
    shards: Path, run: Path, overrides: Sequence[str], processes: int = 2
) -> tuple[float, float, float]:
    """Accuracy on held-out people before training, after it, and its deviation over the folds.

    A run that is complete is not trained again.

    Raises:
        RuntimeError: the run failed, with its last lines.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "launch/train.py", "launch/configs/demo.py",
        f"rec={shards.resolve()}", "val_targets=heldout", f"output={run.resolve()}",
        "verify_every=100000", "checkpoint_every=100000", *overrides,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        raise RuntimeError("; ".join(errors or done.stderr.splitlines()[-3:]))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (r["verification"]["heldout"] for r in records if "verification" in r)
    return first["accuracy_mean"], last["accuracy_mean"], last["accuracy_std"]
