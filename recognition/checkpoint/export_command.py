"""Write the network of a checkpoint alone, for release: OUT/model.safetensors, its tensors in fp32
under InsightFace's names, and OUT/card.json, which describes it and its input. For ONNX, see
launch/export.py."""

import argparse
import json
import os
from typing import Any

from data_tools.common import files
from recognition.backbones.input import INPUT_SIZE
from recognition.checkpoint import tensors
from recognition.checkpoint.manifest import read_manifest
from recognition.checkpoint.merge_command import add_paths, new_directory, read_intact
from recognition.checkpoint.reading import joined, load_backbone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "init_from=, `python -m eval` and InsightFace's torch scripts read the file. The card\n"
        "names no directory of this machine."
    )
    add_paths(parser, "directory")
    parser.add_argument(
        "--centres",
        action="store_true",
        help="also centres.safetensors, the class matrix [classes, (sub-centres,) D] of each head; "
        "with the training set it reveals who is in it",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUT, completely or not at all.

    Raises:
        FileExistsError: OUT exists already.
        Damaged: a file of the checkpoint has changed.
    """
    with new_directory(args) as (path, out):
        manifest = read_intact(path) if args.centres else read_manifest(path)
        module, config = load_backbone(path)
        held = {"model.safetensors": module.state_dict()}
        if args.centres:
            several = len(manifest["heads"]) > 1
            held["centres.safetensors"] = {
                f"head{k}.centres" if several else "centres": joined(path, manifest, k, ["weight"])[
                    "weight"
                ]
                for k in range(len(manifest["heads"]))
            }
        entries = {name: tensors.write(str(out / name), own) for name, own in held.items()}
        card = make_card(config, manifest, entries)
        files.write_text(out / "card.json", json.dumps(card, indent=1))
    size = entries["model.safetensors"]["bytes"] / 1e6
    print(f"{args.out}: {card['network']}, {size:.1f} MB, of step {card['step']}")
    return {"path": str(args.out), "from": path, "card": card}


def make_card(config: dict[str, Any], manifest: dict[str, Any], entries: dict) -> dict[str, Any]:
    """What a stranger needs to use the network, and to know where it came from."""
    sets = config["rec"] if isinstance(config["rec"], list) else [config["rec"]]
    return {
        "network": config["network"],
        "network_args": config.get("network_args", {}),
        "embedding_size": config["embedding_size"],
        "input": {
            "shape": ["batch", 3, INPUT_SIZE, INPUT_SIZE],
            "color_order": "RGB",
            "mean": 127.5,  # input = (pixel - mean) / std, pixels 0..255
            "std": 127.5,
        },
        "output": "embedding, not normalised",
        "trained_on": [os.path.basename(os.path.normpath(name)) for name in sets],
        "num_classes": [head["num_classes"] for head in manifest["heads"]],
        "margin": config["margin"],
        "margin_args": config.get("margin_args", {}),
        **({"rec_heads": config["rec_heads"]} if config.get("rec_heads") else {}),
        "step": manifest["step"],
        "samples_seen": manifest["samples_seen"],
        "metrics": manifest.get("metrics", {}),
        "commit": config.get("commit"),
        "files": entries,
    }
