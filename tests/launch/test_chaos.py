"""Whatever is killed, flipped or filled: the run ends as the undisturbed one, and nobody helps it.

The only thing beside torchrun is what every cluster has, something that starts it again when it
ends by an error: here `until torchrun ...; do sleep 1; done`.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch

from recognition import replicas
from tests.launch.processes import ROOT, TINY, last_step, records, wait

# In a store that outlives an attempt, the next one meets the keys of the one before it.
ALONE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
EPOCH = 8  # steps: 128 images, 16 a step


class Supervised:
    """A run on `world` processes, started again until it succeeds."""

    def __init__(self, output: pathlib.Path, world: int, keys: list) -> None:
        self.output = output
        self.log = output.parent / f"{output.name}.log"
        train = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={world}", "--max-restarts=100", "launch/train.py", *TINY,
            f"output={output}", *keys,
        ]  # fmt: skip
        with open(self.log, "a") as log:
            self.loop = subprocess.Popen(
                ["bash", "-c", 'until "$@"; do sleep 1; done', "until", *train],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", **ALONE},
            )  # fmt: skip

    def processes(self) -> tuple[list[int], list[int]]:
        """Ids of torchrun and of the ranks, alive at this moment."""
        agents, ranks = [], []
        said = subprocess.run(["pgrep", "-f", str(self.output)], capture_output=True, text=True)
        for pid in map(int, said.stdout.split()):
            try:
                command = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if command[0] == sys.executable:
                (agents if "torch.distributed.run" in command else ranks).append(pid)
        return agents, ranks

    def kill_rank(self, draw: random.Random) -> None:
        _, ranks = self.processes()
        if ranks:
            _kill(draw.choice(ranks))

    def kill_agent(self, draw: random.Random) -> None:
        for agent in self.processes()[0]:
            _kill(agent)

    def wait_for(self, condition, seconds: float = 120) -> None:
        wait(lambda: condition() or self.loop.poll() is not None, seconds, self.log.read_text)

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (self.loop.pid,):
            try:
                os.killpg(number, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.loop.wait()
        for pid in sum(self.processes(), []):
            _kill(pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place])
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def in_save(run):
    return any((run.output / "checkpoints").glob("*.partial"))


def newest(output):
    manifests = output.glob("checkpoints/step-*/manifest.json")
    found = [p.parent for p in manifests if p.parent.name[5:].isdigit()]  # not those set aside
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def flip(run, draw):
    """One bit of the newest checkpoint changes; then a rank dies, so that it is read."""
    run.wait_for(lambda: newest(run.output) is not None)
    path = draw.choice(sorted(newest(run.output).glob("*.safetensors")))
    place = draw.randrange(path.stat().st_size)
    try:
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    except FileNotFoundError:
        pass  # a newer one has come
    run.kill_agent(draw)


def fill(disk, seconds):
    """No byte is left on the disk for a while."""
    filler = disk / "filler"
    try:
        with open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
    except OSError:
        pass
    time.sleep(seconds)
    filler.unlink()


def keys_for(shards_dir, max_steps, *more):
    return [
        f"rec={shards_dir}", "global_batch_size=16", f"max_steps={max_steps}",
        "checkpoint_every=6", "verify_every=12", "val_targets=heldout", "debug=true",
        "debug_every=25", "collective_timeout=60", *more,
    ]  # fmt: skip


def whole_run(output, world, keys):
    with Supervised(output, world, keys) as run:
        assert run.loop.wait(300) == 0
    return output


def assert_every_image_once_an_epoch(output, max_steps):
    steps = replicas.samples_of(str(output))
    assert list(steps) == list(range(1, max_steps + 1))
    for first in range(1, max_steps + 1 - EPOCH, EPOCH):
        ids = sum((steps[first + k] for k in range(EPOCH)), [])
        assert sorted(ids) == list(range(128)), f"steps from {first}"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_kills_flipped_bits_and_a_full_disk(shards_dir, small_disk, tmp_path):
    """On four processes, ending bit for bit as if nothing had been."""
    draw = random.Random(7)
    max_steps = 240
    kinds = ["rank", "agent", "save", "load", "evaluation"] * 4
    draw.shuffle(kinds)
    keys = keys_for(shards_dir, max_steps, "precision=fp32")
    whole = whole_run(tmp_path / "whole", 4, keys)
    done = []
    with Supervised(small_disk / "r", 4, keys) as run:
        for count, kind in enumerate(kinds):
            goal = last_step(run.output) + draw.randint(2, 7)
            run.wait_for(lambda: last_step(run.output) >= goal)  # noqa: B023
            assert run.loop.poll() is None, f"ended after {done}"
            if count in (6, 13):
                flip(run, draw)
                done.append("flip")
            if count == 10:
                fill(small_disk, 12)
                done.append("full disk")
            if kind == "save":
                run.wait_for(lambda: in_save(run))
            elif kind == "evaluation":
                run.wait_for(lambda: last_step(run.output) % 12 == 0)
            elif kind == "load":
                run.kill_rank(draw)
                time.sleep(1.5 + 3 * draw.random())
            (run.kill_agent if kind == "agent" else run.kill_rank)(draw)
            done.append(kind)
        assert run.loop.wait(300) == 0, run.log.read_text()[-4000:]
        text = run.log.read_text()
    counts = {
        words: text.count(words) for words in ("continues after", "it is now", "is not there")
    }
    print(done, counts)
    assert "it is now step-" in text  # a flipped bit was seen
    ends = [path / "checkpoints" / f"step-{max_steps}" for path in (whole, run.output)]
    names = sorted(p.name for p in ends[0].glob("*.safetensors"))
    assert len(names) >= 6
    for name in names:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert [(r["step"], r["loss"]) for r in records(whole)] == [
        (r["step"], r["loss"]) for r in records(run.output)
    ]
    assert_every_image_once_an_epoch(run.output, max_steps)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_with_another_number_of_processes_after_each(shards_dir, tmp_path):
    draw = random.Random(3)
    max_steps = 56
    keys = keys_for(shards_dir, max_steps, "precision=fp64", "sync_bn=true", "lr=0.02")
    whole = whole_run(tmp_path / "whole", 4, keys)
    output = tmp_path / "r"
    for world in (4, 3, 1, 2):
        with Supervised(output, world, keys) as run:
            goal = last_step(output) + draw.randint(7, 10)
            run.wait_for(lambda: last_step(output) >= goal)  # noqa: B023
            run.kill_rank(draw)
            time.sleep(draw.random())
            os.killpg(run.loop.pid, signal.SIGSTOP)  # the supervisor is gone as well
            run.kill_agent(draw)
    whole_run(output, 4, keys)
    a, b = (
        safetensors.torch.load_file(
            path / "checkpoints" / f"step-{max_steps}" / "model.safetensors"
        )
        for path in (whole, output)
    )
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a) < 1e-8
    losses = [[r["loss"] for r in records(path)] for path in (whole, output)]
    assert len(losses[0]) == len(losses[1]) == max_steps
    assert max(abs(x - y) for x, y in zip(*losses, strict=True)) < 1e-8
    assert_every_image_once_an_epoch(output, max_steps)
