"""Long: the real commands, and the faces that they make."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

from tests.conftest import command
from tests.real import real
from tests.recognition.inversion.cases import FEW, command_line, images_of, same


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command_survives_a_kill(trained, tmp_path):
    options = ["--count", "5", "--steps", "40", "--batch-size", "3", "--save-every", "5"]
    command(*command_line(trained[3], "--out", tmp_path / "whole", *options)[1:])
    line = command_line(trained[3], "--out", tmp_path / "broken", *options)
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state = tmp_path / "broken" / "state"
    deadline = time.monotonic() + 120
    while not list(state.glob("batch-00000-step-10.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "report.json").exists()
    command(*line[1:])
    assert same(tmp_path / "whole", tmp_path / "broken")
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "broken")]
    assert reports[0] == reports[1]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_torchrun_splits_the_batches(trained, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = ["-m", "recognition.inversion", trained[3], "--out", tmp_path / "out", *FEW]
    done = command(*torchrun, *line, "--count", 7, "--json")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["under_itself"]["images"] == 7 and len(images_of(tmp_path / "out")) == 7
    worlds = {json.loads(p.read_text())["world"] for p in (tmp_path / "out/state").glob("*.json")}
    assert worlds == {2}


def trained_network(shards, output, seed, steps):
    command(
        "launch/train.py", "launch/configs/demo.py", f"rec={shards}", f"output={output}",
        f"seed={seed}", f"max_steps={steps}", "global_batch_size=64", "val_targets=[]",
        "verify_every=10000", timeout=1200,
    )  # fmt: skip
    return output


def proved(tmp_path, shards, *more):
    """The report of 24 classes inverted in 120 steps, other of another seed."""
    own, other = (trained_network(shards, tmp_path / f"run-{seed}", seed, 150) for seed in (0, 7))
    options = ["--count", "24", "--batch-size", "24", "--steps", "120", "--clip"]
    for name, extra in (("out", ()), *more):
        line = command_line(
            own, "--out", tmp_path / name, "--other", other, "--fid", other, *options, *extra
        )
        command(*line[1:], timeout=1800)
    return [json.loads((tmp_path / n / "report.json").read_text()) for n, _ in (("out", 0), *more)]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_generated_faces_are_inverted_and_the_prior_is_why(tmp_path):
    """Identity rate >= 95 % under the network itself, >= 3 x chance under another; without the
    BatchNorm prior the Frechet distance and the statistics say that the images are worse."""
    command("-m", "data_tools", "synthesize", tmp_path / "f", "--identities", 100, "--images", 15)
    command("-m", "data_tools", "pack", tmp_path / "f", tmp_path / "shards")
    bare, without = proved(tmp_path, tmp_path / "shards", ("without", ("--bn-weight", "0")))
    assert bare["under_itself"]["identity_rate"] >= 0.95
    assert bare["under_others"][0]["times_chance"] >= 3
    assert (tmp_path / "out" / "grid.png").is_file()
    frechet = [report["fid"]["distance"] for report in (bare, without)]
    assert frechet[1] > frechet[0] > bare["fid"]["distance_of_as_many_real_images"]
    distances = [report["bn_distance"]["synthesised"] for report in (bare, without)]
    assert distances[1] > 3 * distances[0]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_real_faces_are_inverted(tmp_path):
    people = sorted(real("lfw112").iterdir())[:150]
    (tmp_path / "f").mkdir()
    for person in people:
        (tmp_path / "f" / person.name).symlink_to(person)
    command("-m", "data_tools", "pack", tmp_path / "f", tmp_path / "shards")
    (report,) = proved(tmp_path, tmp_path / "shards")
    assert report["under_itself"]["identity_rate"] >= 0.95
    assert report["under_others"][0]["times_chance"] >= 3
