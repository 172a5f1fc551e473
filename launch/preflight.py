"""Look at the machines before a run: what would stop it later, or make it slow, in a few seconds.

    torchrun --nnodes 4 --nproc-per-node 8 ... launch/preflight.py RECIPE key=value ...

takes what launch/train.py takes, which also runs it at its start (preflight_seconds=0 leaves it
out). It looks at: rendezvous, network interface and its link, clocks, versions of torch, CUDA and
driver, GPUs, latency and bandwidth of an all-reduce, the output's file system (free, shared), the
data (readable, alike on every machine), file descriptors, shared memory. What would stop a run is
an error and exit code 1; what would slow it down, a warning.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from data_tools.common import cli
from launch.preflight_checks import links, machine
from recognition import config
from recognition.distributed import collectives, runtime
from recognition.distributed.collectives import LostContact
from recognition.run import run_dir


def check(cfg: config.Config, place: runtime.Runtime, seconds: float) -> links.Findings:
    """Look at everything, on every rank at once; the same findings on all.

    seconds: about what it may take; the bandwidth is measured for a twentieth of it.
    """
    found = links.Findings()
    everybody = collectives.gather_objects(machine.local_facts(cfg), place.group)
    leaders = {facts["host"]: facts for facts in reversed(everybody)}
    hosts = list(reversed(leaders))  # in rank order
    found.numbers |= {"world": place.world, "machines": len(hosts)}
    found.lines.append(f"{place.world} processes on {len(hosts)} machines have met")
    for host in hosts:
        found.lines.append(f"{host}: {machine.in_words(leaders[host])}")
        found.warnings += [f"{host}: {words}" for words in leaders[host]["warnings"]]
        found.errors += [f"{host}: {words}" for words in leaders[host]["errors"]]
    for what in ("torch", "cuda", "driver", "code", "gpus"):
        values = {host: leaders[host][what] for host in hosts}
        if len(set(map(str, values.values()))) > 1:
            found.warnings.append(f"the machines differ in {what}: {values}")
    data = {host: leaders[host]["data"] for host in hosts}
    apart = [host for host in hosts if data[host] != data[hosts[0]]]
    if apart:
        found.errors.append(
            f"the data is not the same everywhere: {', '.join(apart)} against {hosts[0]}. "
            f"{data[apart[0]]} against {data[hosts[0]]}"
        )
    links.clocks(found, place, everybody)
    links.shared_output(found, cfg, place)
    links.network(found, place, seconds / 20, len(hosts), leaders)
    return found


def report(found: links.Findings, place: runtime.Runtime, everything: bool) -> None:
    """Rank 0 says it: all of it, or what is wrong alone."""
    if place.rank == 0:
        for line in found.lines if everything else []:
            print(f"preflight: {line}", flush=True)
        for line in found.warnings:
            print(f"preflight warning: {line}", file=sys.stderr, flush=True)
    if found.errors:
        raise OSError("preflight: " + "; ".join(found.errors))


@cli.on_one_line(lead=lambda: f"error (rank {os.environ.get('RANK', '0')})")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="as for launch/train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON line last, from rank 0")
    args = parser.parse_args(arguments)
    try:
        cfg = config.load(args.recipe, args.overrides)
        began = time.perf_counter()
        with runtime.start(min(cfg.collective_timeout, 60.0)) as place:
            found = check(cfg, place, args.seconds)
            found.numbers["seconds"] = time.perf_counter() - began
            report(found, place, everything=True)
            if args.json and place.rank == 0:
                print(json.dumps(found.numbers | {"warnings": found.warnings}))
    except LostContact as error:
        run_dir.record_failure(error, "", int(os.environ.get("RANK", "0")))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
