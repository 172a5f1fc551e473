"""What a resumed run is asked to do otherwise than the run that saved: listed, or refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_tools.common.errors import UserError
from data_tools.common.schema import options_of
from recognition.config import Config

if TYPE_CHECKING:
    from recognition.run.build import TrainState

# What may change at a resume without a word: none of it moves a number of the run.
_FREE = {"first_batch", "first_rows", "commit", "world"} | {
    name for name, option in options_of(Config).items() if option.may_change
}


def listed(saved: dict[str, Any], cfg: Config, facts: dict[str, Any], path: str) -> list[str]:
    """What a resumed run does otherwise than the one that saved, "key was -> is".

    Raises:
        ValueError: the order of samples would be another one.
    """
    now = dataclasses.asdict(cfg) | facts
    order = {"seed": "seed", "labels_crc32": "data set", "shuffle_block": "shuffle_block"}
    if cfg.rec_shares or saved.get("rec_shares"):
        order["rec_shares"] = "rec_shares"
    if cfg.shuffle_block:
        order["shuffle_window"] = "shuffle_window"
    facts_since = ("head_forms", "data_sha256")
    newer = dataclasses.asdict(Config(rec="")) | {key: now[key] for key in facts_since}
    saved = newer | saved  # keys newer than the checkpoint
    for key, what in order.items():
        if saved.get(key) != now[key]:
            raise UserError(
                f"cannot resume from {path} with another {what}: images of the epoch would come "
                "twice or never. Start a new run with init_from= and another output"
            )
    return [f"{key} {saved.get(key)} -> {now[key]}" for key in now
            if key not in _FREE and saved.get(key) != now[key]]  # fmt: skip


# Of the start of a new run: another value than the saved one would do nothing.
_OF_THE_START = ("init_from", "init_head", "init_label_map")
# May differ in a run that is complete: its length is compared, the others follow the processes.
_OF_THE_LENGTH = {"max_steps", "num_epochs", "accumulation"}


def refuse_ignored(state: TrainState, saved: Mapping[str, Any], path: str) -> None:
    """Raises: ValueError, where what was asked would be ignored: the start of a run that has begun,
    and all that would change the steps of one that has no more to take."""
    cfg = state.cfg
    for key in _OF_THE_START:
        asked, was = getattr(cfg, key), saved.get(key)
        if asked is not None and (was is None or os.path.abspath(asked) != os.path.abspath(was)):
            raise UserError(
                f"{key}={asked} would be ignored: the run continues from {path}, which began with "
                f"{key}={was or 'none'}. Leave it as it was, or start a new run in another output"
            )
    if state.step < state.schedule.total_steps:
        return
    asked_for = {field.name for field in dataclasses.fields(cfg)} - set(state.facts)
    ignored = [
        change for change in state.changes if change.split()[0] in asked_for - _OF_THE_LENGTH
    ]
    if ignored:
        raise UserError(
            f"{cfg.output} is complete after {state.step} steps, and so {', '.join(ignored)} would "
            "be ignored: choose another output= for a new run (init_from= starts it from this "
            "network), or more steps to go on with it"
        )
