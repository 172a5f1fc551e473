"""A directory that is written aside and takes its name when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


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
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise
        for left_over in [] if keep(self.path) else list(self.path.iterdir()):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"{self.path}: another process is writing it") from error
        except OSError:
            pass  # a file system without locks: Lustre, some NFS
        # The other may have renamed or removed it between our open and our lock.
        if not self.path.exists() or not os.path.samestat(os.fstat(self._lock), self.path.stat()):
            raise FileExistsError(f"{self.path}: another process has just finished with it")

    def rename(self) -> None:
        """It is whole: from now on it is `out`, which must be free or an empty directory."""
        self.path.rename(self.out)
        self._renamed = True

    def close(self, keep: bool = False) -> None:
        if not (self._renamed or keep):
            shutil.rmtree(self.path)
        os.close(self._lock)

    def __enter__(self) -> "PartialDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
