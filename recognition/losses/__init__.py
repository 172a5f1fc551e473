"""The margin losses by the names that recipes use."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from recognition.losses.margin import (
    ArcFace,
    CombinedMargin,
    CosFace,
    Margin,
    Rows,
    Softmax,
    SphereFace,
)

MARGINS: dict[str, type[Margin]] = {
    "softmax": Softmax,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "combined": CombinedMargin,
}

__all__ = ["MARGINS", "Margin", "Rows", "make_margin"]


def make_margin(name: str, arguments: Mapping[str, Any]) -> Margin:
    """MARGINS[name](**arguments), with errors that name the recipe's keys.

    Raises:
        KeyError: no such margin, or an argument that it does not take; with the nearest.
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    if name not in MARGINS:
        raise KeyError(f"margin={name!r}: one of {', '.join(MARGINS)}")
    parameters = inspect.signature(MARGINS[name]).parameters
    taken = {parameter.name: parameter.default for parameter in parameters.values()}
    for argument, value in arguments.items():
        if argument not in taken:
            near = difflib.get_close_matches(argument, taken, 1)
            raise KeyError(
                f"margin_args.{argument}: {name} takes {', '.join(taken)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(taken[argument], float) and not number:
            raise TypeError(f"margin_args.{argument}={value!r}: expected a number")
    try:
        return MARGINS[name](**arguments)
    except ValueError as error:
        raise ValueError(f"margin={name} with {dict(arguments)}: {error}") from error
