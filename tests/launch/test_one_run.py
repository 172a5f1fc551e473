"""Two processes with one output on a file system without flock: the second names the first."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys

from tests.faults.shim import without_flock
from tests.launch.processes import ROOT, TINY, last_step, wait

_PACKING = """
import pathlib, sys
from data_tools.common.partial_directory import PartialDirectory
with PartialDirectory(pathlib.Path(sys.argv[1])) as aside:
    (aside.path / "mine").write_text("")
    print("held", flush=True)
    sys.stdin.read()
    assert (aside.path / "mine").exists()
    aside.rename()
"""


def test_a_second_training_ends_and_the_first_goes_on(faults_library, shards_dir, tmp_path):
    output = tmp_path / "r"
    environment = os.environ | without_flock(faults_library, tmp_path, errno.ENOLCK)
    command = [
        sys.executable, "launch/train.py", *TINY, f"output={output}", f"rec={shards_dir}",
        "global_batch_size=12", "max_steps=100000",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait(lambda: last_step(output) > 0 or first.poll() is not None, 120)
        second = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert second.returncode == 1
        who = f"is in use by another run: process {first.pid} on {socket.gethostname()}"
        assert who in second.stderr
        step = last_step(output)
        wait(lambda: last_step(output) > step, 120)
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 75
    finally:
        first.kill()
        first.wait()
    steps = [line for line in (output / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(steps) == last_step(output)  # of one process
    assert not (output / ".lock.holder").exists()


def test_a_second_pack_ends_and_the_first_goes_on(faults_library, tmp_path):
    """Whatever is made aside: here generated faces, over what another process is making."""
    environment = os.environ | without_flock(faults_library, tmp_path, errno.ENOLCK)
    out = tmp_path / "made" / "faces"
    first = subprocess.Popen(
        [sys.executable, "-c", _PACKING, str(out)], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert first.stdout.readline() == "held\n"
    second = subprocess.run(
        [sys.executable, "-m", "data_tools", "synthesize", str(out), "--identities", "1",
         "--images", "1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert second.returncode == 1
    assert f"another process is writing it: process {first.pid} on" in second.stderr
    first.communicate("", timeout=60)
    assert first.returncode == 0
    assert os.listdir(tmp_path / "made") == ["faces"] and os.listdir(out) == ["mine"]
