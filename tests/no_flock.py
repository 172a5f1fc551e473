"""A preloaded library under which flock answers as on a file system without locks."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

_SOURCE = """
#include <errno.h>
#include <stdlib.h>
int flock(int descriptor, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


def without_flock(directory: pathlib.Path, error: int) -> dict[str, str]:
    """What the environment of a process needs so that its flock fails with this errno."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = directory / "no_flock.c", directory / "no_flock.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return {"LD_PRELOAD": str(library), "FLOCK_ERRNO": str(error)}
