"""Checkpoints by global class id: complete or absent, loaded at any number of ranks.

    checkpoints/step-N/
        model.safetensors                the backbone's state
        optimizer.safetensors            its optimiser: "<state>/<parameter>", the loss scale
        rows-<start>-<stop>.safetensors  class rows, their optimiser and loss state, a file a rank
        margin.safetensors               what the loss keeps for the whole model, if anything
        encoder.safetensors              the slow copy of the backbone, if the loss wants one
        manifest.json                    step, samples seen, config, sha256 of each file; last

Nothing in it is a pickle. Every rank writes its rows, rank 0 the rest; when all have reported,
rank 0 writes the manifest and renames the directory from step-N.partial.

Letters: W ranks, C classes, K sub-centres, D embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from recognition.backbones import BACKBONES
from recognition.collectives import together
from recognition.head import PartialFC
from recognition.optim import LossScaler, RowAdamW, RowSGD

FORMAT = 1
_DIRECTORY = "checkpoints"
_MAY_LACK = ("votes",)  # for the log alone; the first checkpoints did not have them


@dataclass
class Parts:
    """What a checkpoint holds, as the run uses it."""

    backbone: nn.Module
    optimizer: Optimizer
    head: PartialFC
    row_optimizer: RowSGD | RowAdamW
    scaler: LossScaler | None
    encoder: nn.Module | None = None  # the slow copy of the backbone that a margin observes

    def rows(self) -> dict[str, Tensor]:
        """All that is held by class, [C_r, ...]: centres, optimiser state, loss state."""
        head = self.head
        state = self.row_optimizer.state | head.class_state()
        return {"weight": head.weight.detach()} | state

    def margin(self) -> dict[str, Tensor]:
        """What the loss and its optimiser keep for the whole model."""
        return self.head.model_state() | self.row_optimizer.model_state


def save(run_dir: str, parts: Parts, facts: Mapping[str, Any], keep: int) -> str:
    """Write checkpoints/step-<facts["step"]> and return its path; the `keep` newest stay.

    facts: JSON for the manifest, `step` among it. Called by every rank of the head's group.

    Raises:
        OSError: some rank could not write. No trace of the attempt stays, older checkpoints do.
    """
    group = parts.head.group
    path = os.path.join(run_dir, _DIRECTORY, f"step-{facts['step']}")
    partial = path + ".partial"
    together(
        group, "prepare the checkpoint", lambda: _prepare(partial) if group.rank() == 0 else None
    )
    try:
        written = together(group, "write the checkpoint", lambda: _write_parts(partial, parts))
        files = {name: entry for entries in written for name, entry in entries.items()}

        def finish() -> None:
            if group.rank() == 0:
                _finish(partial, path, files, parts, facts, keep)

        together(group, "complete the checkpoint", finish)
    except BaseException:
        if group.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def load(path: str, parts: Parts) -> dict[str, Any]:
    """Fill `parts` from the checkpoint at `path`, saved at any number of ranks; return its facts.

    Raises:
        ValueError: it is of another network or class count; the message lists what differs.
        OSError: a file of it is missing or damaged.
    """
    manifest = read_manifest(path)
    head = parts.head
    _check_fit(path, manifest, parts)
    head.drop_step()
    load_state(parts.backbone, _read(path, "model.safetensors", manifest), path)
    _load_optimizer(parts, _read(path, "optimizer.safetensors", manifest), path)
    _read_rows(path, manifest, parts.rows(), head.shard)
    if parts.margin():
        _fill(parts.margin(), _read(path, "margin.safetensors", manifest), path)
    if parts.encoder is not None:
        load_state(parts.encoder, _read(path, "encoder.safetensors", manifest), path)
    head.step = manifest["head_step"]
    return manifest


def newest(run_dir: str) -> str | None:
    """The newest complete checkpoint of a run directory, None where there is none."""
    steps = _complete(run_dir)
    return os.path.join(run_dir, _DIRECTORY, f"step-{steps[-1]}") if steps else None


def read_manifest(path: str) -> dict[str, Any]:
    """The facts of a checkpoint directory.

    Raises:
        FileNotFoundError: not a complete checkpoint.
        OSError: the manifest is damaged.
        ValueError: written by a newer version.
    """
    name = os.path.join(path, "manifest.json")
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it has no manifest.json")
    try:
        with open(name, encoding="utf-8") as file:
            manifest = json.load(file)
        digest = manifest.pop("sha256")
        version = manifest["format"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise OSError(f"{name} is damaged{_older(path)}") from error
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}")
    if digest != _digest(manifest):
        raise OSError(f"{name} is damaged: its sha256 is not its own{_older(path)}")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _older(path: str) -> str:
    """How to go on from the checkpoint before a damaged one, where there is one."""
    root, name = os.path.split(os.path.abspath(path))
    earlier = [s for s in _complete(os.path.dirname(root)) if f"step-{s}" != name]
    if not earlier:
        return ""
    return f"; remove {path} to continue from {os.path.join(root, f'step-{earlier[-1]}')}"


def load_backbone(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run directory (its newest checkpoint) or checkpoint, and its config.

    The module is on the CPU, in fp32 and eval mode.
    """
    checkpoint = path if os.path.isfile(os.path.join(path, "manifest.json")) else newest(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a run directory with one")
    manifest = read_manifest(checkpoint)
    config = manifest["config"]
    module = BACKBONES[config["network"]](embedding_size=config["embedding_size"])
    load_state(module, _read(checkpoint, "model.safetensors", manifest), checkpoint)
    return module.float().eval(), config


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, every name and shape of it.

    Raises:
        ValueError: listing the names that are missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        listed = "\n  ".join(problems[:12]) + ("\n  ..." if len(problems) > 12 else "")
        raise ValueError(f"{source} does not fit this network ({len(problems)} names):\n  {listed}")
    module.load_state_dict(dict(state))


# --- Writing --------------------------------------------------------------------------------------


def _prepare(partial: str) -> None:
    root = os.path.dirname(partial)
    os.makedirs(root, exist_ok=True)
    for name in os.listdir(root):
        if name.endswith(".partial") and os.path.isdir(os.path.join(root, name)):
            shutil.rmtree(os.path.join(root, name))  # left by a killed save
    os.mkdir(partial)


def _write_parts(partial: str, parts: Parts) -> dict[str, dict[str, Any]]:
    """Write this rank's files; {name: size and hash}."""
    if not os.path.isdir(partial):
        raise OSError(f"{partial} is not there: all ranks must share the output file system")
    head = parts.head
    start, stop = head.shard
    files = {f"rows-{start}-{stop}.safetensors": parts.rows()}
    if head.group.rank() == 0:
        if parts.margin():
            files["margin.safetensors"] = parts.margin()
        if parts.encoder is not None:
            files["encoder.safetensors"] = parts.encoder.state_dict()
        files["model.safetensors"] = parts.backbone.state_dict()
        files["optimizer.safetensors"] = optimizer_tensors(parts)
    return {name: _write(os.path.join(partial, name), tensors) for name, tensors in files.items()}


def _write(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file through to the disk; its size and hash."""
    try:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": os.path.getsize(path), "sha256": _sha256(file)}


def _finish(
    partial: str, path: str, files: dict, parts: Parts, facts: Mapping[str, Any], keep: int
) -> None:
    """Manifest, rename, and the end of checkpoints beyond `keep`."""
    missing = [name for name in files if not os.path.isfile(os.path.join(partial, name))]
    if missing:
        raise OSError(f"{missing[0]} is not in {partial}: all ranks must share the output")
    head = parts.head
    manifest = {
        "format": FORMAT,
        **facts,
        "num_classes": head.num_classes,
        "embedding_size": head.embedding_size,
        "num_subcenters": head.num_subcenters,
        "head_step": head.step,
        "row_state": _row_state(parts),
        "margin_state": sorted(parts.margin()),
        "margin": type(head.margin).__name__,
        "world": head.group.size(),
        "files": files,
    }
    with open(os.path.join(partial, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    if os.path.isdir(path):  # the same step of an earlier try
        shutil.rmtree(path)
    os.rename(partial, path)
    _sync(os.path.dirname(path))
    run_dir = os.path.dirname(os.path.dirname(path))
    older = [step for step in _complete(run_dir) if step <= manifest["step"]]
    for step in older[:-keep]:
        shutil.rmtree(os.path.join(run_dir, _DIRECTORY, f"step-{step}"))


def _sync(directory: str) -> None:
    """Write the names in a directory through to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    root = os.path.join(run_dir, _DIRECTORY)
    names = os.listdir(root) if os.path.isdir(root) else []
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
    return sorted(
        s for s in steps if os.path.isfile(os.path.join(root, f"step-{s}", "manifest.json"))
    )


def _sha256(file: BufferedReader | BufferedRandom) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


# --- Reading --------------------------------------------------------------------------------------


def _check_fit(path: str, manifest: Mapping[str, Any], parts: Parts) -> None:
    own = {
        "num_classes": parts.head.num_classes,
        "embedding_size": parts.head.embedding_size,
        "num_subcenters": parts.head.num_subcenters,
        "row_state": _row_state(parts),  # of another optimizer or loss it differs
        "margin_state": sorted(parts.margin()),
        "slow encoder": parts.encoder is not None,
        "margin": type(parts.head.margin).__name__,
    }
    # What the first checkpoints did not have.
    there = {"margin_state": [], "margin": own["margin"], **manifest}
    if not (there["margin_state"] or own["margin_state"] or _by_class(parts)):
        own.pop("margin")  # nothing of it is kept: one may follow the other
    # One that is there and not wanted may lie.
    there["slow encoder"] = parts.encoder is not None and "encoder.safetensors" in manifest["files"]
    wrong = [f"{k} {there[k]} there, {own[k]} here" for k in own if there[k] != own[k]]
    if wrong:
        keys = ("margin", "margin_args", "optimizer")
        saved = [f"{k}={manifest['config'][k]}" for k in keys if k in manifest.get("config", {})]
        raise ValueError(
            f"cannot resume from {path}{', saved with ' * bool(saved)}{', '.join(saved)}: "
            f"{'; '.join(wrong)}. To start a new run from its network, use init_from= and another "
            "output"
        )


def _row_state(parts: Parts) -> list[str]:
    return sorted(name for name in parts.rows() if name not in ("weight", *_MAY_LACK))


def _by_class(parts: Parts) -> bool:
    """Whether the loss keeps something for each class."""
    return any(name.startswith("margin.") for name in parts.rows())


def _fill(own: dict[str, Tensor], saved: Mapping[str, Tensor], path: str) -> None:
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise OSError(f"{path} lacks {name} of {list(tensor.shape)}{_older(path)}")
        tensor.copy_(saved[name])


def _verified(path: str, name: str, manifest: Mapping[str, Any]) -> str:
    """The path of a file of the checkpoint, its content as the manifest says."""
    full = os.path.join(path, name)
    try:
        with open(full, "rb") as file:
            if _sha256(file) != manifest["files"][name]["sha256"]:
                raise OSError(f"{full} is damaged: its sha256 is not the manifest's{_older(path)}")
    except (FileNotFoundError, KeyError) as error:
        raise OSError(f"{path} lacks {name}{_older(path)}") from error
    return full


def _read(path: str, name: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    return safetensors.torch.load_file(_verified(path, name, manifest))


def _read_rows(
    path: str, manifest: Mapping[str, Any], rows: dict[str, Tensor], shard: tuple[int, int]
) -> None:
    """Fill this rank's rows from the files whose class ranges overlap its own."""
    start, stop = shard
    filled = 0
    for name in manifest["files"]:
        found = re.fullmatch(r"rows-(\d+)-(\d+)\.safetensors", name)
        if not found:
            continue
        first, last = int(found[1]), int(found[2])
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        with safe_open(_verified(path, name, manifest), "pt") as file:
            for key, tensor in rows.items():
                if key in _MAY_LACK and key not in file.keys():  # noqa: SIM118  no mapping
                    continue
                tensor[low - start : high - start] = file.get_slice(key)[low - first : high - first]
        filled += high - low
    if filled != stop - start:
        raise OSError(f"{path} lacks {stop - start - filled} of the classes {start} to {stop - 1}")


# --- The backbone's optimiser ---------------------------------------------------------------------


def optimizer_tensors(parts: Parts) -> dict[str, Tensor]:
    """The state of the backbone's optimiser, "<state>/<parameter>", and of the loss scale."""
    names = [name for name, _ in _trained(parts.backbone)]
    state = parts.optimizer.state_dict()["state"]
    tensors = {
        f"{key}/{names[index]}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }
    if parts.scaler is not None:
        tensors |= {f"scaler/{key}": value for key, value in parts.scaler.state_dict().items()}
    return tensors


def _load_optimizer(parts: Parts, tensors: dict[str, Tensor], path: str) -> None:
    place = {name: (i, p) for i, (name, p) in enumerate(_trained(parts.backbone))}
    scaler: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "scaler":
            scaler[name] = value
            continue
        if name not in place:
            raise ValueError(f"cannot resume from {path}: optimiser state of unknown {name}")
        index, parameter = place[name]
        if value.shape == parameter.shape:
            # The fused step walks both in memory order: the state needs the parameter's strides.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index, {})[kind] = value
    if parts.scaler is not None and scaler:
        parts.scaler.load_state_dict(scaler)
    groups = parts.optimizer.state_dict()["param_groups"]
    parts.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trained(backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters in the order in which the optimiser counts them."""
    return [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
