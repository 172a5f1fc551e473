"""A run over four hosts that loses one for a while, one for good, and gets them back, ends as one
that nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.launch import ends
from tests.launch.network import Hosts
from tests.launch.processes import Run, last_step, wait

BATCH, SAVED = 8, 5  # images, steps


def keys_for(shards_dir):
    """Under these, rounding alone differs between numbers of processes; the rate is small, so that
    it stays small over so many steps."""
    return [
        f"rec={shards_dir}", f"global_batch_size={BATCH}", "max_steps=100000", "lr=1e-4",
        f"checkpoint_every={SAVED}", f"keep_every={SAVED}", "precision=fp64",
        "sync_bn=true", "collective_timeout=10", "debug=true",
    ]  # fmt: skip


def node(hosts, k, tmp_path, shards_dir):
    torchrun = [
        "--nnodes", "2:4", "--nproc-per-node", 1, "--max-restarts", 20, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{hosts.address(0)}:29400", "--local-addr", hosts.address(k),
        f"--rdzv-conf=is_host={int(k == 0)},last_call_timeout=3,keep_alive_interval=1,"
        "keep_alive_max_attempt=3,read_timeout=5",
    ]  # fmt: skip
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return Run(
        tmp_path / f"host{k}.log", tmp_path / "r", torchrun, keys_for(shards_dir),
        prefix=hosts.prefix(k), env=environment,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_hosts_of_which_one_is_cut_off_and_one_removed(shards_dir, tmp_path):
    output = tmp_path / "r"

    def said():
        return "".join(p.read_text()[-2500:] for p in sorted(tmp_path.glob("host*.log")))

    def goes_on(world, since, seconds=120):
        """At that size, five steps after `since`."""
        wait(
            lambda: (
                f"{world} x cpu" in said_since(since) and last_step(output) >= since["step"] + 5
            ),
            seconds,
            said,
        )

    def mark():
        logs = {p: p.stat().st_size for p in tmp_path.glob("host*.log")}
        return {"step": last_step(output), "logs": logs}

    def said_since(mark):
        text = ""
        for path in tmp_path.glob("host*.log"):
            with open(path) as file:
                file.seek(mark["logs"].get(path, 0))
                text += file.read()
        return text

    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Hosts())
        start = mark()
        nodes = [stack.enter_context(node(hosts, k, tmp_path, shards_dir)) for k in range(4)]
        goes_on(4, start)

        since = mark()
        hosts.cut(3)  # no connection is closed: its packets just end
        goes_on(3, since)
        since = mark()
        hosts.mend(3)
        if nodes[3].agent.poll() is None:
            time.sleep(5)
        nodes[3].kill()  # whoever watches a host restarts what runs there
        nodes[3] = stack.enter_context(node(hosts, 3, tmp_path, shards_dir))
        goes_on(4, since)

        since = mark()
        nodes[2].kill()
        goes_on(3, since)
        since = mark()
        nodes[2] = stack.enter_context(node(hosts, 2, tmp_path, shards_dir))
        goes_on(4, since)
        wait(lambda: last_step(output) >= 2 * ends.IMAGES // BATCH + SAVED, 200, said)  # epochs
        os.kill(nodes[0].workers()[0], signal.SIGUSR1)
        for each in nodes:
            each.agent.wait(60)

    last = last_step(output) // SAVED * SAVED
    whole = tmp_path / "whole"
    with Run(tmp_path / "log", whole, ["--standalone"], keys_for(shards_dir)) as alone:
        there = whole / "checkpoints" / f"step-{last}" / "manifest.json"
        wait(there.exists, 300, alone.text)
    ends.assert_same_numbers(whole, output, last, within=1e-8)
    ends.assert_every_image_once_an_epoch(output, last, BATCH)
