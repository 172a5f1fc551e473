"""What a margin's constructor takes: names, defaults and types, read from its signature."""

from __future__ import annotations

import inspect
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from data_tools.common.errors import UserKeyError, UserTypeError
from data_tools.common.schema import nearest
from recognition.losses.margin import Margin, Options


class Argument(NamedTuple):
    default: Any
    kinds: tuple[Any, ...]  # types and Literals; a value must be of one of them


def arguments_of(margin: type[Margin]) -> dict[str, Argument]:
    """Every argument by name, those of all margins last."""
    hints = typing.get_type_hints(margin.__init__)
    taken = {
        name: Argument(parameter.default, _kinds(hints[name]))
        for name, parameter in inspect.signature(margin).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    shared = inspect.signature(Margin).parameters
    for name, hint in typing.get_type_hints(Options).items():
        taken[name] = Argument(shared[name].default, _kinds(hint))
    return taken


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
        checked[argument] = (
            float(value)
            if isinstance(value, numbers.Real) and not isinstance(value, bool | int)
            else value
        )
    return checked


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str)  # which of the words, the constructor says
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {float: "a number", bool: "true or false", type(None): "none"}.get(kind, kind.__name__)
