"""Filling a run's parts from a checkpoint, at any number of ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError
from recognition.checkpoint.backbone import load_state
from recognition.checkpoint.directory import Damaged, all_rows, read_manifest
from recognition.checkpoint.optimizer import load_optimizer
from recognition.checkpoint.parts import MAY_LACK, HeadParts, Parts
from recognition.checkpoint.tensors import problem, readable
from recognition.distributed.collectives import run_on_all_ranks
from recognition.head import PartialFC


def verify(
    path: str, group: ProcessGroup, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Hold every file of a checkpoint against its hash, each rank a share of the bytes.

    wanted: whether a file of that name is to be looked at.

    Raises:
        Damaged: on every rank alike, naming the files.
        OSError: some rank cannot read it at all.
    """

    def own_share() -> list[str]:
        try:
            manifest = read_manifest(path)
        except (Damaged, FileNotFoundError) as error:
            return [str(error)]
        step = re.fullmatch(r"step-(\d+)\..*", os.path.basename(path))
        if step and int(step[1]) != manifest["step"]:
            return [f"{path} is a checkpoint of step {manifest['step']}"]
        chosen = {name: entry for name, entry in manifest["files"].items() if wanted(name)}
        names = _share(chosen, group.size())[group.rank()]
        return [wrong for name in names if (wrong := problem(path, name, manifest))]

    found = run_on_all_ranks(group, "verify the checkpoint", own_share)
    if wrong := list(dict.fromkeys(text for own in found for text in own)):
        raise Damaged("; ".join(wrong))


def _share(files: Mapping[str, Mapping[str, Any]], world: int) -> list[list[str]]:
    """The files dealt out by their sizes, the largest first, always to who has least."""
    shares: list[list[str]] = [[] for _ in range(world)]
    bytes_of = [0] * world
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = bytes_of.index(min(bytes_of))
        shares[least].append(name)
        bytes_of[least] += files[name]["bytes"]
    return shares


def load(path: str, parts: Parts) -> dict[str, Any]:
    """Fill `parts` from the checkpoint at `path`, saved at any number of ranks; return its facts.

    The files are taken as they are: verify() comes first.

    Raises:
        ValueError: it is of another network or class count; the message lists what differs.
        Damaged: something is not in it.
    """
    manifest = read_manifest(path)
    _check_fit(path, manifest, parts)
    load_state(parts.backbone, _read(path, "model.safetensors"), path)
    state = _read(path, "optimizer.safetensors")
    started = manifest["step"] > 0
    load_optimizer(parts.backbone, parts.optimizer, parts.scaler, state, path, started)
    for i, (prefix, part) in enumerate(parts.named_heads()):
        part.head.drop_step()
        _read_rows(path, manifest, i, part.head.shard, part.rows())
        if part.margin():
            _fill(part.margin(), _read(path, f"{prefix}margin.safetensors"), path)
        part.head.step = manifest["heads"][i]["step"]
    if parts.encoder is not None:
        load_state(parts.encoder, _read(path, "encoder.safetensors"), path)
    return manifest


def load_head(path: str, number: int, head: PartialFC) -> None:
    """Fill a head, without an optimiser's state, from a checkpoint saved at any number of ranks.

    Raises:
        Damaged: something is not in it.
    """
    manifest = read_manifest(path)
    head.settle()
    rows = {"weight": head.weight.detach()} | head.class_state()
    _read_rows(path, manifest, number, head.shard, rows)
    if state := head.model_state():
        prefix = f"head{number}-" if len(manifest["heads"]) > 1 else ""
        _fill(state, _read(path, f"{prefix}margin.safetensors"), path)
    head.step = manifest["heads"][number]["step"]


def _read(path: str, name: str) -> dict[str, Tensor]:
    with readable(path, name):
        return safetensors.torch.load_file(os.path.join(path, name))


def _check_fit(path: str, manifest: Mapping[str, Any], parts: Parts) -> None:
    wrong = []
    if len(manifest["heads"]) != len(parts.heads):
        wrong.append(f"{len(manifest['heads'])} heads there, {len(parts.heads)} here")
    for (prefix, part), there in zip(parts.named_heads(), manifest["heads"], strict=False):
        wrong += [f"{prefix}{difference}" for difference in _differences(part, there)]
    # One that is there and not wanted may lie.
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
    own = part.facts()
    del own["step"]
    kept = there["margin_state"] or own["margin_state"] or part.keeps_by_class()
    if not kept or there["margin"] is None:
        del own["margin"]  # nothing of it is kept: one may follow the other
    return [f"{k} {there.get(k)} there, {own[k]} here" for k in own if there.get(k) != own[k]]


def _fill(own: dict[str, Tensor], saved: Mapping[str, Tensor], path: str) -> None:
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise Damaged(f"{path} lacks {name} of {list(tensor.shape)}")
        tensor.copy_(saved[name])


def _read_rows(
    path: str,
    manifest: Mapping[str, Any],
    head: int,
    shard: tuple[int, int],
    rows: Mapping[str, Tensor],
) -> None:
    """Fill this rank's rows from the files whose class ranges overlap its own."""
    start, stop = shard
    for name, first, last in all_rows(path, manifest, head):
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        with readable(path, name), safe_open(os.path.join(path, name), "pt") as file:
            for key, tensor in rows.items():
                if key in MAY_LACK and key not in file.keys():  # noqa: SIM118  no mapping
                    continue
                saved = file.get_slice(key)
                if saved.get_shape() != [last - first, *tensor.shape[1:]]:
                    raise Damaged(f"{os.path.join(path, name)}: {key} is {saved.get_shape()}")
                tensor[low - start : high - start] = saved[low - first : high - first]
