"""What a margin's constructor takes: names, defaults and types, read from its signature."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

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


def check_arguments(name: str, margin: type[Margin], arguments: Mapping[str, Any]) -> None:
    """Raises:
    KeyError: an argument that the margin does not take; with the nearest.
    TypeError: a value of the wrong type.
    """
    taken = arguments_of(margin)
    for argument, value in arguments.items():
        if argument not in taken:
            near = difflib.get_close_matches(argument, taken, 1)
            raise KeyError(
                f"margin_args.{argument}: {name} takes {', '.join(taken)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        kinds = taken[argument].kinds
        if not any(_is(value, kind) for kind in kinds):
            expected = " or ".join(_word(kind) for kind in kinds)
            raise TypeError(f"margin_args.{argument}={value!r}: expected {expected}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str)  # which of the words, the constructor says
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {float: "a number", bool: "true or false", type(None): "none"}.get(kind, kind.__name__)
