"""A supervised run, and the injuries of the chaos test: each does what its name says for certain,
and says with what it was seen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from tests.launch.processes import ROOT, TINY, last_step, verified, wait

# In a store that outlives an attempt, the next one meets the keys of the one before it.
ALONE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


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

    def ranks(self) -> list[int]:
        """Of the four of one attempt, once they are there."""
        self.wait_for(lambda: len(self.processes()[1]) == 4)
        return self.processes()[1]

    def text(self, since: int = 0) -> str:
        with open(self.log, errors="replace") as file:
            file.seek(since)
            return file.read()

    def mark(self) -> int:
        return self.log.stat().st_size

    def resumed(self, since: int) -> int | None:
        """The step after which the first start since then goes on."""
        found = re.search(r"continues after step (\d+)", self.text(since))
        return int(found[1]) if found else None

    def wait_for(self, condition, seconds: float = 120, every: float = 0.1) -> None:
        wait(
            lambda: condition() or self.loop.poll() is not None, seconds, self.text, every
        )  # fmt: skip
        assert self.loop.poll() is None, f"the run has ended\n{self.text()[-3000:]}"

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.loop.pid, signal.SIGKILL)
        self.loop.wait()
        for pid in sum(self.processes(), []):
            tell(pid, signal.SIGKILL)


def tell(pid: int, number: signal.Signals) -> bool:
    """Whether it was there to be told."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def newest(output: pathlib.Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    names = [path.parent.name for path in output.glob("checkpoints/step-*/manifest.json")]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)


# --- The injuries; each returns with what it was seen ---------------------------------------------


def rank(run: Supervised, draw: random.Random) -> str:
    """A rank is killed."""
    victim = draw.choice(run.ranks())
    assert tell(victim, signal.SIGKILL)
    return f"process {victim} was there"


def agent(run: Supervised, draw: random.Random) -> str:
    """torchrun is killed; its ranks follow it."""
    (victim,), ranks = run.processes()
    assert tell(victim, signal.SIGKILL)
    run.wait_for(lambda: not set(ranks) & set(run.processes()[1]), 20)
    return f"process {victim} was there, its ranks {ranks} went with it"


def save(run: Supervised, draw: random.Random) -> str:
    """A rank is killed while a checkpoint is written, which froze and waits for it."""
    partials = re.compile(r"step-(\d+)\.partial")
    directory = run.output / "checkpoints"
    for _ in range(40):
        victim = draw.choice(run.ranks())
        run.wait_for(lambda: any(map(partials.fullmatch, os.listdir(directory))), every=0.001)
        if not tell(victim, signal.SIGSTOP):
            continue
        time.sleep(0.4)
        found = [match for name in os.listdir(directory) if (match := partials.fullmatch(name))]
        if not found:
            tell(victim, signal.SIGCONT)  # it was too late
            continue
        assert tell(victim, signal.SIGKILL)
        time.sleep(0.2)
        step = found[0][1]
        assert not (directory / f"step-{step}").exists()
        return f"step-{step}.partial was there and step-{step} is not"
    raise AssertionError("no save was met")


def load(run: Supervised, draw: random.Random) -> str:
    """A rank is killed, and once more one of those that start again, while it opens a file of the
    checkpoint: the kernel lets it wait for a lease that the test holds on the file."""
    before = run.ranks()
    assert tell(draw.choice(before), signal.SIGKILL)
    run.wait_for(lambda: not set(before) & set(run.processes()[1]), 60)
    step = newest(run.output)
    directory = run.output / "checkpoints" / f"step-{step}"
    path = draw.choice(sorted(directory.glob("*.safetensors")))
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel says that somebody waits
    with open(path, "r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        waiting: list[int] = []

        def somebody_waits() -> bool:
            waiting[:] = [pid for pid in run.processes()[1] if "lease" in _waits_in(pid)]
            return bool(waiting)

        run.wait_for(somebody_waits)
        assert tell(victim := draw.choice(waiting), signal.SIGKILL)
    return f"process {victim} waited for {path.name} of step {step}"


def evaluation(run: Supervised, draw: random.Random) -> str:
    """A rank is killed while the run verifies: the step is logged, the verification is not yet."""

    def verifying() -> int:
        step = last_step(run.output)
        return step if step % VERIFY == 0 and step not in verified(run.output) else 0

    for _ in range(40):
        ranks = run.ranks()
        run.wait_for(verifying, every=0.02)
        time.sleep(0.2 + 0.3 * draw.random())
        if not (step := verifying()):
            continue  # it was too late
        assert tell(draw.choice(ranks), signal.SIGKILL)
        time.sleep(0.2)
        assert verifying() == step
        return f"step {step} was logged for a while and is not verified"
    raise AssertionError("no verification was met")


VERIFY = 24  # steps
KINDS = {kill.__name__: kill for kill in (rank, agent, save, load, evaluation)}


def flip(run: Supervised, draw: random.Random) -> tuple[str, int]:
    """One bit of the newest checkpoint changes while nobody moves; then all are killed. The file
    and its step."""
    agents, ranks = run.processes()
    for pid in agents + ranks:
        tell(pid, signal.SIGSTOP)
    step = newest(run.output)
    path = draw.choice(sorted((run.output / "checkpoints" / f"step-{step}").glob("*.safetensors")))
    place = draw.randrange(path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    for pid in agents + ranks:
        tell(pid, signal.SIGKILL)
    return path.name, step


@contextlib.contextmanager
def full(disk: pathlib.Path):
    """No byte is left on the disk while the body runs."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    assert os.statvfs(disk).f_bavail == 0
    yield
    filler.unlink()


def _waits_in(pid: int) -> str:
    """The kernel's functions that the threads of a process wait in."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/wchan"):
        with contextlib.suppress(OSError):
            found.append(path.read_text())
    return " ".join(found)
