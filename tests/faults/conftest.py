"""The worker that the tests of this room share, and small data for it."""

from __future__ import annotations

import pathlib
import shutil
import tempfile

import pytest

from tests.conftest import command
from tests.faults.shim import Worker

ENOUGH = 256 << 20  # bytes


@pytest.fixture(scope="session")
def faults_dir(tmp_path_factory):
    """A directory in memory where there is one: the tests write little and sync it often."""
    memory = pathlib.Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > ENOUGH:
        with tempfile.TemporaryDirectory(prefix="arcline-faults-", dir=memory) as directory:
            yield pathlib.Path(directory)
    else:
        yield tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def faults_worker(faults_library, faults_dir):
    worker = Worker(faults_library, faults_dir)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def faces_dir(tmp_path_factory):
    """Five generated people with five images each."""
    faces = tmp_path_factory.mktemp("people") / "faces"
    command("-m", "data_tools", "synthesize", faces, "--identities", 5, "--images", 5)
    return faces
