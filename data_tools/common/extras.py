"""Packages that only some commands need, installed by an extra of this one."""

import contextlib
from collections.abc import Iterator

from data_tools.common.errors import UserError


@contextlib.contextmanager
def needed(package: str, extra: str, why: str) -> Iterator[None]:
    """The body imports `package` or a module of it.

    Raises: UserError: it is not installed; it names the extra that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(
            f"{why} needs {package}, which is not installed: pip install 'arcline[{extra}]', or "
            f"pip install {package}"
        ) from error
