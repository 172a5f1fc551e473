"""A directory that is written aside and takes its name when it is whole."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from data_tools.common import locks


class PartialDirectory:
    """`OUT.partial`, empty and this process's own until it is closed or becomes `OUT`.

    What a killed process left in it is cleared, unless `keep(path)` says that it can be used.
    `close` removes it unless `rename` came before, or it says `keep`.

    Raises: FileExistsError if another process is writing it.
    """

    def __init__(self, out: Path, keep: Callable[[Path], bool] = lambda path: False) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._renamed = False
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._locked = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            lock = out.with_name(f".{out.name}.lock")
            busy = f"{self.path}: another process is writing it"
            stack.enter_context(locks.hold(lock, busy, remove=True))
            self.path.mkdir(exist_ok=True)
            for left_over in [] if keep(self.path) else list(self.path.iterdir()):
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            self._locked = stack.pop_all()

    def rename(self) -> None:
        """It is whole: from now on it is `out`, which must be free or an empty directory."""
        self.path.rename(self.out)
        self._renamed = True

    def close(self, keep: bool = False) -> None:
        with self._locked:
            if not (self._renamed or keep):
                shutil.rmtree(self.path)

    def __enter__(self) -> "PartialDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
