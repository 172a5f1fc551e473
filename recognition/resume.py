"""Where a run goes on: the checkpoint that all ranks agree on and that is what was written."""

from __future__ import annotations

import os

from recognition import checkpoint, collectives
from recognition.config import Config
from recognition.run_dir import owned
from recognition.runtime import Runtime


def choose(cfg: Config, runtime: Runtime) -> tuple[str | None, list[str]]:
    """The verified checkpoint that this run continues from, None for a new run; and what was wrong
    with those that were set aside on the way.

    With resume=auto a damaged checkpoint is renamed to step-N.damaged and the one before it is
    taken: nobody has to come for it. One that resume= names is not.

    Raises:
        FileNotFoundError: resume= names no checkpoint.
        FileExistsError: a new run is asked for where one lies already.
        Damaged: the checkpoint that resume= names; with the file, and the checkpoint before it.
        ValueError: the ranks do not see the same checkpoints.
    """
    if cfg.resume == "auto":
        return newest_good(cfg, runtime)
    path = _named(cfg)
    collectives.check_same(runtime.group, resumed_from=path and os.path.basename(path))
    if path is not None:
        try:
            checkpoint.verify(path, runtime.group)
        except checkpoint.Damaged as error:
            raise checkpoint.Damaged(f"{error}{checkpoint.older(path)}") from error
    return path, []


def newest_good(cfg: Config, runtime: Runtime) -> tuple[str | None, list[str]]:
    """The newest checkpoint of the run that is what was written, None where there is none; and what
    was wrong with newer ones, which are renamed.

    Raises:
        ValueError: the ranks do not see the same checkpoints.
        OSError: another run holds the output.
    """
    set_aside: list[str] = []
    while True:
        path = checkpoint.newest(cfg.output)
        collectives.check_same(runtime.group, resumed_from=path and os.path.basename(path))
        if path is None:
            return None, set_aside
        try:
            checkpoint.verify(path, runtime.group)
        except checkpoint.Damaged as error:
            set_aside.append(f"{error}; it is now {_set_aside(path, cfg, runtime)}")
        else:
            return path, set_aside


def _named(cfg: Config) -> str | None:
    """The checkpoint directory that resume= names, None for a new run.

    Raises:
        FileNotFoundError, FileExistsError: as choose().
    """
    if cfg.resume is None:
        if checkpoint.newest(cfg.output):
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


def _set_aside(path: str, cfg: Config, runtime: Runtime) -> str:
    """Rename a damaged checkpoint, on rank 0; its new name."""

    def rename() -> str:
        if runtime.rank != 0:
            return ""
        with owned(cfg.output):  # no other run may be writing there
            return os.path.basename(checkpoint.set_aside(path))

    return collectives.together(runtime.group, "set the checkpoint aside", rename)[0]
