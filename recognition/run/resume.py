"""Which checkpoint a run resumes from, and what the new configuration may change."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from data_tools.common.errors import UserError
from data_tools.common.schema import options_of
from recognition import checkpoint
from recognition.config import Config, with_absolute_paths
from recognition.distributed import collectives
from recognition.distributed.runtime import Runtime
from recognition.distributed.store_exchange import check_same, run_on_all_ranks
from recognition.run.run_dir import OWNED_SECONDS, lock_run_dir, refuse_foreign_files

if TYPE_CHECKING:
    from recognition.run.state import TrainState


def choose_checkpoint(cfg: Config, runtime: Runtime) -> tuple[str | None, list[str]]:
    """The verified checkpoint to resume from, or None for a new run; and what is wrong with newer
    checkpoints.

    With resume=auto a damaged checkpoint is renamed to step-N.damaged and the one before it is
    used, so that no person has to intervene. A checkpoint that resume= names is never renamed.

    Raises:
        FileNotFoundError: resume= names no checkpoint.
        FileExistsError: a new run was requested but the output holds a run already, or files that
            no run wrote.
        Damaged: the checkpoint that resume= names is damaged (the message names the file and the
            preceding checkpoint); or, with resume=auto, all checkpoints are.
        ValueError: the ranks do not see the same checkpoints.
        OSError: a checkpoint cannot be read.
    """
    if runtime.rank == 0:
        _raise_on_all_ranks(runtime, lambda: refuse_foreign_files(cfg.output))
    else:
        _raise_on_all_ranks(runtime, lambda: None)
    if cfg.resume == "auto":
        return newest_intact(cfg, runtime)
    path = _raise_on_all_ranks(runtime, lambda: _named_checkpoint(cfg))
    check_same(runtime.group, resumed_from=path and os.path.basename(path))
    if path is not None:
        with checkpoint.naming_predecessor(path):
            checkpoint.verify(path, runtime.group)
    return path, []


def newest_intact(cfg: Config, runtime: Runtime) -> tuple[str | None, list[str]]:
    """The run's newest intact checkpoint, None if it has no checkpoint; and what is wrong with
    newer ones, which are renamed.

    If a save was killed after writing all files but before the final rename, the rename is done.

    Raises:
        Damaged: every checkpoint is damaged; they keep their names. Only a person may decide to
            start over.
        ValueError: the ranks do not see the same checkpoints.
        OSError: a checkpoint cannot be read, or another run holds the output.
    """
    found = _raise_on_all_ranks(runtime, lambda: checkpoint.copies(cfg.output))
    check_same(runtime.group, resumed_from=[os.path.basename(path) for path in found])
    damaged: dict[str, str] = {}
    for path in found:
        try:
            checkpoint.verify(path, runtime.group)
        except checkpoint.Damaged as error:
            damaged[path] = str(error)
        else:
            break
    else:
        known = [f"{path} is damaged" for path in checkpoint.named_damaged(cfg.output)]
        if damaged or known:
            raise checkpoint.Damaged(
                f"{cfg.output} holds no intact checkpoint: {'; '.join([*damaged.values(), *known])}"
                ". Put a good copy in its place, or start a new run with resume=none and another "
                "output="
            )
        return None, []
    if not damaged and path == checkpoint.final_name(path):
        return path, []

    def rename() -> tuple[list[str], str]:
        if runtime.rank != 0:
            return [], ""
        with lock_run_dir(cfg.output):  # no other run may write there meanwhile
            renamed = [os.path.basename(checkpoint.mark_damaged(each)) for each in damaged]
            return renamed, checkpoint.give_final_name(path)

    what = "rename the damaged checkpoint"
    renamed, path = run_on_all_ranks(runtime.group, what, rename, OWNED_SECONDS)[0]
    reasons = zip(damaged.values(), renamed, strict=True)
    return path, [f"{why}; it is now {name}" for why, name in reasons]


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
    newest = checkpoint.newest(cfg.output)
    if newest and not os.path.samefile(newest, found):
        raise FileExistsError(
            f"{cfg.output} already holds {os.path.basename(newest)}, which resume={cfg.resume} "
            "would abandon: resume=auto continues it; or choose another output="
        )
    return found


def _raise_on_all_ranks(runtime: Runtime, action: Callable[[], Any]) -> Any:
    """This rank's result of `action`; if the action fails on any rank, all ranks raise.

    Raises:
        OSError: the error of this rank, or else of the first rank that failed.
    """
    result, failure = None, None
    try:
        result = action()
    except OSError as error:
        failure = error
    message = failure and f"rank {runtime.rank}: {failure}"
    messages = [text for text in collectives.gather_objects(message, runtime.group) if text]
    if messages:
        raise failure or OSError(messages[0])
    return result


# --- What the configuration changes ---------------------------------------------------------------

# Keys that may change at a resume without a log line: none of them changes a number of the run.
_FREE = {"first_batch", "first_rows", "commit", "world"} | {
    name for name, option in options_of(Config).items() if option.may_change
}


def list_changes(saved: dict[str, Any], cfg: Config, facts: dict[str, Any], path: str) -> list[str]:
    """What has changed since the checkpoint was saved, as "key was -> is".

    Raises:
        ValueError: the change would alter the order of samples.
    """
    now = cfg.recorded() | facts
    order = {"seed": "seed", "labels_crc32": "data set", "shuffle_block": "shuffle_block"}
    if cfg.rec_shares or saved.get("rec_shares"):
        order["rec_shares"] = "rec_shares"
    if cfg.shuffle_block:
        order["shuffle_window"] = "shuffle_window"
    facts_since = ("head_forms", "head_precision", "data_sha256")
    newer = dataclasses.asdict(Config(rec="")) | {key: now[key] for key in facts_since}
    # Keys newer than the checkpoint; and paths, which earlier versions recorded as they were given.
    saved = with_absolute_paths(newer | saved)
    for key, what in order.items():
        if saved.get(key) != now[key]:
            raise UserError(
                f"cannot resume from {path} with another {what}: images of the epoch would be "
                "repeated or skipped. Start a new run with init_from= and another output"
            )
    return [
        f"{key} {saved.get(key)} -> {now[key]}"
        for key in now
        if key not in _FREE and saved.get(key) != now[key]
    ]


# Keys that only a new run reads: at a resume another value would have no effect.
_OF_THE_START = ("init_from", "init_head", "init_label_map")
# Keys that may differ in a complete run: total_steps has been compared already, and accumulation
# follows the world size.
_OF_THE_LENGTH = {"max_steps", "num_epochs", "accumulation"}


def refuse_ignored(state: TrainState, saved: Mapping[str, Any], path: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ValueError: an option of the start was changed in a run that has begun, or an option of the
            steps in a run that has no steps left.
    """
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
    ignored = [x for x in state.changes if x.split()[0] in asked_for - _OF_THE_LENGTH]
    if ignored:
        raise UserError(
            f"{cfg.output} is complete after {state.step} steps, so {', '.join(ignored)} would be "
            "ignored: choose another output= for a new run (init_from= starts it from this "
            "network), or more steps to continue this one"
        )
