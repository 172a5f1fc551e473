"""Packages that only some commands need, installed by an extra of this one."""

import importlib
from typing import Any

from data_tools.common.errors import UserError


def require(module: str, extra: str, why: str) -> Any:
    """The module. Raises: UserError: it is not installed; it names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(
            f"{why} needs {package}, which is not installed: pip install 'arcline[{extra}]', or "
            f"pip install {package}"
        ) from error
