"""One schema for options: a frozen dataclass whose fields say name, type, default, range and help.

From it come the checks of values, the flags of a command line, the tables of the documentation, and
what a resumed run may change. A field is made by option(); its type is its annotation.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from data_tools.common.errors import UserError, UserKeyError, UserTypeError


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field says beside its name, type and default."""

    help: str
    group: str = ""
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    may_change: bool = False  # whether a resumed run may have another value
    metavar: str | None = None

    @property
    def range(self) -> str:
        """`0 to 1`, `at least 1`, or nothing."""
        if self.low == -math.inf:
            return ""
        return (
            f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"
        )


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with this default (dataclasses.MISSING: required; a list or dict is copied).

    more: the other fields of Option.
    """
    metadata = {"option": Option(help, **more)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(schema: type) -> dict[str, Option]:
    """The options of a dataclass by name, in their order."""
    return {f.name: f.metadata["option"] for f in _fields(schema) if "option" in f.metadata}


def default_of(schema: type, name: str) -> Any:
    """The default of a field; dataclasses.MISSING where it is required."""
    field = next(f for f in _fields(schema) if f.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def checked(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, each one known and of its type and range.

    Raises:
        UserKeyError: an unknown name; the message has the nearest.
        UserTypeError: a value of the wrong type.
        UserError: a value out of its range, or none of its choices.
    """
    options, hints = options_of(schema), typing.get_type_hints(schema)
    result = {}
    for name, value in values.items():
        if name not in options:
            raise UserKeyError(f"unknown key {name!r}: {nearest(str(name), options)}")
        result[name] = checked_value(name, value, hints[name], options[name])
    return result


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"


def checked_value(name: str, value: Any, hint: Any, bounds: Option | None = None) -> Any:
    """A value of the type `hint`; whole numbers become floats, and words lists, where asked for.

    Raises: UserTypeError, UserError: as checked().
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if isinstance(value, list | tuple) and list in [typing.get_origin(k) for k in kinds]:
        kind = next(k for k in kinds if typing.get_origin(k) is list)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{name}={value!r}: one of {', '.join(typing.get_args(kind))}")
        return value
    if typing.get_origin(kind) is list:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserTypeError(f"{name}={value!r}: expected a list")
        inner = typing.get_args(kind)[0]
        return [checked_value(f"{name}[{i}]", item, inner) for i, item in enumerate(items)]
    if kind is dict:
        if not isinstance(value, Mapping):
            raise UserTypeError(f"{name}={value!r}: expected a dict")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a directory called 2024, typed on the command line
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserTypeError(f"{name}={value!r} is {type(value).__name__}: expected {kind.__name__}")
    if bounds is not None and kind in (int, float) and not bounds.low <= value <= bounds.high:
        raise UserError(f"{name}={value}: expected {bounds.range}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name}={value}: expected a finite number")
    return value


def add_flags(parser: argparse._ActionsContainer, schema: type) -> None:
    """A flag for each option, with its default in its help."""
    hints = typing.get_type_hints(schema)
    for name, entry in options_of(schema).items():
        default, hint = default_of(schema, name), hints[name]
        flag = f"--{name.replace('_', '-')}"
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if kinds[0] is bool:
            parser.add_argument(flag, action="store_true", help=_flag_help(entry, ""))
            continue
        choices = typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is Literal else None
        shown = "" if default in (None, "") or isinstance(default, Path) else f"{default}"
        parser.add_argument(
            flag,
            type=str if choices else kinds[0],
            default=default,
            choices=choices,
            metavar=None if choices else entry.metavar,
            help=_flag_help(entry, shown),
        )


def from_flags(schema: type, args: argparse.Namespace) -> Any:
    """The dataclass of parsed flags, checked.

    Raises: UserError: a value out of its range; it names the flag.
    """
    hints = typing.get_type_hints(schema)
    values = {}
    for name, entry in options_of(schema).items():
        flag = f"--{name.replace('_', '-')}"
        try:
            values[name] = checked_value(flag, getattr(args, name), hints[name], entry)
        except UserError as error:
            raise type(error)(str(error).replace(f"{flag}=", f"{flag} ", 1)) from None
    return schema(**values)


def markdown(schema: type) -> str:
    """Tables of the options by group, for the documentation."""
    hints, groups = typing.get_type_hints(schema), dict[str, list[str]]()
    for name, entry in options_of(schema).items():
        default = default_of(schema, name)
        cells = [
            f"`{name}`",
            _type_text(hints[name]),
            "required" if default is dataclasses.MISSING else f"`{_default_text(default)}`",
            ", ".join(part for part in (entry.range, entry.unit) if part),
            "yes" if entry.may_change else "no",
            entry.help,
        ]
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        groups.setdefault(entry.group, []).append(f"| {row} |")
    head = (
        "| key | type | default | range, unit | may change at a resume | meaning |\n" + "|---" * 6
    )
    return "\n\n".join(
        f"### {group}\n\n{head}|\n" + "\n".join(rows) for group, rows in groups.items()
    )


def _fields(schema: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(schema)


def _flag_help(entry: Option, shown: str) -> str:
    notes = ", ".join(
        part for part in (shown and f"default {shown}", entry.range, entry.unit) if part
    )
    return (f"{entry.help} ({notes})" if notes else entry.help).replace("%", "%%")


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_text(kind) for kind in typing.get_args(hint))
    if hint is type(None):
        return "none"
    return str(hint) if typing.get_origin(hint) else hint.__name__


def _default_text(default: Any) -> str:
    words = {None: "none", True: "true", False: "false"}
    known = default is None or isinstance(default, bool)
    return words[default] if known else default if isinstance(default, str) else repr(default)
