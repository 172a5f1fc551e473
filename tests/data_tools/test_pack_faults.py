"""Each single fault of a pack: what is finished is never lost, and the error names the path."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.data_tools.samples import folder
from tests.real import ROOT


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The preloaded library that injects the faults."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


@pytest.fixture
def work(tmp_path):
    """A directory, in memory where that can be: the packs here flush some thousand files."""
    memory = "/dev/shm"
    above = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=above) as path:
        yield Path(path)


def run(library, work, scenario, extent):
    source = folder(work / "faces", [5, 2, 7, 1, 4, 9, 3])
    program = [sys.executable, "-m", "tests.data_tools.faulty_packs"]
    done = subprocess.run(
        [*program, str(source), str(work / "work"), scenario, extent],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, *results = map(json.loads, done.stdout.splitlines())
    return first["first"], results


@pytest.mark.parametrize("scenario", ["resume", "overwrite"])
@pytest.mark.parametrize("extent", ["quick", pytest.param("whole", marks=pytest.mark.long)])
def test_every_single_fault(library, work, scenario, extent):
    """Three of six shards are finished; one call fails, or the process is killed after it."""
    first, results = run(library, work, scenario, extent)
    assert re.search(
        r"No space left on device: '.*set\.partial/train-00003-of-00006\.rec'; 3 of 6 shards that "
        r"are finished are kept in .*set\.partial: the same command goes on from there; to start "
        r"afresh, remove that directory$",
        first["error"],
    )
    ops = {result["op"] for result in results}
    assert ops >= {"stat", "open", "opendir", "read", "write", "fsync", "rename", "unlink"}
    assert any("killed" in result for result in results)
    for result in results:
        assert "bug" not in result, result["bug"]
        about = f"{result}"
        assert result["new"] or result["kept"], f"finished shards are lost: {about}"
        if scenario == "overwrite":
            assert result["new"] or result["old"], f"no complete set is left: {about}"
        if "error" in result:
            name = re.sub(r"^\.(.*)\.[^.]*-\*\.partial$", r"\1", Path(result["path"]).name)
            assert name in result["error"], f"the path is not named: {about}"
        assert result["then"].get("status") in ("resumed", "reused"), about
        assert result["same"], f"other bytes than an uninterrupted pack: {about}"
        assert set(result["left"]) <= {"set", "set.replaced"}, about
        if "set.replaced" in result["left"]:  # empty, as only then it has no marker
            assert result["op"] in ("rmdir", "unlink") and result["path"].startswith(".replaced")

    if scenario == "resume":  # one ESTALE on plan.json is not another plan
        plan = [
            result for result in results if result["path"].endswith("partial/journal/plan.json")
        ]
        for op in ("stat", "open", "read"):
            (result,) = (r for r in plan if (r["op"], r["errno"]) == (op, errno.ESTALE))
            assert "Stale file handle" in result["error"] and result["kept"]
            assert result["then"] == {"status": "resumed"}
