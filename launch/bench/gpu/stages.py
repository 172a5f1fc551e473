"""What only a GPU can answer, in two stages of five minutes each: `launch/bench/gpu.sh [1|2]`.

A stage is a list of parts, the most valuable first. Every part has a limit of its own, and none
begins when the time of its stage is over; a part that fails or is stopped at its limit costs
nothing but itself. What needs a package that is missing is skipped, and the results say so.

$OUT/gpu.json (gpu-1.json or gpu-2.json of a single stage; $OUT is runs/gpu unless it is set) is
rewritten while the parts run: for each part its command, seconds, exit code, the JSON lines that it
printed, the last lines of its log, and of a training the medians of its log steps. It stays below
16 MiB. Everything else goes to a temporary directory that is removed at the end. The exit code is 1
if a part failed.

--rehearse runs the same parts at sizes of no meaning on a CPU, Triton in its interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.common import files, text

_ROOT = Path(__file__).resolve().parents[3]
_STAGE_SECONDS = 300
_PATIENCE = 6  # a rehearsal's limits are so many times longer: it has to end, not to be quick
_GRACE = 5  # seconds between the request to stop and the end
_POLL = 0.5  # seconds
_MOST_PRINTED, _MOST_LOG = 1 << 20, 20_000  # bytes kept of a part's output, and of its log


class Part(NamedTuple):
    name: str
    seconds: int  # at most
    command: list[str]  # after the interpreter
    needs: str = ""  # a module without which the part is skipped
    output: str = ""  # of a training: the run directory


def stages(work: Path, rehearse: bool) -> dict[str, list[Part]]:
    """The parts of each stage; `work` is where their files go."""
    head, shards = "launch/bench/head.py", work / "shards"
    one_process = ["--processes", "1"]
    if rehearse:
        small = ["--classes", "500", "--batch", "8", "--embedding-size", "32"]
        quick = ["--pairs", "1", "--warmup", "0", "--dtype", "bf16"]
        rates = ["--side", "64", "--classes", "1024"]
        beside = [*small, *quick, "--forms", "triton"]
        suite = [*small, *quick, *one_process]
        largest = [*small[2:], "--memory-mib", "256"]
        faces = ["--identities", "16", "--images", "4"]
        packed = ["--shards", "1", "--hold-out", "4", "--pairs", "20", "--workers", "1"]
        r50 = ["network=mbf_tiny", "batch_size=8", "max_steps=2", "log_every=1", "num_workers=1"]
        mbf = [*r50, "verify_every=2", "checkpoint_every=2"]
        losses = [*small, "--pairs", "1", "--warmup", "0", "--losses", "arcface"]
        loader = ["--threads", "1", "--rounds", "1", "--batches", "1", "--only", "bare", "cpu"]
    else:
        rates = []
        beside = [
            "--classes",
            "1000000",
            "--batch",
            "4096",
            "--dtype",
            "bf16",
            "--kernel",
            "auto",
            "--forms",
            "compiled",
            "triton",
        ]
        suite = ["--suite", "gpu", *one_process]
        largest = []
        faces = ["--identities", "1500", "--images", "20"]
        packed = ["--shards", "16", "--hold-out", "150", "--pairs", "3000"]
        r50 = ["batch_size=256", "max_steps=100", "log_every=20", "num_workers=14"]
        mbf = [
            "network=mbf",
            "global_batch_size=512",
            "max_steps=800",
            "verify_every=800",
            "checkpoint_every=800",
            "log_every=50",
            "num_workers=14",
        ]
        losses = ["--batch", "1024", "--seconds", "20"]
        loader = ["--threads", "14", "--rounds", "3", "--only", "bare", "cpu", "arcface"]

    def training(name: str, seconds: int, recipe: str, keys: list[str], needs: str = "") -> Part:
        output = str(work / name)
        command = ["launch/train.py", f"launch/configs/{recipe}.py", f"rec={shards}", *keys]
        return Part(name, seconds, [*command, f"output={output}"], needs, output)

    tests = ["-m", "pytest", "-m", "gpu", "-rs", "tests/recognition/head/test_gpu.py"]
    arcface, demo, heldout = "ms1mv2_r50_arcface", "demo", ["val_targets=heldout"]
    return {
        "1": [
            Part("environment", 40, ["-m", "launch.bench.hardware", *rates]),
            Part("numbers", 60, ["-m", "launch.bench.gpu.device_check"]),
            Part("rivals", 100, [head, "--rivals", *beside]),
            Part("head", 150, [head, *suite]),
            Part("tests", 60, tests, "pytest"),
        ],
        "2": [
            Part("faces", 40, ["-m", "data_tools", "synthesize", str(work / "faces"), *faces]),
            Part(
                "pack", 30, ["-m", "data_tools", "pack", str(work / "faces"), str(shards), *packed]
            ),
            training("r50", 50, arcface, [*r50, "val_targets="]),
            training("mbf", 90, demo, [*mbf, *heldout]),
            Part("largest", 80, ["-m", "launch.bench.gpu.largest", *largest]),
            training("dali", 40, arcface, [*r50, "val_targets=", "loader=dali"], "nvidia.dali"),
            Part("loader", 40, ["launch/bench/loader.py", str(shards), *loader], "PIL"),
            Part("losses", 40, ["launch/bench/losses.py", *losses]),
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", choices=["1", "2"], help="default: both")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    args = parser.parse_args(arguments)
    if not args.rehearse and not _has_gpu():
        print("error: torch sees no CUDA device; --rehearse runs on a CPU", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or "runs/gpu")
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / (f"gpu-{args.stage}.json" if args.stage else "gpu.json"), args.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part, too
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="arcline-gpu-") as work:
        for stage, parts in stages(Path(work), args.rehearse).items():
            if args.stage in (None, stage):
                failed += _run_stage(stage, parts, results, Path(work), args.rehearse)
    print(f"the results are in {results.path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


class Results:
    """The file of results, complete at any moment."""

    def __init__(self, path: Path, rehearsal: bool) -> None:
        self.path = path
        self._content: dict[str, Any] = {"rehearsal": rehearsal, "stages": {}}

    def put(self, stage: str, part: str, found: dict[str, Any]) -> None:
        self._content["stages"].setdefault(stage, {})[part] = found
        files.write_text(self.path, json.dumps(self._content) + "\n")


def _run_stage(
    stage: str, parts: list[Part], results: Results, work: Path, rehearse: bool
) -> list[str]:
    """The names of the parts that failed."""
    patience = _PATIENCE if rehearse else 1
    deadline = time.monotonic() + patience * _STAGE_SECONDS
    failed = []
    for part in parts:
        left = deadline - time.monotonic()
        skipped = ""
        if part.needs and not _is_installed(part.needs):
            skipped = f"{part.needs} is not installed"
        elif left < 2 * _GRACE:
            skipped = "the stage's time is over"
        if skipped:
            print(f"stage {stage}, {part.name}: skipped, {skipped}", flush=True)
            results.put(stage, part.name, {"skipped": skipped})
            continue
        seconds = min(patience * part.seconds, left - _GRACE)
        for found in _run(part, seconds, work, rehearse):
            results.put(stage, part.name, found)
        verdict = "" if found["exit"] == 0 else f", FAILED: {found['exit']}"
        print(f"stage {stage}, {part.name}: {found['seconds']:.0f} s{verdict}", flush=True)
        if found["exit"] != 0:
            print("\n".join(found["log"].splitlines()[-15:]), file=sys.stderr, flush=True)
            failed.append(part.name)
    return failed


def _run(part: Part, seconds: float, work: Path, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Run a part; yields what is known of it whenever it has printed something, and at its end."""
    log, began, seen = work / f"{part.name}.log", time.monotonic(), None
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=_ROOT,
            env=_environment(rehearse),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    verdict: int | str | None = None
    try:
        while verdict is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                verdict = process.wait(_POLL)
            spent = time.monotonic() - began
            if verdict is None and spent > seconds:
                verdict = f"stopped at its limit, {seconds:.0f} s"
                _stop(process)
            printed = files.read_bytes(log)[-_MOST_PRINTED:].decode("utf-8", "replace")
            if verdict is not None or printed != seen:
                seen = printed
                yield {
                    "command": shlex.join(["python3", *part.command]),
                    "seconds": round(spent, 1),
                    "exit": verdict,
                    **_read_log(printed),
                    **_read_training(part.output),
                }
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End the part and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def _environment(rehearse: bool) -> dict[str, str]:
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return environment


def _read_log(log: str) -> dict[str, Any]:
    """The JSON lines that a part has printed, and the end of everything else."""
    results, rest = [], []
    for line in log.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                results.append(json.loads(line))
                continue
        rest.append(line.rpartition("\r")[2])
    return {"results": results, "log": "\n".join(rest)[-_MOST_LOG:]}


def _read_training(output: str) -> dict[str, Any]:
    """Medians over the log steps but the first, which warms up; and each verification."""
    metrics = Path(output or ".") / "metrics.jsonl"
    if not (output and files.exists(metrics)):
        return {}
    records = []
    for line in text.read_text(metrics).splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be half written
            records.append(json.loads(line))
    steps = [record for record in records if "images_per_second" in record]
    steps = steps[1:] or steps
    found: dict[str, Any] = {
        key: statistics.median(step[key] for step in steps)
        for key in ("images_per_second", "data_wait")
        if steps
    }
    if steps:
        found["seconds_per_step"] = {
            phase: statistics.median(step["seconds"][phase] for step in steps)
            for phase in steps[0]["seconds"]
        }
        found["loss"] = steps[-1]["loss"]
    verified = [record["verification"] for record in records if "verification" in record]
    return {"training": found | ({"verification": verified} if verified else {})}


def _has_gpu() -> bool:
    import torch  # the parts import it, not this process, where it is not needed

    return torch.cuda.is_available()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


if __name__ == "__main__":
    sys.exit(main())
