"""Describe a checkpoint, or every checkpoint of a run, from the manifests alone."""

import argparse
import os
import re
from typing import Any

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from recognition.checkpoint.directory import Damaged, complete, directory_of, find
from recognition.checkpoint.manifest import PENDING, read_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", help="a run directory, or a checkpoint of one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the facts.

    Raises:
        FileNotFoundError: neither a checkpoint nor a run directory with one.
        Damaged: the manifest of a checkpoint that was named.
    """
    found = find(args.path)
    if os.path.samefile(found, args.path):
        facts = describe(found)
        _print(facts)
        return facts
    listed = []
    for step in complete(args.path):
        path = directory_of(args.path, step)
        try:
            listed.append(describe(path))
        except (Damaged, UserError) as error:
            listed.append({"path": path, "step": step, "problem": str(error)})
    root = os.path.dirname(found)
    others = [name for name in files.names(root) if re.match(r"step-\d+\.", name)]
    for facts in listed:
        _print(facts)
    for name in others:
        print(f"{os.path.join(root, name)}: incomplete, or renamed as damaged")
    return {"path": args.path, "checkpoints": listed, "incomplete": others}


def describe(path: str) -> dict[str, Any]:
    """The facts of a checkpoint."""
    manifest = read_manifest(path)
    config = manifest.get("config", {})
    margin = config.get("margin")
    return {
        "path": path,
        "step": manifest["step"],
        "samples_seen": manifest["samples_seen"],
        "world": manifest["world"],
        "network": config.get("network"),
        "margin": margin,
        "margins": [own.get("margin", margin) for own in config.get("rec_heads") or [{}]],
        "heads": manifest["heads"],
        "metrics": manifest.get("metrics", {}),
        "verification_pending": bool(manifest.get(PENDING)),
        "skipped": manifest.get("skipped", []),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "files": manifest["files"],
    }


def _print(facts: dict[str, Any]) -> None:
    if "problem" in facts:
        print(f"{facts['path']}: {facts['problem']}")
        return
    heads = "; ".join(
        f"{head['num_classes']} classes x {head['num_subcenters']} x {head['embedding_size']}"
        for head in facts["heads"]
    )
    name = " + ".join([str(facts["network"]), *map(str, facts["margins"])])
    scores = "".join(f", {target} {100 * x:.2f} %" for target, x in facts["metrics"].items())
    scores += ", not yet verified" * facts["verification_pending"]
    print(
        f"{facts['path']}: {name}, {heads}; "
        f"{facts['samples_seen']} samples, saved by "
        f"{count(facts['world'], 'process', 'processes')}, "
        f"{facts['bytes'] / 1e6:.1f} MB{scores}"
    )
