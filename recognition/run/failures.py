"""What a failed rank leaves: its traceback on stderr and in the run directory."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import traceback


def record(error: BaseException, directory: str, rank: int) -> None:
    """Print the error's whole traceback on stderr, with its causes, and append it to
    error-rank-<rank>.txt in `directory`, if there is one. Never fails."""
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, end="", flush=True)
    if not directory:
        return
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with (
        contextlib.suppress(OSError),
        open(os.path.join(directory, f"error-rank-{rank}.txt"), "a", encoding="utf-8") as file,
    ):
        file.write(f"{now}, process {os.getpid()}\n{text}\n")
