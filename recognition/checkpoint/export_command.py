"""Write the network of a checkpoint alone, to be released: OUT/model.safetensors, its tensors in
fp32 under InsightFace's names, and OUT/card.json, which says what it is and takes. For ONNX, see
launch/export.py."""

import argparse
import os
from typing import Any

from recognition.backbones.input import INPUT_SIZE
from recognition.checkpoint import tensors
from recognition.checkpoint.backbone import load_backbone
from recognition.checkpoint.directory import all_rows, read_manifest, write_json
from recognition.checkpoint.making import add_paths, checked, joined, making


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The file is read by init_from=, `python -m eval` and InsightFace's torch scripts. The\n"
        "card names no directory of this machine."
    )
    add_paths(parser, "directory")
    parser.add_argument(
        "--centres",
        action="store_true",
        help="also centres.safetensors, the class matrix [classes, (sub-centres,) D] of each head; "
        "with the training set it tells who is in it",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUT, complete or not at all.

    Raises:
        FileExistsError: OUT is there.
        Damaged: a file of the checkpoint is not what was written.
    """
    with making(args) as (path, partial):
        manifest = checked(path) if args.centres else read_manifest(path)
        module, config = load_backbone(path)
        files = {
            "model.safetensors": tensors.write(
                str(partial / "model.safetensors"), module.state_dict()
            )
        }
        if args.centres:
            files["centres.safetensors"] = tensors.write(
                str(partial / "centres.safetensors"), _centres(path, manifest)
            )
        card = make_card(config, manifest, files)
        write_json(str(partial / "card.json"), card)
    size = files["model.safetensors"]["bytes"] / 1e6
    print(f"{args.out}: {card['network']}, {size:.1f} MB, of step {card['step']}")
    return {"path": str(args.out), "from": path, "card": card}


def make_card(config: dict[str, Any], manifest: dict[str, Any], files: dict) -> dict[str, Any]:
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
        "files": files,
    }


def _centres(path: str, manifest: dict[str, Any]) -> dict[str, Any]:
    several = len(manifest["heads"]) > 1
    found = {}
    for k, head in enumerate(manifest["heads"]):
        rows = joined(path, all_rows(path, manifest, k), head["num_classes"], only="weight")
        found[f"head{k}.centres" if several else "centres"] = rows["weight"]
    return found
