"""launch/slurm on a real SLURM of four nodes of one task each, on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.launch import slurm
from tests.launch.processes import ROOT, TINY, last_step, records, wait

BATCH = "launch/slurm/train.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    slurm.skip_without()
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(cluster, tmp_path, nodes, *keys, **environment):
    environment |= {
        "PYTHON": sys.executable, "LOGS": str(tmp_path / "logs"), "HEAD_ADDRESS": "127.0.0.1",
        "LOCAL_ADDRESS": "127.0.0.1", "LAST_CALL": "2",
    }  # fmt: skip
    said = cluster.run(
        "sbatch", "--parsable", f"--nodes={nodes}", f"--output={tmp_path}/batch.log",
        BATCH, *TINY, f"output={tmp_path / 'r'}", *keys,
        env=environment, cwd=ROOT, check=True,
    )  # fmt: skip
    return said.split(";")[0]


def logs(tmp_path):
    paths = [tmp_path / "batch.log", *sorted((tmp_path / "logs").glob("*.log"))]
    return "".join(f"--- {p.name}\n{p.read_text()}" for p in paths if p.exists())


def ended(cluster, job):
    return cluster.shown(job).get("JobState") in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


def workers(output):
    """Process ids of the ranks that write to `output`."""
    said = subprocess.run(
        ["pgrep", "-f", f"python.* launch/train.py .*{output}"], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in said if b"distributed.run" not in _command(pid)]


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b"distributed.run"


def test_a_job_of_two_nodes_finishes(cluster, shards_dir, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    job = submit(
        cluster, tmp_path, 2, f"rec={shards_dir}", "global_batch_size=12", "max_steps=4",
        SCRATCH_COPY=str(scratch),
    )  # fmt: skip
    wait(lambda: ended(cluster, job), 120, lambda: logs(tmp_path))
    assert cluster.shown(job)["JobState"] == "COMPLETED", logs(tmp_path)
    assert "finished" in (tmp_path / "batch.log").read_text()
    assert [record["step"] for record in records(tmp_path / "r")] == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == [
        "copy-0.log", "copy-1.log", "node-0.log", "node-1.log",
    ]  # fmt: skip
    assert str(scratch / "shards") in (tmp_path / "r" / "config.json").read_text()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_preempted_requeued_finished(cluster, shards_dir, tmp_path):
    """Four nodes of one task: a rank is killed, the job is asked to end and requeued, another job
    takes its nodes; it finishes with every step done once."""
    output = tmp_path / "r"
    job = submit(
        cluster, tmp_path, 4, f"rec={shards_dir}", "global_batch_size=12", "max_steps=400",
        "checkpoint_every=10", "precision=fp32",
    )  # fmt: skip
    wait(lambda: last_step(output) >= 12, 120, lambda: logs(tmp_path))

    os.kill(workers(output)[1], signal.SIGKILL)
    there = last_step(output)
    wait(lambda: last_step(output) >= there + 15, 120, lambda: logs(tmp_path))
    assert cluster.state(job) == "RUNNING" and cluster.shown(job)["Restarts"] == "0"

    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@... does
    wait(lambda: cluster.state(job) != "RUNNING", 90, lambda: logs(tmp_path))
    assert '"signal": "SIGUSR1"' in (tmp_path / "batch.log").read_text()
    stopped = last_step(output)
    cluster.start_requeued(job)
    wait(lambda: last_step(output) > stopped + 5, 120, lambda: logs(tmp_path))
    assert f"continues after step {stopped}" in logs(tmp_path)  # nothing was lost

    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive",
        f"--output={tmp_path}/urgent.log", "--wrap", "sleep 2", check=True,
    )  # fmt: skip
    wait(lambda: ended(cluster, urgent), 150, lambda: logs(tmp_path))
    assert int(cluster.shown(job)["Restarts"]) >= 2
    cluster.start_requeued(job)
    wait(lambda: ended(cluster, job), 200, lambda: logs(tmp_path))
    assert cluster.shown(job)["JobState"] == "COMPLETED", logs(tmp_path)
    assert [record["step"] for record in records(output)] == list(range(1, 401))
    print(logs(tmp_path))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_chain_packs_trains_evaluates_and_exports(cluster, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "data_tools", "synthesize", tmp_path / "faces", "--identities", "20",
         "--images", "8"], cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    said = cluster.run(
        "launch/slurm/chain.sh", tmp_path / "faces", tmp_path / "shards", *TINY[:1],
        f"output={tmp_path / 'r'}", "embedding_size=32", "global_batch_size=12", "max_steps=4",
        "val_targets=heldout",
        cwd=ROOT, check=True, env={
            "PYTHON": sys.executable, "HEAD_ADDRESS": "127.0.0.1", "LOCAL_ADDRESS": "127.0.0.1",
            "PACK_OPTIONS": "--hold-out 4 --pairs 40", "LOGS_DIR": str(tmp_path),
            "EVAL_SETS": "heldout.bin",
        },
    )  # fmt: skip
    jobs = [word.split("=")[1] for word in said.split() if "=" in word]
    assert len(jobs) == 4
    wait(lambda: all(ended(cluster, job) for job in jobs), 240, lambda: said + "".join(
        p.read_text() for p in sorted(tmp_path.glob("*.log"))))  # fmt: skip
    assert [cluster.shown(job)["JobState"] for job in jobs] == ["COMPLETED"] * 4, said
    assert (tmp_path / "r" / "model.onnx").exists() and list((tmp_path / "r" / "eval").iterdir())


@pytest.mark.long
@pytest.mark.timeout(400)
def test_an_array_packs_what_one_machine_packs(cluster, tmp_path):
    made = [sys.executable, "-m", "data_tools"]
    faces, out, one = tmp_path / "faces", tmp_path / "many", tmp_path / "one"
    for arguments in (
        ["synthesize", faces, "--identities", "20", "--images", "8"],
        ["pack", faces, one, "--shards", "5"],
    ):
        subprocess.run([*made, *arguments], cwd=ROOT, check=True, capture_output=True)
    said = cluster.run(
        "launch/slurm/pack_array.sh", "3", faces, out, "--shards", "5",
        cwd=ROOT, check=True, env={"PYTHON": sys.executable, "LOGS_DIR": str(tmp_path)},
    )  # fmt: skip
    finish = said.split("finish=")[1].split()[0]
    wait(lambda: ended(cluster, finish), 240, lambda: said + "".join(
        p.read_text() for p in sorted(tmp_path.glob("*.log"))))  # fmt: skip
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in one.iterdir()
    }
    assert len(list(tmp_path.glob("pack-[0-9]*-[123].log"))) == 3
