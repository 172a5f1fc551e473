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
from typing import Any, Literal, TypeVar

from data_tools.common.errors import UserError, UserKeyError, UserTypeError

Schema = TypeVar("Schema")


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field says beside its name, type and default."""

    help: str
    group: str = ""
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    open_ends: Literal["", "low", "high"] = ""  # which of the two is itself out of range
    may_change: bool = False  # whether a resumed run may have another value
    metavar: str | None = None
    note: str = ""  # where the default comes from, or what it stands for

    @property
    def range(self) -> str:
        """`0 to 1`, `at least 1`, `above 0`, `0 to below 1`, or nothing."""
        if self.low == -math.inf:
            return ""
        if self.high == math.inf:
            return f"{'above' if self.open_ends == 'low' else 'at least'} {self.low:g}"
        return f"{self.low:g} to {'below ' if self.open_ends == 'high' else ''}{self.high:g}"

    def broken_bound(self, value: float) -> str:
        """The bound that a value breaks, such as `1 or more`; nothing for a value in range."""
        if self.open_ends == "low" and not value > self.low:
            return f"more than {self.low:g}"
        if not value >= self.low:
            return f"{self.low:g} or more"
        if self.open_ends == "high" and not value < self.high:
            return f"less than {self.high:g}"
        return "" if value <= self.high else f"{self.high:g} or less"


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
            raise UserKeyError(f"unknown key {name!r}: {nearest(name, options)}")
        result[name] = checked_value(name, value, hints[name], options[name])
    return result


def nearest(name: Any, known: Iterable[str], otherwise: str = "the keys are") -> str:
    """`did you mean x?`, or the list of what is known after `otherwise`."""
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, 1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(known)}"


def checked_value(name: str, value: Any, hint: Any, bounds: Option | None = None) -> Any:
    """A value of the type `hint`; whole numbers become floats, and words lists, where asked for.

    A name that begins with -- is a flag's, and an error shows the value as it is typed there.

    Raises: UserTypeError, UserError: as checked().
    """
    is_flag = name.startswith("--")
    lead = f"{name} " if is_flag else f"{name}="
    shown = lead + (str(value) if is_flag else repr(value))
    kinds = kinds_of(hint)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if isinstance(value, list | tuple) and list in [typing.get_origin(k) for k in kinds]:
        kind = next(k for k in kinds if typing.get_origin(k) is list)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{shown}: must be one of {', '.join(typing.get_args(kind))}")
        return value
    if typing.get_origin(kind) is list:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserTypeError(f"{shown}: expected a list")
        inner = typing.get_args(kind)[0]
        return [checked_value(f"{name}[{i}]", item, inner) for i, item in enumerate(items)]
    if kind is dict:
        if not isinstance(value, Mapping):
            raise UserTypeError(f"{shown}: expected a dict")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a directory called 2024, typed on the command line
    if kind is Path and isinstance(value, str):
        value = Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserTypeError(f"{shown} is {type(value).__name__}: expected {kind.__name__}")
    if bounds is not None and kind in (int, float) and (bound := bounds.broken_bound(value)):
        wanted = f"must be {bound}" if is_flag else f"expected {bounds.range}"
        raise UserError(f"{lead}{value}: {wanted}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{lead}{value}: expected a finite number")
    return value


def flag_of(name: str) -> str:
    """The flag of an option: `--max-images` of max_images."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse._ActionsContainer, schema: type) -> None:
    """A flag for each option, with its default in its help.

    One without a default is required. A switch has no value. A flag of a list may be repeated.
    """
    hints = typing.get_type_hints(schema)
    for name, entry in options_of(schema).items():
        default, kind = default_of(schema, name), kinds_of(hints[name])[0]
        how: dict[str, Any] = {"default": default, "help": _flag_help(entry, default)}
        if kind is bool:
            how["action"] = "store_true"
        elif typing.get_origin(kind) is Literal:
            how["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            how |= {"action": "append", "type": typing.get_args(kind)[0], "metavar": entry.metavar}
        else:
            how |= {"type": kind, "metavar": entry.metavar}
        if default is dataclasses.MISSING:
            how |= {"default": None, "required": True}
        parser.add_argument(flag_of(name), **how)


def from_flags(schema: type[Schema], args: argparse.Namespace, **more: Any) -> Schema:
    """The dataclass of parsed flags, checked; more: its fields that are no options.

    Raises: UserError: a value out of its range; it names the flag.
    """
    return schema(**_checked_flags(schema, vars(args)), **more)


def check(made: Any) -> None:
    """Checks the options of a dataclass that a caller has made, in its __post_init__.

    Raises: UserTypeError, UserError: as checked(); the message names the flag.
    """
    _checked_flags(type(made), {name: getattr(made, name) for name in options_of(type(made))})


def check_number(flag: str, value: float, low: float, high: float = math.inf) -> None:
    """Checks the number that a flag outside a schema got.

    Raises: UserError: it is out of its range; the message names the flag.
    """
    checked_value(flag, value, type(value), Option("", low=low, high=high))


def _checked_flags(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {
        name: checked_value(flag_of(name), values[name], hints[name], entry)
        for name, entry in options_of(schema).items()
    }


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


def _flag_help(entry: Option, default: Any) -> str:
    says_nothing = (
        default is dataclasses.MISSING or isinstance(default, bool | list) or default in (None, "")
    )
    shown = "" if says_nothing else f"default {default}"
    parts = (shown, entry.note, entry.range, entry.unit)
    notes = "; ".join(part for part in parts if part)
    return (f"{entry.help} ({notes})" if notes else entry.help).replace("%", "%%")


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # of a Literal: the other
    return typing.get_args(hint) if is_union else (hint,)


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(hint))
    if len(kinds_of(hint)) > 1:
        return " or ".join(_type_text(kind) for kind in kinds_of(hint))
    if hint is type(None):
        return "none"
    return str(hint) if typing.get_origin(hint) else hint.__name__


def _default_text(default: Any) -> str:
    words = {None: "none", True: "true", False: "false"}
    known = default is None or isinstance(default, bool)
    return words[default] if known else default if isinstance(default, str) else repr(default)
