"""A directory that is written aside and takes its name when it is whole.

Every directory that this program may empty or remove holds the file MARKER. A directory without it
belongs to the user: it is refused by name and left as it is; so is a link.
"""

import contextlib
import os
import stat
from pathlib import Path

from data_tools.common import files, locks

MARKER = ".arcline-partial"
_TEXT = b"arcline made this directory while it was writing, and may remove it.\n"


class PartialDirectory:
    """`OUT.partial`, this process's own until it is closed or becomes `OUT`.

    What a killed process left in it is cleared, unless `clear` is False.
    `close` removes it unless `rename` came before, or it says `keep`.

    Raises:
        FileExistsError: another process is writing it; it, or OUT, is a link; it is a file; or it
            holds files and no MARKER.
        OSError: it cannot be made or read. What was there is then left as it was.
    """

    def __init__(self, out: Path, clear: bool = True) -> None:
        self.out = out
        self.path = out.with_name(out.name + files.PARTIAL)
        self.renamed = False
        if files.is_link(out):
            raise FileExistsError(
                f"{out} is a link, which a directory cannot replace: name the directory that it "
                f"points to ({os.path.realpath(out)})"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._locked = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            busy = f"{self.path}: another process is writing it"
            lock = out.with_name(f".{out.name}.lock")
            stack.enter_context(locks.hold(lock, busy, remove=True))
            check_ours(self.path)
            try:
                self.path.mkdir()
                self.is_new = True
            except FileExistsError:
                self.is_new = False
            mark(self.path)
            if clear:
                self.clear()
            self._locked = stack.pop_all()

    def clear(self) -> None:
        """Remove all that is in it."""
        _empty(self.path)

    def rename(self, unmark_it: bool = True) -> None:
        """It is whole: from now on it is `out`, which must be free or an empty directory.

        unmark_it: take MARKER out of `out`; False leaves that to the caller.
        """
        self.path.rename(self.out)
        self.renamed = True
        if unmark_it:  # not before the rename: killed in between, it must still be ours
            unmark(self.out)

    def close(self, keep: bool = False) -> None:
        with self._locked:
            if not (self.renamed or keep):
                remove(self.path)

    def __enter__(self) -> "PartialDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mark(directory: Path) -> None:
    """Put MARKER into a directory: it is ours to remove."""
    descriptor = os.open(directory / MARKER, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with files.naming(directory / MARKER):
            os.write(descriptor, _TEXT)
    finally:
        os.close(descriptor)


def unmark(directory: Path) -> None:
    """Take MARKER away: the directory is a finished one, and the user's."""
    (directory / MARKER).unlink(missing_ok=True)


def is_marked(directory: Path) -> bool:
    """Whether `directory`, itself no link, holds MARKER. Raises: OSError if nobody can tell."""
    return not files.is_link(directory) and files.is_file(directory / MARKER)


def is_empty(directory: Path) -> bool:
    """Whether `directory`, itself no link, is there and holds nothing, not even MARKER. Raises:
    OSError if nobody can tell."""
    return not files.is_link(directory) and files.is_dir(directory) and not files.names(directory)


def check_ours(directory: Path) -> None:
    """Raises: FileExistsError if something is there that this program did not make."""
    if files.is_link(directory):
        raise FileExistsError(
            f"{directory} is a link; this program writes and removes a directory of that name and "
            f"never follows a link: move it away, or choose another name"
        )
    found = files.status(directory)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise FileExistsError(
            f"{directory} is not a directory; this program needs that name: move it away, or "
            f"choose another one"
        )
    names = files.names(directory)
    if names and MARKER not in names:
        raise FileExistsError(
            f"{directory} holds {names[0]} and was not made by this program (it has no {MARKER}); "
            f"it is left alone: move it away, or choose another name"
        )


def remove(directory: Path) -> None:
    """Remove a directory of ours, MARKER last: one that is half removed is still ours.

    Raises: FileExistsError, as check_ours(); OSError naming the path that cannot be removed.
    """
    check_ours(directory)
    _empty(directory)
    unmark(directory)
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()


def _empty(directory: Path) -> None:
    """Remove all but MARKER. Links in it are removed, not followed."""
    for name in files.names(directory):
        if name == MARKER:
            continue
        path = directory / name
        if stat.S_ISDIR(path.lstat().st_mode):
            files.remove_tree(path)
        else:
            path.unlink()
