"""Real faces and records, where a machine has them beside the repository; the project has none."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"


def real(name: str) -> Path:
    """A path of the real data; the test is skipped where there is none."""
    path = REAL / name
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return path
