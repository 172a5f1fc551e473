"""launch/train.py as a person runs it: real torchrun, one to four agents, and its errors."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from data_tools import shards
from data_tools.recordio import Header, Writer
from tests.conftest import command, run

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / "launch" / "configs" / "demo.py"
SMALL = ["global_batch_size=12", "max_steps=4", "log_every=1", "embedding_size=32", "val_targets="]
TORCHRUN = ["-m", "torch.distributed.run"]


def steps(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def test_one_process_without_torchrun(shards_dir, tmp_path):
    output = tmp_path / "r"
    done = command(
        "launch/train.py", DEMO, f"rec={shards_dir}", f"output={output}", *SMALL, "--json"
    )
    assert "step 4/4" in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["output"], last["step"], last["verification"]) == (str(output), 4, {})
    assert [r["step"] for r in steps(tmp_path / "r")] == [1, 2, 3, 4]


def test_torchrun_continues_at_another_world_size(shards_dir, tmp_path):
    arguments = ["launch/train.py", DEMO, f"rec={shards_dir}", f"output={tmp_path / 'r'}", *SMALL]
    command(*TORCHRUN, "--standalone", "--nproc-per-node", 2, *arguments)
    done = command(*TORCHRUN, "--standalone", "--nproc-per-node", 3, *arguments, "max_steps=6")
    assert "continues" in done.stdout
    assert [r["step"] for r in steps(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]
    again = command("launch/train.py", *arguments[1:], "max_steps=6")
    assert "already complete: 6 of 6 steps" in again.stdout and "step 5/6" not in again.stdout


def test_four_nodes(shards_dir, tmp_path):
    """Four agents of one process each on this host, meeting by c10d."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                sys.executable, *TORCHRUN, "--nnodes", "4", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
                "launch/train.py", str(DEMO), f"rec={shards_dir}", f"output={tmp_path / 'r'}",
                *SMALL,
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * 4, outputs
    assert len(steps(tmp_path / "r")) == 4
    found = os.listdir(tmp_path / "r" / "checkpoints" / "step-4")
    assert sum(name.startswith("rows-") for name in found) == 4


@pytest.mark.parametrize(
    "typed, words",
    [
        ("sample_rat=0.1", "did you mean sample_rate"),
        ("rec=/nowhere", "/nowhere"),
        ("val_targets=lfw", "heldout"),
        ("margin_args.margn=1", "did you mean margin"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(shards_dir, tmp_path, typed, words):
    done = run("launch/train.py", DEMO, f"rec={shards_dir}", f"output={tmp_path / 'r'}", typed)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_more_processes_than_classes(shards_dir, tmp_path):
    command("-m", "data_tools", "synthesize", tmp_path / "two", "--identities", 2, "--images", 4)
    command("-m", "data_tools", "pack", tmp_path / "two", tmp_path / "shards", "--shards", 1)
    done = run(
        *TORCHRUN, "--standalone", "--nproc-per-node", 3, "launch/train.py", DEMO,
        f"rec={tmp_path / 'shards'}", f"output={tmp_path / 'r'}", *SMALL,
    )  # fmt: skip
    assert done.returncode != 0
    assert "2 classes cannot be sharded over 3 ranks" in done.stderr


def test_a_label_out_of_range_stops_all_ranks(shards_dir, tmp_path):
    """An InsightFace directory whose property file promises fewer classes than the labels use."""
    with Writer(tmp_path / "train.idx", tmp_path / "train.rec") as writer:
        for key in range(32):
            payload = shards.open(shards_dir)[key][1]
            writer.write(key, Header(0, float(key % 9), key, 0), payload)
    (tmp_path / "property").write_text("8,112,112\n")
    done = run(
        *TORCHRUN, "--standalone", "--nproc-per-node", 2, "launch/train.py", DEMO,
        f"rec={tmp_path}", f"output={tmp_path / 'r'}", *SMALL,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error (rank 0): " in done.stderr and "the label 8.0 is" in done.stderr
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_bad_image_stops_all_ranks_and_is_named_on_one_line(shards_dir, tmp_path):
    """One record of the second shard is cut short: no rank hangs, the image is named."""
    copy = tmp_path / "shards"
    shutil.copytree(shards_dir, copy)
    rec = sorted(copy.glob("*.rec"))[1]
    content = bytearray(rec.read_bytes())
    for place in range(200, len(content), 97):
        content[place] = 0
    # Headers must stay readable: it is the images that are damaged.
    original = rec.read_bytes()
    offsets = [int(line.split()[1]) for line in rec.with_suffix(".idx").read_text().splitlines()]
    for offset in offsets:
        content[offset : offset + 40] = original[offset : offset + 40]
    rec.write_bytes(content)
    done = run(
        *TORCHRUN, "--standalone", "--nproc-per-node", 2, "launch/train.py", DEMO,
        f"rec={copy}", f"output={tmp_path / 'r'}", *SMALL, "global_batch_size=64",
    )  # fmt: skip
    assert done.returncode != 0
    own = [line for line in done.stderr.splitlines() if "cannot be decoded" in line]
    assert own and rec.name in own[0] and own[0].startswith("error (rank ")


def test_a_damaged_record_is_one_line(shards_dir, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards_dir, copy)
    rec = sorted(copy.glob("*.rec"))[0]
    offset = int(rec.with_suffix(".idx").read_text().split()[1])
    with open(rec, "r+b") as file:
        file.seek(offset + 32)  # behind the headers, where the image begins
        file.write(bytes(100))
    done = run(
        "launch/train.py", DEMO, f"rec={copy}", f"output={tmp_path / 'r'}", *SMALL,
        "global_batch_size=128",
    )  # fmt: skip
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error (rank 0): ") and "image 0" in done.stderr


def test_a_bug_keeps_its_traceback_and_leaves_it_in_the_run_directory(shards_dir, tmp_path):
    """A RuntimeError with gloo in its text, at world size 1: an error like any other."""
    bug = (
        "import sys, torch\n"
        "from recognition.run import trainer\n"
        "def broken(state, batch):\n"
        "    raise RuntimeError('/data/igloo/weights: nccl')\n"
        "trainer.take_step = broken\n"
        "from launch import train\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    output = tmp_path / "r"
    done = run("-c", bug, DEMO, f"rec={shards_dir}", f"output={output}", *SMALL)
    assert done.returncode == 1
    assert "lost contact" not in done.stderr
    for text in (done.stderr, (output / "error-rank-0.txt").read_text()):
        assert "in broken" in text and "RuntimeError: /data/igloo/weights: nccl" in text


def test_the_end_names_the_model_and_two_commands_that_work(shards_dir, tmp_path):
    output = tmp_path / "r"
    done = command(
        "launch/train.py", DEMO, f"rec={shards_dir}", f"output={output}", *SMALL,
        "val_targets=heldout", "verify_every=4",
    )  # fmt: skip
    *_, where, evaluate, export = done.stdout.splitlines()
    assert f"{output}/checkpoints/step-4" in where
    assert "of 40 pairs" in done.stdout and "standard deviation over ten folds" in done.stdout
    for line in (evaluate, export):
        python, *arguments = shlex.split(line)
        assert python == "python"
        command(*arguments)
    assert (output / "model.onnx").exists()


def assert_no_worker_left(output):
    deadline = time.time() + 20
    while subprocess.run(["pgrep", "-f", str(output)], capture_output=True).stdout:
        assert time.time() < deadline, "a process of the run is still there"
        time.sleep(0.2)


def test_a_killed_agent_takes_its_ranks_with_it(shards_dir, tmp_path):
    output = tmp_path / "r"
    agent = subprocess.Popen(
        [
            sys.executable, *TORCHRUN, "--standalone", "--nproc-per-node", "2", "launch/train.py",
            str(DEMO), f"rec={shards_dir}", f"output={output}", *SMALL, "max_steps=100000",
        ],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (output / "metrics.jsonl").exists():
        assert time.time() < deadline and agent.poll() is None
        time.sleep(0.2)
    agent.kill()
    agent.wait()
    assert_no_worker_left(output)


def test_a_world_size_without_a_rank_is_one_process(shards_dir, tmp_path):
    """Left over in the environment by some other tool: no wait for ranks that nobody starts."""
    environment = {**os.environ, "WORLD_SIZE": "2"}
    arguments = ["launch/train.py", DEMO, f"rec={shards_dir}", f"output={tmp_path / 'r'}", *SMALL]
    assert "step 4/4" in command(*arguments, env=environment, timeout=60).stdout


@pytest.mark.long
def test_a_killed_rank_takes_the_others_with_it(shards_dir, tmp_path):
    """And the run continues from its checkpoint afterwards."""
    output = tmp_path / "r"
    arguments = [
        *TORCHRUN, "--standalone", "--nproc-per-node", "2", "launch/train.py", str(DEMO),
        f"rec={shards_dir}", f"output={output}", *SMALL, "max_steps=100000", "checkpoint_every=2",
    ]  # fmt: skip
    agent = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 120
    while not list(output.glob("checkpoints/step-*/manifest.json")):
        assert time.time() < deadline and agent.poll() is None
        time.sleep(0.2)
    workers = subprocess.run(
        ["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    assert agent.wait(timeout=60) != 0
    assert_no_worker_left(output)
    last = max(int(p.parent.name[5:]) for p in output.glob("checkpoints/step-*/manifest.json"))
    done = command(*arguments[:-2], f"max_steps={last + 2}")
    assert f"step {last + 2}/{last + 2}" in done.stdout
    assert f"step {last}/" not in done.stdout


@pytest.mark.long
def test_kills_at_any_moment_lose_nothing(shards_dir, tmp_path):
    """A run killed ten times, during saves too, ends in the bits of the undisturbed one."""
    arguments = ["launch/train.py", DEMO, f"rec={shards_dir}", *SMALL]
    arguments += ["max_steps=60", "checkpoint_every=1", "precision=fp32"]
    command(*arguments, f"output={tmp_path / 'whole'}")
    disturbed = [sys.executable, *map(str, arguments), f"output={tmp_path / 'killed'}"]
    draw = random.Random(1)
    for _ in range(10):
        process = subprocess.Popen(
            disturbed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(4 + 4 * draw.random())
        process.kill()
        process.wait()
    command(*disturbed[1:])
    for name in ("model.safetensors", "optimizer.safetensors", "rows-0-16.safetensors"):
        whole, killed = (
            (tmp_path / run_dir / "checkpoints" / "step-60" / name).read_bytes()
            for run_dir in ("whole", "killed")
        )
        assert whole == killed, name
    assert [r["loss"] for r in steps(tmp_path / "whole")] == [
        r["loss"] for r in steps(tmp_path / "killed")
    ]
