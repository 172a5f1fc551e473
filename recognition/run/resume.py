"""Which checkpoint a run resumes from, and what the new configuration may change."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from data_tools.common.errors import UserError
from data_tools.common.schema import options_of
from recognition import checkpoint
from recognition.config import Config
from recognition.distributed import collectives
from recognition.distributed.runtime import Runtime
from recognition.run.run_dir import lock_run_dir, refuse_foreign_files

if TYPE_CHECKING:
    from recognition.run.state import TrainState


def choose_checkpoint(cfg: Config, runtime: Runtime) -> tuple[str | None, list[str]]:
    """The verified checkpoint that this run continues from, None for a new run; and what was wrong
    with those that were set aside on the way.

    With resume=auto a damaged checkpoint is renamed to step-N.damaged and the one before it is
    taken: nobody has to come for it. One that resume= names is not.

    Raises:
        FileNotFoundError: resume= names no checkpoint.
        FileExistsError: a new run is asked for where one lies already; or the output holds files
            of something else.
        Damaged: the checkpoint that resume= names, with the file and the checkpoint before it; or,
            with resume=auto, every one that there is.
        ValueError: the ranks do not see the same checkpoints.
        OSError: a checkpoint cannot be read.
    """
    _raise_on_all_ranks(
        runtime, lambda: refuse_foreign_files(cfg.output) if runtime.rank == 0 else None
    )
    if cfg.resume == "auto":
        return newest_intact(cfg, runtime)
    path = _raise_on_all_ranks(runtime, lambda: _named_checkpoint(cfg))
    collectives.check_same(runtime.group, resumed_from=path and os.path.basename(path))
    if path is not None:
        try:
            checkpoint.verify(path, runtime.group)
        except checkpoint.Damaged as error:
            raise checkpoint.Damaged(f"{error}{checkpoint.older(path)}") from error
    return path, []


def newest_intact(cfg: Config, runtime: Runtime) -> tuple[str | None, list[str]]:
    """The newest checkpoint of the run that is what was written, None where there is none; and what
    was wrong with newer ones, which are renamed.

    A complete one that a killed save did not rename is given its name.

    Raises:
        Damaged: there are checkpoints, and none is what was written; they stay as they are.
        ValueError: the ranks do not see the same checkpoints.
        OSError: one cannot be read; or another run holds the output.
    """
    found = _checkpoints_of(cfg, runtime)
    wrong: list[tuple[str, str]] = []
    good = None
    for path in found:
        try:
            checkpoint.verify(path, runtime.group)
        except checkpoint.Damaged as error:
            wrong.append((path, str(error)))
        else:
            good = path
            break
    if good is None:
        _refuse_none(cfg, [why for _, why in wrong])
        return None, []
    if not wrong and good == checkpoint.final_name(good):
        return good, []

    def rename() -> tuple[list[str], str]:
        if runtime.rank != 0:
            return [], ""
        with lock_run_dir(cfg.output):  # no other run may be writing there
            aside = [os.path.basename(checkpoint.set_aside(path)) for path, _ in wrong]
            return aside, checkpoint.take(good)

    aside, taken = collectives.run_on_all_ranks(runtime.group, "set the checkpoint aside", rename)[
        0
    ]
    said = [f"{why}; it is now {name}" for (_, why), name in zip(wrong, aside, strict=True)]
    return taken, said


def _checkpoints_of(cfg: Config, runtime: Runtime) -> list[str]:
    """What may be checkpoints of the run, the newest first, alike on all ranks."""
    own = _raise_on_all_ranks(runtime, lambda: checkpoint.copies(cfg.output))
    collectives.check_same(runtime.group, resumed_from=[os.path.basename(path) for path in own])
    return own


def _refuse_none(cfg: Config, wrong: list[str]) -> None:
    """Raises: Damaged, if there were checkpoints: to start anew is then for a person to decide."""
    known = [f"{path} was set aside" for path in checkpoint.named_damaged(cfg.output)]
    if wrong or known:
        raise checkpoint.Damaged(
            f"{cfg.output} holds no checkpoint to continue from: {'; '.join(wrong + known)}. Put a "
            "good copy in its place; or start anew with resume=none and another output="
        )


def _named_checkpoint(cfg: Config) -> str | None:
    """The checkpoint directory that resume= names, None for a new run.

    Raises:
        FileNotFoundError, FileExistsError: as choose_checkpoint().
    """
    if cfg.resume is None:
        if checkpoint.copies(cfg.output) or checkpoint.named_damaged(cfg.output):
            raise FileExistsError(
                f"{cfg.output} holds a run already: choose another output=, or resume=auto"
            )
        return None
    try:
        found = checkpoint.find(cfg.resume)
    except FileNotFoundError:
        raise FileNotFoundError(f"resume={cfg.resume}: no complete checkpoint there") from None
    own = checkpoint.newest(cfg.output)
    if own and not os.path.samefile(own, found):
        raise FileExistsError(
            f"{cfg.output} holds {os.path.basename(own)} already, which resume={cfg.resume} would "
            "leave behind: resume=auto continues it; or choose another output="
        )
    return found


def _raise_on_all_ranks(runtime: Runtime, action: Callable[[], Any]) -> Any:
    """This rank's result of `action`.

    Raises:
        OSError: this rank's own, or that of the first rank that has one.
    """
    result, failure = None, None
    try:
        result = action()
    except OSError as error:
        failure = error
    said = failure and f"rank {runtime.rank}: {failure}"
    others = [text for text in collectives.gather_objects(said, runtime.group) if text]
    if failure is not None:
        raise failure
    if others:
        raise OSError(others[0])
    return result


# --- What the configuration changes ---------------------------------------------------------------

# What may change at a resume without a word: none of it moves a number of the run.
_FREE = {"first_batch", "first_rows", "commit", "world"} | {
    name for name, option in options_of(Config).items() if option.may_change
}


def list_changes(saved: dict[str, Any], cfg: Config, facts: dict[str, Any], path: str) -> list[str]:
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
