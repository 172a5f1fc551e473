"""Files: absent or unreadable, hashes, and writing so that a name never holds half a file."""

import contextlib
import errno
import hashlib
import os
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_ABSENT = (errno.ENOENT, errno.ENOTDIR)  # any other errno says that nobody knows
PRIVATE_FILE, PRIVATE_DIRECTORY = 0o600, 0o700  # permissions of what shows people
_SPARE_FILES = 128  # descriptors, for what a process opens besides its shards
PARTIAL = ".partial"  # the suffix of everything that is being written


def status(path: str | os.PathLike[str], follow: bool = True) -> os.stat_result | None:
    """The status of `path`, None only if it is absent. follow: of what a link points to.

    Unlike os.path.exists, an I/O error (EIO, ESTALE, EACCES ...) is never read as "absent".

    Raises:
        OSError: the file system cannot tell; it names the path. So do the functions below.
    """
    try:
        return os.stat(path) if follow else os.lstat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is something at `path`."""
    return status(path) is not None


def is_link(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a symbolic link."""
    found = status(path, follow=False)
    return found is not None and stat.S_ISLNK(found.st_mode)


def is_free(path: str | os.PathLike[str]) -> bool:
    """Whether a directory may take this name: nothing is there, or an empty directory."""
    return not exists(path) or (is_dir(path) and not names(path))


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a regular file."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_dir(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def names(directory: str | os.PathLike[str]) -> list[str]:
    """The sorted names in a directory, [] if it is absent."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise


def ending(directory: str | os.PathLike[str], suffix: str) -> list[Path]:
    """The sorted paths in a directory whose names end in `suffix`, [] if it is absent.

    Unlike Path.glob, which leaves out what it cannot list.
    """
    return [Path(directory) / name for name in names(directory) if name.endswith(suffix)]


def below(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """All files in a directory and in those below it; links to directories are not followed.

    Unlike os.walk and Path.rglob, which leave out what they cannot list.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, _, found in os.walk(directory, onerror=fail):
        for name in found:
            yield Path(place, name)


def make_room(descriptor: int) -> None:
    """Raise the soft limit of open files to the hard one when `descriptor`, just opened, nears it.

    Data sets of many shards hold a descriptor for each. Processes started later inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (hard, resource.RLIM_INFINITY) and descriptor + _SPARE_FILES >= soft:
        with contextlib.suppress(OSError, ValueError):  # a container may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def explaining_too_many() -> Iterator[None]:
    """Add the remedy to the error of a process that has too many files open."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        remedy = (
            f"{error.strerror}: the limit of this process is {hard}, and a data set needs one for "
            f"each of its shards; raise it (ulimit -n, LimitNOFILE= of systemd, limits.conf), or "
            f"pack the set into fewer --shards"
        )
        raise OSError(error.errno, remedy, error.filename) from error


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give `path` to an OSError that names no file: of a read, a write or a flush."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file. Raises: OSError naming it."""
    with naming(path), open(path, "rb") as file:
        return file.read()


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises: OSError naming the file."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_private(directory: str | os.PathLike[str]) -> None:
    """Make a directory that only its owner may enter; one that is there keeps its permissions.

    Faces, and embeddings from which faces can be made, are personal data.

    Raises:
        OSError: it cannot be made, or something else has the name.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)


def write_private(path: str | os.PathLike[str], content: bytes) -> None:
    """As write_bytes with PRIVATE_FILE, for many files: nothing is flushed to disk."""
    partial = Path(f"{os.fspath(path)}.{os.getpid()}{PARTIAL}")
    try:
        with naming(path), open(partial, "wb", opener=_opener(PRIVATE_FILE)) as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _opener(permissions: int) -> Callable[[str, int], int]:
    """For open(): make the file with these permissions, before the umask."""
    return lambda path, flags: os.open(path, flags, permissions)


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Remove a directory with all that is in it. Raises: OSError naming what cannot be removed.

    shutil.rmtree alone names a file without its directory.
    """

    def fail(_: object, place: str, error: Any) -> None:
        error = error[1] if isinstance(error, tuple) else error
        raise OSError(error.errno, error.strerror, os.fspath(place)) from error

    with naming(path):
        if sys.version_info >= (3, 12):
            shutil.rmtree(path, onexc=fail)
        else:
            shutil.rmtree(path, onerror=fail)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or the names in a directory, to disk. Raises: OSError naming it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush the names in a directory to disk: a rename survives a power cut only after this."""
    sync(path)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], mode: str = "wb", permissions: int = 0o666, **options: Any
) -> Iterator[IO[Any]]:
    """Open a new file that takes the name `path` when the body ends without an error.

    It is written beside its destination as `.NAME.HOST-PID.partial`, flushed to disk, then renamed.
    If the body fails, the new file is removed and what stood at `path` stays; what a killed process
    of this machine has left is removed by the next writer of the same name.

    permissions: of the new file, before the umask; 0o600 keeps it private.
    options: as of open(), such as encoding.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    path = Path(path)
    stem = f".{path.name}.{socket.gethostname()}-"
    partial = path.with_name(f"{stem}{os.getpid()}{PARTIAL}")
    _remove_left_over(path.parent, stem)
    try:
        with open(partial, mode, opener=_opener(permissions), **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class Plain:
    """A file with its `write` alone, for numpy.save.

    numpy.save writes a real file past Python, and reports a full disk as "N requested and M
    written", without errno and name.
    """

    def __init__(self, file: IO[Any]) -> None:
        self.write = file.write


def _remove_left_over(directory: Path, stem: str) -> None:
    """Remove the partial files of processes that have ended."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            pid = name.removeprefix(stem).removesuffix(PARTIAL)
            if name.startswith(stem) and pid.isdigit() and not _runs(int(pid)):
                os.unlink(directory / name)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def write_bytes(path: str | os.PathLike[str], content: bytes, permissions: int = 0o666) -> None:
    """Write a whole file so that `path` holds the old or the new content, never a part."""
    with replacing(path, permissions=permissions) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], content: str, permissions: int = 0o666) -> None:
    """As write_bytes, in UTF-8 with the line ends as they are."""
    write_bytes(path, content.encode(), permissions)
