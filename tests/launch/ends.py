"""What a disturbed run must have in common with the undisturbed one."""

from __future__ import annotations

import json
import os
import pathlib

import safetensors.torch

from tests.launch.processes import records, verified

IMAGES = 128  # of shards_dir


def assert_same_bits(whole: pathlib.Path, output: pathlib.Path, max_steps: int) -> None:
    """Every file of the last checkpoint, what is logged of each step, every verification."""
    ends = [path / "checkpoints" / f"step-{max_steps}" for path in (whole, output)]
    names = sorted(p.name for p in ends[0].glob("*.safetensors"))
    assert names == sorted(p.name for p in ends[1].glob("*.safetensors")) and len(names) > 2
    for name in names:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    logged = [
        [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(path)]
        for path in (whole, output)
    ]
    assert logged[0] == logged[1] and len(logged[0]) == max_steps
    assert verified(whole) == verified(output)


def assert_same_numbers(
    whole: pathlib.Path, output: pathlib.Path, last: int, within: float
) -> None:
    """Weights after step `last` and losses up to it, where the numbers of processes were others."""
    a, b = (
        safetensors.torch.load_file(path / "checkpoints" / f"step-{last}" / "model.safetensors")
        for path in (whole, output)
    )
    apart = {name: float((a[name].double() - b[name].double()).abs().max()) for name in a}
    assert max(apart.values()) < within, apart
    losses = [[r["loss"] for r in records(path)][:last] for path in (whole, output)]
    assert len(losses[0]) == len(losses[1]) == last
    assert max(abs(x - y) for x, y in zip(*losses, strict=True)) < within


def assert_every_image_once_an_epoch(output: pathlib.Path, last: int, batch: int) -> None:
    """In the epochs up to step `last`."""
    steps = samples_of(str(output))
    assert list(steps)[:last] == list(range(1, last + 1))
    epoch = IMAGES // batch  # steps
    for first in range(1, last + 2 - epoch, epoch):
        ids = sum((steps[first + k] for k in range(epoch)), [])
        assert sorted(ids) == list(range(IMAGES)), f"steps from {first}"


def samples_of(run_dir: str) -> dict[int, list[int]]:
    """The ids that each step trained on, over all ranks, from the last start that ran the step."""
    found: dict[int, tuple[int, list[int]]] = {}
    directory = os.path.join(run_dir, "samples")
    for name in sorted(os.listdir(directory)):  # earlier starts first
        start = int(name.partition("-")[0])
        with open(os.path.join(directory, name), encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break  # the run was killed while it wrote this line
                step, ids = json.loads(line)
                if found.get(step, (0, []))[0] != start:
                    found[step] = (start, [])
                found[step][1].extend(ids)
    return {step: ids for step, (_, ids) in sorted(found.items())}
