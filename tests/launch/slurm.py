"""A SLURM of four nodes on this host for the tests: munged, slurmctld and four slurmd, as root.

All their state lies in one directory and their ports are on loopback.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")


def skip_without() -> None:
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    if missing:
        pytest.skip(f"{missing[0]} is not here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root to start jobs")


_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    def __init__(self, directory: pathlib.Path, nodes: int = 4) -> None:
        self.directory, self.nodes = directory, nodes
        self.conf = directory / "slurm.conf"
        self.env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.conf)}
        for name in [n for n in self.env if n.startswith("SLURM_") and n != "SLURM_CONF"]:
            del self.env[name]
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        for name in ("state", *(f"spool.n{k + 1}" for k in range(self.nodes))):
            (self.directory / name).mkdir(parents=True)
        ports = _free_ports(self.nodes + 1)
        host, directory = socket.gethostname().split(".")[0], self.directory
        nodes = f"n[1-{self.nodes}]"
        listed = ",".join(map(str, ports[1:]))
        self.conf.write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
InactiveLimit=0
KillWait=30
SlurmdTimeout=10
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{listed}] CPUs=2 RealMemory=4000
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=40
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10
"""
        )
        (directory / "munge.key").write_bytes(os.urandom(128))
        (directory / "munge.key").chmod(0o600)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={directory}/munge.key",
            f"--socket={directory}/munge.socket", f"--pid-file={directory}/munged.pid",
            f"--log-file={directory}/munged.log", f"--seed-file={directory}/munged.seed",
        )  # fmt: skip
        _wait(lambda: (directory / "munge.socket").exists(), 10)
        self._start("slurmctld", "-D", "-f", str(self.conf), "-c")
        for k in range(self.nodes):
            self.start_node(f"n{k + 1}")
        _wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(self.nodes), 30)
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", "--full", "--signal=KILL", job)
            self.run("scancel", job)
        for name in [*[n for n in self._daemons if n.startswith("n")], "slurmctld", "munged"]:
            daemon = self._daemons[name]
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-f", str(self.conf), "-N", name, key=name)

    def _start(self, program: str, *arguments: str, key: str = "") -> None:
        with open(self.directory / f"{key or program}.out", "w") as out:
            self._daemons[key or program] = subprocess.Popen(
                [shutil.which(program, path=_PATH) or program, *arguments],
                stdout=out, stderr=out, env=self.env,
            )  # fmt: skip

    def run(self, *command: object, check: bool = False, **options) -> str:
        """What a command of SLURM says."""
        env = self.env | options.pop("env", {})
        done = subprocess.run(
            list(map(str, command)), env=env, capture_output=True, text=True, timeout=60, **options
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-j", job, "-o", "%T")

    def shown(self, job: str) -> dict[str, str]:
        said = self.run("scontrol", "show", "job", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def start_requeued(self, job: str) -> None:
        """A requeued job waits for two minutes; an administrator would not, nor does a test."""
        _wait(
            lambda: self.state(job) == "PENDING",
            90,
            lambda: self.run("scontrol", "show", "job", job),
        )
        time.sleep(4)  # sooner, the credential of its former start is still around
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=True)


def _wait(condition, seconds: float, said=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s {said()}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    taken = [socket.socket() for _ in range(count)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports
