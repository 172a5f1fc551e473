"""Verifying checkpoints and loading them into a run's parts, at any number of ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError
from recognition.backbones import make_backbone
from recognition.checkpoint.directory import Damaged, find, naming_predecessor
from recognition.checkpoint.manifest import RowFile, all_rows, read_manifest
from recognition.checkpoint.parts import HeadParts, Parts, load_optimizer
from recognition.checkpoint.tensors import problems, read, readable
from recognition.distributed.store_exchange import run_on_all_ranks
from recognition.head import PartialFC

_SHOWN = 8  # names of each kind that an error lists
_MAY_LACK = ("votes",)  # for the log alone; the first checkpoints had none


# --- The network alone ----------------------------------------------------------------------------


def load_backbone(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run directory (its newest checkpoint) or of a checkpoint, and its config.

    The module is on the CPU, in fp32 and eval mode.

    Raises:
        FileNotFoundError: there is no checkpoint.
        Damaged: a file has changed; the message names it and the preceding checkpoint.
    """
    checkpoint = find(path)
    with naming_predecessor(checkpoint):
        manifest = read_manifest(checkpoint)
        state = read(checkpoint, "model.safetensors", manifest)
    config = manifest["config"]
    arguments = config.get("network_args", {})
    module = make_backbone(config["network"], config["embedding_size"], arguments)
    load_state(module, state, checkpoint)
    return module.float().eval(), config


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, all names and shapes.

    Raises:
        ValueError: listing the names that are missing, unexpected, or of another shape.
    """
    if wrong := misfit(module, state, source):
        raise UserError(wrong)
    module.load_state_dict(dict(state))


def misfit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """Why a state does not fit a network; "" if it does."""
    expected = module.state_dict()
    wrong = (
        [f"missing {name}" for name in expected if name not in state],
        [f"unexpected {name}" for name in state if name not in expected],
        [
            f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    )
    if count := sum(map(len, wrong)):
        shown = [line for kind in wrong for line in kind[:_SHOWN]]
        listed = "\n  ".join(shown) + ("\n  ..." if count > len(shown) else "")
        return f"{source} does not fit this network ({count} names):\n  {listed}"
    return ""


# --- A run ----------------------------------------------------------------------------------------


def verify(
    path: str, group: ProcessGroup, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Compare the files of a checkpoint with their hashes, each rank a share of the bytes.

    wanted: whether to read a file of that name.

    Raises:
        Damaged: on all ranks, naming the files.
        OSError: a rank cannot read a file.
    """

    def local_share() -> list[str]:
        try:
            manifest = read_manifest(path)
        except (Damaged, FileNotFoundError) as error:
            return [str(error)]
        step = re.fullmatch(r"step-(\d+)\..*", os.path.basename(path))
        if step and int(step[1]) != manifest["step"]:
            return [f"{path} is a checkpoint of step {manifest['step']}"]
        sizes = {name: x["bytes"] for name, x in manifest["files"].items() if wanted(name)}
        return problems(path, manifest, _shares(sizes, group.size())[group.rank()])

    found = run_on_all_ranks(group, "verify the checkpoint", local_share)
    if wrong := list(dict.fromkeys(text for local in found for text in local)):
        raise Damaged("; ".join(wrong))


def _shares(sizes: Mapping[str, int], world: int) -> list[list[str]]:
    """The files of each rank: dealt out from the largest on, to the rank with fewest bytes."""
    shares: list[list[str]] = [[] for _ in range(world)]
    filled = [0] * world
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += sizes[name]
    return shares


def load(path: str, parts: Parts) -> dict[str, Any]:
    """Load the checkpoint at `path`, saved at any number of ranks, into `parts`; its manifest.

    The files are not hashed: call verify() first.

    Raises:
        ValueError: the network, the head or the optimiser differs; the message says how.
        Damaged: a tensor is missing.
    """
    manifest = read_manifest(path)
    _check_fit(path, manifest, parts)
    load_state(parts.backbone, read(path, "model.safetensors"), path)
    load_optimizer(parts, read(path, "optimizer.safetensors"), path, manifest["step"] > 0)
    for i, (_, part) in enumerate(parts.named_heads()):
        part.head.drop_step()
        _load_head(path, manifest, i, part.head, part.rows(), part.margin())
    if parts.encoder is not None:
        load_state(parts.encoder, read(path, "encoder.safetensors"), path)
    return manifest


def load_head(path: str, number: int, head: PartialFC) -> None:
    """Load a head without its optimiser's state from a checkpoint saved at any number of ranks.

    Raises:
        Damaged: a tensor is missing.
    """
    head.settle()
    rows = {"weight": head.weight.detach()} | head.class_state()
    _load_head(path, read_manifest(path), number, head, rows, head.model_state())


def _load_head(
    path: str,
    manifest: Mapping[str, Any],
    number: int,
    head: PartialFC,
    rows: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
) -> None:
    """Fill this rank's rows from the files whose classes overlap its own, and the model's state."""
    start, stop = head.shard
    for file in all_rows(path, manifest, number):
        low, high = max(start, file.start), min(stop, file.stop)
        if low < high:
            for name, part in _read_rows(path, file, low, high, list(rows)):
                _copy({name: part}, name, rows[name][low - start : high - start], path)
    if model_state:
        prefix = f"head{number}-" if len(manifest["heads"]) > 1 else ""
        saved = read(path, f"{prefix}margin.safetensors")
        for name, tensor in model_state.items():
            _copy(saved, name, tensor, path)
    head.step = manifest["heads"][number]["step"]


def _copy(saved: Mapping[str, Tensor], name: str, target: Tensor, path: str) -> None:
    found = list(saved[name].shape) if name in saved else "missing"
    if found != list(target.shape):
        raise Damaged(f"{path}: {name} is {found}, expected {list(target.shape)}")
    target.copy_(saved[name])


def _read_rows(
    path: str, file: RowFile, low: int, high: int, names: list[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the classes [low, high) in a file; names: which, None for all."""
    full = os.path.join(path, file.name)
    with readable(path, file.name), safe_open(full, "pt") as opened:
        present = opened.keys()
        for name in present if names is None else names:
            if name in _MAY_LACK and name not in present:
                continue
            saved = opened.get_slice(name)
            if saved.get_shape()[:1] != [file.stop - file.start]:
                raise Damaged(f"{full}: {name} is {saved.get_shape()}")
            yield name, saved[low - file.start : high - file.start]


def joined(
    path: str, manifest: Mapping[str, Any], head: int, names: list[str] | None = None
) -> dict[str, Tensor]:
    """Everything that a head holds per class, or only `names`: [C, ...] by name.

    Raises:
        Damaged: the files do not hold every class exactly once.
    """
    held: dict[str, Tensor] = {}
    for file in all_rows(path, manifest, head):
        for name, part in _read_rows(path, file, file.start, file.stop, names):
            if name not in held:
                num_classes = manifest["heads"][head]["num_classes"]
                held[name] = torch.empty(num_classes, *part.shape[1:], dtype=part.dtype)
            held[name][file.start : file.stop] = part
    return held


def _check_fit(path: str, manifest: Mapping[str, Any], parts: Parts) -> None:
    wrong = []
    if len(manifest["heads"]) != len(parts.heads):
        wrong.append(f"{len(manifest['heads'])} heads there, {len(parts.heads)} here")
    for (prefix, part), there in zip(parts.named_heads(), manifest["heads"], strict=False):
        wrong += [f"{prefix}{difference}" for difference in _differences(part, there)]
    # An encoder that the checkpoint has and this run does not need is ignored.
    if parts.encoder is not None and "encoder.safetensors" not in manifest["files"]:
        wrong.append("slow encoder False there, True here")
    if wrong:
        keys = ("margin", "margin_args", "optimizer")
        saved = [f"{k}={manifest['config'][k]}" for k in keys if k in manifest.get("config", {})]
        raise UserError(
            f"cannot resume from {path}{', saved with ' * bool(saved)}{', '.join(saved)}: "
            f"{'; '.join(wrong)}. To start a new run from its network, use init_from= and another "
            "output"
        )


def _differences(part: HeadParts, there: Mapping[str, Any]) -> list[str]:
    here = part.facts()
    del here["step"]
    if not (there["margin_state"] or here["margin_state"]):
        kept = here["row_state"]
        if not any(name.startswith("margin.") for name in kept):
            del here["margin"]  # neither loss has a state: one may follow the other
    return [f"{k} {there.get(k)} there, {here[k]} here" for k in here if there.get(k) != here[k]]
