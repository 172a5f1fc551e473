"""The schema of a run: every key, its default and its unit; and load(), which holds recipes to it.

A recipe is a Python file that defines `config`, an EasyDict with the deltas from these defaults.
`key=value` on the command line passes the same checks.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import os
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.common.errors import UserError, UserKeyError, UserTypeError


def _between(default: Any, low: float, high: float = math.inf) -> Any:
    """A field with an inclusive range."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Lengths are in epochs, steps are optimiser steps."""

    # Data
    # Directory of shards, or a classic InsightFace directory; or several, read as one with the
    # classes of each beside those of the others.
    rec: str | list[str]
    rec_shares: list[int] = field(default_factory=list)  # of a batch, for each rec; []: by size
    # A head for each rec with settings of its own (HEAD_KEYS, {} for the run's); []: one over all.
    rec_heads: list[dict] = field(default_factory=list)
    val_targets: list[str] = field(default_factory=list)  # <name>.bin files in rec
    num_classes: int | None = None  # checked against rec; read from it when absent
    num_image: int | None = None  # likewise
    num_workers: int = _between(2, 1)  # decoding threads per process
    loader: Literal["cpu", "dali"] = (
        "cpu"  # dali decodes on the GPU; on the CPU where there is none
    )
    # AdaFace's augmentations, how often each; its models had 0.2. Mirroring is always on.
    crop_augmentation_prob: float = _between(0.0, 0.0, 1.0)
    low_res_augmentation_prob: float = _between(0.0, 0.0, 1.0)
    photometric_augmentation_prob: float = _between(0.0, 0.0, 1.0)
    shuffle_block: int = _between(0, 0)  # neighbouring images shuffled as one; 0: each alone
    shuffle_window: int = _between(64, 1)  # blocks that are mixed

    # Network and loss
    network: str = "r50"
    network_args: dict = field(default_factory=dict)  # dropout (r*), drop_path, mask_ratio... (vit)
    embedding_size: int = _between(512, 1)
    margin: str = "arcface"
    margin_args: dict = field(default_factory=dict)  # as recognition.losses.MARGINS[margin] takes
    interclass_filtering_threshold: float = _between(0.0, 0.0, 1.0)  # cosine; 0: off
    sample_rate: float = _between(1.0, 0.0, 1.0)  # share of the classes drawn as negatives
    num_subcenters: int = _between(1, 1)
    init_from: str | None = None  # backbone to start from: a run, or published weights
    # Of init_from's training images; auto: BGR for AdaFace's own checkpoints, else RGB.
    init_color_order: Literal["auto", "RGB", "BGR"] = "auto"
    init_head: str | None = None  # centres: features, .onnx, a run, or partial-FC shards' directory
    init_label_map: str | None = None  # a line for each class: its id in init_head, -1 for none
    # A bigger network to learn from beside the margin loss: a run, .onnx, or .npy [images, D].
    teacher: str | None = None
    teacher_weight: float = _between(1.0, 0.0)
    teacher_loss: Literal["cosine", "feature"] = "cosine"
    freeze: list[str] = field(default_factory=list)  # patterns of backbone parameters: layer1.*

    # Optimisation
    batch_size: int | None = _between(None, 1)  # images per process and micro-step
    global_batch_size: int | None = _between(None, 1)  # images per step over all processes
    accumulation: int = _between(1, 1)  # micro-steps per step
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = _between(0.1, 0.0)
    momentum: float = _between(0.9, 0.0, 1.0)
    weight_decay: float = _between(5e-4, 0.0)
    schedule: Literal["polynomial", "step", "cosine"] = "polynomial"
    lr_power: float = _between(1.0, 0.0)  # of the polynomial; InsightFace's tables used 2
    lr_milestones: list[float] = field(default_factory=list)  # epochs of the step schedule
    lr_gamma: float = _between(0.1, 0.0, 1.0)  # factor at each milestone
    warmup_epochs: float = _between(0.0, 0.0)
    num_epochs: float | None = _between(None, 0.0, 1e6)  # 20 when max_steps is absent too
    max_steps: int | None = _between(None, 1)
    clip_norm: float | None = _between(5.0, 0.0)  # of the backbone's gradient; None: off

    # Numerics
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = (
        "auto"  # auto: bf16 on GPUs that have it
    )
    sync_bn: bool = False
    # A spike: so many times the running mean of the last steps; None: not looked at.
    loss_spike_factor: float | None = _between(None, 1.0)
    norm_spike_factor: float | None = _between(None, 1.0)  # of the backbone's gradient norm
    # rollback: back to the newest checkpoint, without the samples from there to the spike; then a
    # non-finite value is one too.
    on_spike: Literal["warn", "stop", "rollback"] = "warn"
    max_rollbacks: int = _between(3, 1)  # of a run; then it stops
    # The head's products of bf16 numbers, summed in fp32: for GPUs. Logits are fp32 in both.
    head_precision: Literal["full", "bf16"] = "full"
    head_stored_mib: int = _between(16, 0)  # per process, of results kept for its backward
    # The form of its reduction. auto: on a GPU the quickest of a few steps at the start, the same
    # when the run goes on; on a CPU native, built by the C compiler, where there are many classes.
    # What cannot be done falls back to plain and is said.
    head_kernel: Literal["auto", "plain", "native", "compiled", "triton"] = "auto"
    # host: class centres and their optimiser state in the host's memory, on the device only what a
    # step samples of them; for more classes than the device holds.
    head_storage: Literal["device", "host"] = "device"
    # The backward updates the class rows chunk by chunk, so that no gradient of them exists. Not
    # with accumulation, fp16 or rollback; a non-finite step stops the run after it has moved rows.
    update_in_backward: bool = False
    compile: bool = False  # the backbone, by torch.compile: minutes at the start
    gradient_compression: Literal["none", "bf16"] = "none"  # of what the ranks exchange of it
    profile: bool = False  # write a trace of a few steps, trace-<rank>.json
    seed: int = _between(0, 0)

    # The run
    output: str = "runs/default"
    resume: str | None = "auto"  # newest checkpoint of output; none: start anew; or a directory
    log_every: int = _between(10, 1)  # steps
    verify_every: int = _between(2000, 1)  # steps; also before the first and after the last
    checkpoint_every: int = _between(2000, 1)  # steps; also after the last
    elastic: Literal["auto", "batch_size", "accumulation", "lr"] = (
        "auto"  # what follows when a run goes on at another number of processes, see resize.py
    )
    collective_timeout: float = _between(600.0, 1.0)  # s that ranks wait for one; then all end
    preflight_seconds: float = _between(10.0, 0.0)  # s, about, for the checks at the start; 0: off
    debug: bool = False  # compare the ranks' copies; note which images each step has, in samples/
    debug_every: int = _between(100, 1)  # steps between two comparisons
    save_async: bool = True  # write beside the training; costs a copy of the state in host memory
    keep_checkpoints: int = _between(3, 1)  # newest ones kept
    keep_every: int | None = _between(None, 1)  # steps; those of its multiples are kept too
    keep_best: str | None = None  # and the one that is best on this val_target

    @property
    def recs(self) -> list[str]:
        return [self.rec] if isinstance(self.rec, str) else self.rec

    def global_batch(self, world: int) -> int:
        """Images of one optimiser step."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        return (self.batch_size or 128) * world * self.accumulation

    def total_steps(self, num_images: int, world: int) -> int:
        if self.max_steps is not None:
            return self.max_steps
        epochs = 20 if self.num_epochs is None else self.num_epochs
        return max(math.ceil(epochs * num_images / self.global_batch(world)), 1)


# What a data set's own head may have of its own; loss_weight is 1 where it is not said.
HEAD_KEYS = (
    "margin", "margin_args", "interclass_filtering_threshold", "sample_rate", "num_subcenters",
    "loss_weight",
)  # fmt: skip

# Two keys that say the same thing: at most one of them in one place.
_ALTERNATIVES = [("batch_size", "global_batch_size"), ("max_steps", "num_epochs")]

# Keys of arcface_torch: what to write instead.
_RENAMED = {
    "num_epoch": "num_epochs",
    "warmup_epoch": "warmup_epochs",
    "gradient_acc": "accumulation",
    "fp16": 'precision="fp16"',
    "dali": 'loader: "cpu" or "dali"',
    "verbose": "verify_every",
    "frequent": "log_every",
    "save_all_states": "checkpoint_every (every checkpoint resumes)",
}


def load(path: str, overrides: Sequence[str] = (), safe: bool = False) -> Config:
    """The recipe at `path` with `key=value` overrides, checked.

    A .json holds the keys as one object; anything else is Python, and is run. safe: refuse that.

    Raises:
        FileNotFoundError: no such recipe.
        PermissionError: it is Python, and `safe`.
        KeyError: an unknown key; the message names the nearest.
        TypeError, ValueError: a value of the wrong type or out of its range.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no recipe at {path}")
    json_recipe = path.endswith(".json")
    if safe and not json_recipe:
        raise PermissionError(
            f"{path} is a program, which --safe does not run: give its keys in a .json"
        )
    try:
        if json_recipe:
            with open(path, encoding="utf-8") as file:
                recipe = json.load(file)
        else:
            recipe = runpy.run_path(path).get("config")
    except Exception as error:  # whatever the recipe's own code raises
        raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, Mapping):
        raise UserTypeError(
            f"{path} defines no `config`: it must hold an EasyDict with the keys it sets"
        )
    values = _translate(dict(recipe), path)
    if "output" not in values:
        values["output"] = os.path.join("runs", os.path.splitext(os.path.basename(path))[0])
    typed = _translate(_parse(overrides), "the command line")
    for pair in _ALTERNATIVES:
        if any(key in typed for key in pair):
            values = {key: value for key, value in values.items() if key not in pair}
    for what in ("margin", "network"):
        args = f"{what}_args"
        if what in typed and typed[what] != values.get(what):
            values.pop(args, None)  # they belong to the recipe's
        for key in [key for key in typed if key.startswith(f"{args}.")]:
            typed[args] = {**values.get(args, {}), **typed.get(args, {})}
            typed[args][key.removeprefix(f"{args}.")] = typed.pop(key)
    return make(values | typed)


def make(values: Mapping[str, Any]) -> Config:
    """A Config of `values`, every one checked for name, type and range."""
    hints = typing.get_type_hints(Config)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            raise UserKeyError(_unknown(str(key), fields))
        checked[key] = _checked(key, value, hints[key], fields[key].metadata.get("range"))
    if checked.get("clip_norm") == 0:
        raise UserError("clip_norm=0 would stop the backbone: a positive number, or none for off")
    if checked.get("update_in_backward"):
        wanted = {"accumulation": checked.get("accumulation", 1) > 1}
        wanted["precision"] = checked.get("precision") == "fp16"
        wanted["on_spike"] = checked.get("on_spike") == "rollback"
        for key in [key for key in wanted if wanted[key]]:
            raise UserError(
                f"update_in_backward with {key}={checked[key]}: it keeps no gradient of the class "
                "rows to add to, to scale or to leave out; choose one of the two"
            )
    if isinstance(checked.get("rec"), list) and len(checked["rec"]) < 2:
        checked["rec"] = "".join(checked["rec"])
    if checked.get("init_label_map") and not checked.get("init_head"):
        raise UserError("init_label_map says which class of init_head= is which: give that too")
    for name in checked.get("val_targets", []):
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise UserError(f"val_targets={name!r}: the name of a .bin of rec, not a path")
    if not checked.get("rec"):
        raise UserKeyError("rec is missing: say which data set to train on, rec=DIRECTORY")
    cfg = Config(**checked)
    for k in range(len(cfg.rec_heads)):
        of_head(cfg, k)
    return cfg


def of_head(cfg: Config, k: int) -> Config:
    """The configuration of a data set's own head.

    Raises:
        KeyError, TypeError, ValueError: as make(), and for a key that is not of a head.
    """
    place = f"rec_heads[{k}]"
    own = _translate(dict(cfg.rec_heads[k]), place)
    for key in own:
        if key not in HEAD_KEYS:
            raise UserKeyError(f"{place}: {_unknown(key, dict.fromkeys(HEAD_KEYS))}")
    _checked(f"{place}: loss_weight", own.pop("loss_weight", 1.0), float, (0.0, math.inf))
    if own.get("margin", cfg.margin) != cfg.margin:
        own.setdefault("margin_args", {})  # the run's belong to its own margin
    try:
        return make({**dataclasses.asdict(cfg), "rec_heads": [], **own})
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error.args[0]}") from error


def _translate(values: dict[str, Any], place: str) -> dict[str, Any]:
    """arcface_torch's margin_list taken, its other keys refused by their new name."""
    if values.get("resume") is False:  # arcface_torch's default
        values["resume"] = None
    for key in values:
        if key in _RENAMED:
            raise UserKeyError(f"{key} in {place} is called {_RENAMED[key]} here")
    for pair in _ALTERNATIVES:
        if all(values.get(key) is not None for key in pair):
            raise UserError(f"{place} sets both {pair[0]} and {pair[1]}: keep one")
    if "margin_list" in values:
        margins = values.pop("margin_list")
        if "margin" in values or "margin_args" in values:
            raise UserError(f"{place} sets margin_list beside margin or margin_args: keep one")
        if not isinstance(margins, list | tuple) or len(margins) != 3:
            raise UserError(f"margin_list={margins!r} in {place}: expected (m1, m2, m3)")
        m1, m2, m3 = margins
        values |= {"margin": "combined", "margin_args": {"m1": m1, "m2": m2, "m3": m3}}
    return values


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not key=value")
        try:
            typed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            typed[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return typed


def _checked(key: str, value: Any, hint: Any, bounds: tuple[float, float] | None) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if isinstance(value, list | tuple) and list in [typing.get_origin(o) for o in options]:
        kind = next(option for option in options if typing.get_origin(option) is list)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{key}={value!r}: one of {', '.join(typing.get_args(kind))}")
        return value
    if typing.get_origin(kind) is list:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserTypeError(f"{key}={value!r}: expected a list")
        inner = typing.get_args(kind)[0]
        return [_checked(f"{key}[{i}]", item, inner, None) for i, item in enumerate(items)]
    if kind is dict:
        if not isinstance(value, Mapping):
            raise UserTypeError(f"{key}={value!r}: expected a dict")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a directory called 2024, typed on the command line
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserTypeError(f"{key}={value!r} is {type(value).__name__}: expected {kind.__name__}")
    if bounds and not bounds[0] <= value <= bounds[1]:
        limit = f"at least {bounds[0]}" if bounds[1] == math.inf else f"{bounds[0]} to {bounds[1]}"
        raise UserError(f"{key}={value}: expected {limit}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{key}={value}: expected a finite number")
    return value


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
    return f"unknown key {key!r}: {hint}"
