"""What several tests share: a small data set of generated faces, made once per run of the tests."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from tests import ranks
from tests.faults import shim

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests share the cores among processes
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in a shell's background; programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Embeddings that the tests make are kept in a directory of theirs, not in the user's."""
    os.environ["ARCLINE_CACHE"] = str(tmp_path_factory.mktemp("embeddings"))


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory):
    """16 generated people x 8 images in two shards, and heldout.bin of 4 people beside them."""
    root = tmp_path_factory.mktemp("faces")
    command("-m", "data_tools", "synthesize", root / "faces", "--identities", 20, "--images", 8)
    command(
        "-m", "data_tools", "pack", root / "faces", root / "shards", "--shards", 2,
        "--hold-out", 4, "--pairs", 40,
    )  # fmt: skip
    return root / "shards"


@pytest.fixture(scope="session")
def faults_library(tmp_path_factory):
    """The preloaded library that makes file-system calls fail."""
    return shim.build(tmp_path_factory.mktemp("library"))


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run this Python with `arguments`; its output on failure."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=options.pop("timeout", 240),
        cwd=pathlib.Path(__file__).parents[1], **options,
    )  # fmt: skip


def pytest_sessionfinish():
    ranks.close_all()


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="write tests/golden anew")
