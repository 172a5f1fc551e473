"""Whatever is killed, flipped or filled: the run ends as the undisturbed one, and nobody helps it.

The only thing beside torchrun is what every cluster has, something that starts it again when it
ends by an error: here `until torchrun ...; do sleep 1; done`.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch import chaos, ends
from tests.launch.processes import last_step, verified

BATCH = 16


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB for the checkpoints alone: what the run says of it lies elsewhere."""
    place = tmp_path / "r" / "checkpoints"
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place])
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def long_verification(shards_dir, tmp_path):
    """The shards beside many.bin, which takes a second or two to verify on."""
    rec = tmp_path / "shards"
    shutil.copytree(shards_dir, rec)
    images, same = pickle.loads((rec / "heldout.bin").read_bytes())
    (rec / "many.bin").write_bytes(pickle.dumps((list(images) * 10, list(same) * 10)))
    return rec


def keys_for(shards_dir, max_steps, *more):
    return [
        f"rec={shards_dir}", f"global_batch_size={BATCH}", f"max_steps={max_steps}",
        "checkpoint_every=6", f"verify_every={chaos.VERIFY}", "val_targets=heldout", "debug=true",
        "debug_every=25", "collective_timeout=60", *more,
    ]  # fmt: skip


def whole_run(output, world, keys):
    with chaos.Supervised(output, world, keys) as run:
        assert run.loop.wait(300) == 0
    return output


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_kills_flipped_bits_and_a_full_disk(long_verification, small_disk, tmp_path):
    """On four processes, ending bit for bit as if nothing had been.

    Each injury is certain to have been what it is called (tests/launch/chaos.py), and each is
    followed by a start from the newest checkpoint that there was.
    """
    draw = random.Random(7)
    max_steps = 192
    keys = keys_for(long_verification, max_steps, "precision=fp32", "val_targets=many")
    whole = whole_run(tmp_path / "whole", 4, keys)
    kinds = list(chaos.KINDS) * 4
    draw.shuffle(kinds)
    while "save" in kinds[8:12]:  # when the disk is full
        draw.shuffle(kinds)
    done = []
    with chaos.Supervised(small_disk.parent, 4, keys) as run:

        def go_on(steps):
            goal = last_step(run.output) + steps
            run.wait_for(lambda: last_step(run.output) >= goal)

        def injure(kind):
            mark, there = run.mark(), chaos.newest(run.output)
            done.append((kind, chaos.KINDS[kind](run, draw)))
            run.wait_for(lambda: run.resumed(mark) is not None)
            assert run.resumed(mark) >= there, done[-1]

        run.wait_for(lambda: chaos.newest(run.output) >= 12)
        for kind in kinds[:8]:
            injure(kind)
            go_on(draw.randint(1, 6))
        flip(run, draw, done)
        go_on(draw.randint(7, 12))
        a_minute_without_disk(run, kinds[8:12], injure, done)
        flip(run, draw, done)
        for kind in kinds[12:]:
            go_on(draw.randint(1, 6))
            injure(kind)
        assert run.loop.wait(300) == 0, run.text()[-4000:]
    print(*done, sep="\n")
    assert sorted(kind for kind, _ in done if kind in chaos.KINDS) == sorted(kinds)
    ends.assert_same_bits(whole, run.output, max_steps)
    verifications = [0, *range(chaos.VERIFY, max_steps, chaos.VERIFY), max_steps]
    assert list(verified(run.output)) == verifications
    ends.assert_every_image_once_an_epoch(run.output, max_steps, BATCH)


def flip(run, draw, done):
    """It is found, named and set aside, and the older checkpoint is taken."""
    run.wait_for(lambda: len(list(run.output.glob("checkpoints/step-*/manifest.json"))) > 1)
    mark = run.mark()
    name, step = chaos.flip(run, draw)
    run.wait_for(lambda: run.resumed(mark) is not None)
    said = f"{name} is damaged: its sha256 is not the manifest's; it is now step-{step}.damaged"
    assert said in run.text(mark)
    assert run.resumed(mark) < step
    done.append(("flip", said))
    shutil.rmtree(run.output / "checkpoints" / f"step-{step}.damaged")  # the disk is small


def a_minute_without_disk(run, kinds, injure, done):
    """Saves fail and say so, training goes on, the former checkpoint stays, later saves succeed;
    and what is killed meanwhile goes back to it each time."""
    began, mark = time.monotonic(), run.mark()
    with chaos.full(run.output / "checkpoints"):
        there = chaos.newest(run.output)
        for kind in kinds:
            failed = run.text(mark).count("No space left on device")
            step = last_step(run.output)
            run.wait_for(lambda: run.text(mark).count("No space left on device") > failed)  # noqa: B023
            run.wait_for(lambda: last_step(run.output) > step + 2)  # noqa: B023
            injure(kind)
        run.wait_for(lambda: time.monotonic() > began + 60)
        assert chaos.newest(run.output) == there
    failures = re.findall(
        r"the checkpoint of step (\d+) was not written: .*No space", run.text(mark)
    )
    assert len(failures) >= len(kinds)
    run.wait_for(lambda: chaos.newest(run.output) > there)
    done.append((f"no disk for {time.monotonic() - began:.0f} s", f"not saved: {failures}"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_with_another_number_of_processes_after_each(shards_dir, tmp_path):
    draw = random.Random(3)
    max_steps = 56
    keys = keys_for(shards_dir, max_steps, "precision=fp64", "sync_bn=true", "lr=0.02")
    whole_run(tmp_path / "whole", 4, keys)
    output = tmp_path / "r"
    for world in (4, 3, 1, 2):
        with chaos.Supervised(output, world, keys) as run:
            goal = last_step(output) + draw.randint(7, 10)
            run.wait_for(lambda: last_step(output) >= goal, 240)  # noqa: B023
            _, ranks = run.processes()
            assert chaos.tell(draw.choice(ranks), signal.SIGKILL)
            time.sleep(draw.random())
            os.killpg(run.loop.pid, signal.SIGSTOP)  # the supervisor is gone as well
            chaos.tell(run.processes()[0][0], signal.SIGKILL)
    whole_run(output, 4, keys)
    ends.assert_same_numbers(tmp_path / "whole", output, max_steps, within=1e-8)
    ends.assert_every_image_once_an_epoch(output, max_steps, BATCH)
