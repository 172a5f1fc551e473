"""What a margin's constructor takes: names, defaults and types, read from its signature."""

import inspect
import numbers
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from data_tools.common.errors import UserKeyError, UserTypeError
from data_tools.common.schema import kinds_of, nearest
from recognition.losses.margin import Margin

SHARED = ("gradient", "overflow", "interclass_filtering_threshold")  # most or all margins have them


class Argument(NamedTuple):
    default: Any
    kinds: tuple[Any, ...]  # types and Literals; a value must be of one of them


def arguments_of(margin: type[Margin]) -> dict[str, Argument]:
    """Every argument by name, the shared ones last."""
    parameters = inspect.signature(margin).parameters
    names = sorted(parameters, key=lambda name: SHARED.index(name) if name in SHARED else -1)
    found = ((name, parameters[name]) for name in names)
    return {name: Argument(taken.default, kinds_of(taken.annotation)) for name, taken in found}


def checked_arguments(
    name: str, margin: type[Margin], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments, each one that the margin takes and of its type.

    Raises:
        KeyError: an argument that the margin does not take; with the nearest.
        TypeError: a value of the wrong type, or no mapping at all.
    """
    if not isinstance(arguments, Mapping):
        raise UserTypeError(f"margin_args={arguments!r}: expected arguments by name")
    taken, checked = arguments_of(margin), {}
    for argument, value in arguments.items():
        if argument not in taken:
            hint = nearest(argument, taken, f"{name} takes")
            raise UserKeyError(f"margin_args.{argument}: {hint}")
        kinds = taken[argument].kinds
        if value is None and any("none" in typing.get_args(kind) for kind in kinds):
            value = "none"  # as the command line reads that word
        if not any(_is(value, kind) for kind in kinds):
            expected = " or ".join(_word(kind) for kind in kinds)
            raise UserTypeError(f"margin_args.{argument}={value!r}: expected {expected}")
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool | int)
        checked[argument] = float(value) if is_real else value
    return checked


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str)  # the constructor checks which of the words it is
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {float: "a number", bool: "true or false", type(None): "none"}.get(kind, kind.__name__)
