"""Real runs under torchrun for the tests: started, watched, hurt, ended."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    str(ROOT / "launch" / "configs" / "demo.py"), "embedding_size=32", "val_targets=",
    "log_every=1", "num_workers=1", "preflight_seconds=0",
]  # fmt: skip


class Run:
    """One torchrun with its processes; everything it says goes to a file."""

    def __init__(
        self, log: pathlib.Path, output: pathlib.Path, torchrun: list, keys: list, **options
    ) -> None:
        self.output, self.log = output, log
        self.said = 0  # bytes of the log that were there before
        if log.exists():
            self.said = log.stat().st_size
        with open(log, "a") as file:
            self.agent = subprocess.Popen(
                [
                    *options.pop("prefix", []), sys.executable, "-m", "torch.distributed.run",
                    *map(str, torchrun), "launch/train.py", *TINY, f"output={output}",
                    *map(str, keys),
                ],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})},
            )  # fmt: skip

    def text(self) -> str:
        with open(self.log) as file:
            file.seek(self.said)
            return file.read()

    def workers(self) -> list[int]:
        """Process ids of the ranks, by their local rank."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.agent.pid)], capture_output=True, text=True
        ).stdout.split()
        return sorted(int(pid) for pid in found if "train.py" in _command(int(pid)))

    def step(self) -> int:
        return last_step(self.output)

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        wait(lambda: self.step() >= step or self.agent.poll() is not None, seconds, self.text)

    def kill(self) -> None:
        """The agent; its ranks follow it by themselves."""
        if self.agent.poll() is None:
            self.agent.kill()
        self.agent.wait()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self.agent.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.agent.wait()


def _command(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def wait(condition, seconds: float, said=lambda: "", every: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{said()[-6000:]}"
        time.sleep(every)


def records(output: pathlib.Path) -> list[dict]:
    """Those of steps."""
    return [record for record in _lines(output) if "loss" in record]


def verified(output: pathlib.Path) -> dict[int, dict]:
    """The results by step."""
    return {r["step"]: r["verification"] for r in _lines(output) if "verification" in r}


def _lines(output: pathlib.Path) -> list[dict]:
    path = output / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            pass  # being written
    return found


def last_step(output: pathlib.Path) -> int:
    return max((record["step"] for record in records(output)), default=0)
