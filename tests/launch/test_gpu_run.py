"""launch/bench/gpu.sh: its parts cost only themselves, and it runs where few packages are."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import venv

import pytest

from launch.bench import head, losses, sides
from launch.bench.gpu import device_check, largest, stages
from launch.planner import predict
from recognition import config

ROOT = pathlib.Path(__file__).parents[2]
# What the machine with the GPU has beside Python, and what these bring.
MACHINE = [
    "torch", "triton", "numpy", "opencv-python-headless", "onnx", "onnxruntime", "tensorboard",
    "safetensors",
]  # fmt: skip


def python_part(name, seconds, code, **options):
    return stages.Part(name, seconds, ["-c", code], **options)


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path, capfd):
    """Its children end with it, and the results of all are in the file."""
    child = tmp_path / "child"
    endless = f"""
import subprocess, sys, time
print('{{"case": 1}}', flush=True)
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(process.pid))
time.sleep(600)
"""
    results = stages.Results(tmp_path / "gpu.json", rehearsal=False)
    parts = [
        python_part("broken", 60, "print('before'); raise SystemExit(3)"),
        python_part("endless", 5, endless),
        python_part("absent", 60, "", needs="no_such.module"),
        python_part("whole", 60, 'print(\'{"case": 2}\'); print("a line")'),
    ]
    assert stages._run_stage("1", parts, results, tmp_path, rehearse=False) == ["broken", "endless"]
    found = json.loads(results.path.read_text())["stages"]["1"]
    assert found["broken"]["exit"] == 3 and found["broken"]["log"] == "before"
    assert found["endless"]["results"] == [{"case": 1}]
    assert "stopped at its limit" in found["endless"]["exit"]
    assert found["absent"] == {"skipped": "no_such.module is not installed"}
    assert found["whole"]["exit"] == 0 and found["whole"]["results"] == [{"case": 2}]
    printed = capfd.readouterr()
    assert "absent: skipped" in printed.out and "before" in printed.err
    assert not _lives(int(child.read_text()))


def _lives(pid):
    for _ in range(50):  # an orphan is reaped by the machine's first process
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_no_part_begins_when_the_time_of_its_stage_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_STAGE_SECONDS", 5)
    results = stages.Results(tmp_path / "gpu.json", rehearsal=False)
    assert stages._run_stage("2", [python_part("late", 60, "")], results, tmp_path, False) == []
    found = json.loads(results.path.read_text())["stages"]["2"]
    assert found == {"late": {"skipped": "the stage's time is over"}}


def test_the_results_stay_small(tmp_path):
    """A part that prints without end leaves at most its last mebibyte."""
    results = stages.Results(tmp_path / "gpu.json", rehearsal=False)
    loud = "for _ in range(40_000): print('{\"a\": \"' + 90 * 'x' + '\"}'); print(99 * 'y')"
    assert stages._run_stage("1", [python_part("loud", 60, loud)], results, tmp_path, False) == []
    parts = sum(map(len, stages.stages(tmp_path, rehearse=False).values()))
    assert 500_000 < results.path.stat().st_size < (16 << 20) / parts


def test_each_stage_takes_five_minutes_and_the_first_parts_are_surely_reached(tmp_path):
    for parts in stages.stages(tmp_path, rehearse=False).values():
        assert sum(part.seconds for part in parts[:4]) <= stages._STAGE_SECONDS + 50


def test_the_commands_for_the_gpu_are_accepted(tmp_path):
    """Those of the real run, which no rehearsal types."""
    parts = [part for stage in stages.stages(tmp_path, rehearse=False).values() for part in stage]
    checked = 0
    for name, *typed in (part.command for part in parts):
        if name.endswith("bench/head.py"):
            parser = head._parser()
            head._check(parser, parser.parse_args(typed))
        elif name.endswith("losses.py"):
            losses._parser().parse_args(typed)
        elif name.endswith("train.py"):
            cfg = config.load(str(ROOT / typed[0]), typed[1:])
            assert cfg.rec == str(tmp_path / "shards")
        else:
            assert name == "-m" or name.endswith("loader.py")
            continue
        checked += 1
    assert checked == 6


def test_without_a_gpu_it_says_how_to_rehearse():
    done = subprocess.run(
        ["bash", "launch/bench/gpu.sh", "1"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "--rehearse runs on a CPU" in done.stderr


def test_a_wrong_number_or_a_synchronisation_fails_the_check(monkeypatch, capsys):
    """Of one loss: the CPU equals itself, a planted deviation is seen, and so is a host's wait."""
    known = losses.losses()
    monkeypatch.setattr(device_check, "losses", lambda: {"arcface": known["arcface"]})
    assert device_check.main() == 0
    numbers, calls = device_check._numbers, []

    def wrong(*arguments):
        found, cause = numbers(*arguments)
        calls.append(arguments)
        return [found[0], found[1] * (1 + 1e-6 * (len(calls) % 2)), found[2]], cause

    monkeypatch.setattr(device_check, "_numbers", wrong)
    assert device_check.main() == 1
    monkeypatch.setattr(device_check, "_numbers", lambda *_: (numbers(*_)[0], "cudaStreamSync"))
    assert device_check.main() == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["deviation"] > 1e-9 for line in lines] == [False, True, False]
    assert "cudaStreamSync" in lines[2]["synchronised"][0]


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_the_largest_head_is_predicted_by_the_planners_bytes(rate):
    case = sides.Case(1, 64, rate, 32)
    predicted = largest._predicted(case, "cpu", 1 << 30)
    cfg = config.make({"rec": "-", "sample_rate": rate, "embedding_size": 32,
                       "head_stored_mib": case.stored_mib})  # fmt: skip
    within, beyond = (
        sum(predict.head_bytes(cfg, classes, 1, 64, is_cuda=False).values())
        for classes in (predicted, predicted + 1)
    )
    assert within <= 1 << 30 < beyond


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_rehearsal_where_only_the_machines_packages_are(tmp_path):
    """Every part, in an environment without easydict, DALI, rich, SciPy, matplotlib and pytest."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": str(make_environment(tmp_path / "venv")), "OUT": f"{tmp_path}/out"}
    done = subprocess.run(
        ["bash", "launch/bench/gpu.sh", "--rehearse"], cwd=ROOT, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.json"]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    for stage, parts in stages.stages(tmp_path, rehearse=True).items():
        for part in parts:
            if part.needs and "skipped" in found[stage][part.name]:
                assert part.needs in ("pytest", "nvidia.dali")
                continue
            assert found[stage][part.name]["exit"] == 0
            is_silent = part.name in ("faces", "pack", "r50", "mbf")
            assert is_silent or found[stage][part.name]["results"]
    assert found["2"]["r50"]["training"]["images_per_second"] > 0
    assert 0 <= found["2"]["mbf"]["training"]["verification"][-1]["heldout"]["accuracy_mean"] <= 1
    *_, taken, summary = found["2"]["largest"]["results"]
    assert taken["fits"] is True and taken["classes"] == summary["found"]
    assert summary["found"] > summary["predicted"] / 2
    assert {"ours", "eager", "torch"} <= found["1"]["rivals"]["results"][0]["error"].keys()


def make_environment(path: pathlib.Path) -> pathlib.Path:
    """The Python of a virtual environment that has what that machine has, linked from this one."""
    venv.create(path, symlinks=True, with_pip=False)
    python = path / "bin" / "python"
    site = next(path.glob("lib/python*/site-packages"))
    kept, waiting = set(), list(MACHINE)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in kept:
            continue
        kept.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).is_symlink():
                (site / top).symlink_to(package.locate_file(top))
        waiting += [
            re.match(r"[\w.-]+", line)[0]
            for line in package.requires or []
            if "extra ==" not in line
        ]
    assert not {"easydict", "rich", "scipy", "matplotlib", "pytest", "nvidia"} & {
        entry.name for entry in site.iterdir()
    }
    return python
