"""One schema for options: what it refuses, the flags and the tables that it makes."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import pytest

from data_tools.common.errors import UserError, UserKeyError, UserTypeError
from data_tools.common.schema import (
    add_flags,
    check,
    checked,
    default_of,
    from_flags,
    markdown,
    nearest,
    option,
    options_of,
)


@dataclass(frozen=True)
class Oven:
    """One option of every kind."""

    dish: str = option(MISSING, "what to bake", group="Food")
    trays: int = option(2, "trays at once", low=1, high=8, group="Food", may_change=True)
    sugar: float = option(0.5, "share | of the dough", low=0, high=1, open_ends="high")
    heat: float = option(180.0, "of the air", low=0, open_ends="low", unit="degrees", note="a book")
    rise: int | None = option(None, "minutes of rest", note="default: none", low=0)
    mode: Literal["fan", "grill"] | None = option(None, "what is on")
    side: Literal["top", "both"] = option("both", "which heater")
    fillings: list[str] = option([], "to put in; may be repeated", metavar="WHAT")
    weights: list[float] = option([], "of the loaves")
    names: str | list[str] = option("bread", "of the loaves")
    extras: dict = option({}, "of this oven")
    recipe: Path | None = option(None, "file to follow", metavar="FILE")
    light: bool = option(False, "100 % bright")
    temperature_of_yesterday: float = 1.0  # no option


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, Oven)
    return parser.parse_args(["--dish", "bread", *words])


@pytest.mark.parametrize(
    ("values", "becomes"),
    [
        ({"trays": 1}, 1), ({"trays": 8}, 8),
        ({"sugar": 0}, 0.0), ({"heat": 1}, 1.0),
        ({"rise": None}, None), ({"rise": 0}, 0),
        ({"mode": None}, None), ({"mode": "grill"}, "grill"),
        ({"dish": 2024}, "2024"),
        ({"fillings": "a,b,"}, ["a", "b"]), ({"weights": (1, 2.5)}, [1.0, 2.5]),
        ({"names": "a"}, "a"), ({"names": ["a", "b"]}, ["a", "b"]),
        ({"extras": {"a": 1}}, {"a": 1}),
        ({"recipe": "a/b"}, Path("a/b")), ({"recipe": None}, None),
        ({"light": True}, True),
    ],
)  # fmt: skip
def test_values_and_what_becomes_of_them(values, becomes):
    (found,) = checked(Oven, values).values()
    assert found == becomes and type(found) is type(becomes)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"trays": 0}, UserError, "trays=0: expected 1 to 8"),
        ({"trays": 9}, UserError, "trays=9: expected 1 to 8"),
        ({"sugar": 1.0}, UserError, "sugar=1.0: expected 0 to below 1"),
        ({"sugar": -0.1}, UserError, "expected 0 to below 1"),
        ({"heat": 0}, UserError, "heat=0.0: expected above 0"),
        ({"heat": float("nan")}, UserError, "heat=nan: expected above 0"),
        ({"heat": float("inf")}, UserError, "heat=inf: expected a finite number"),
        ({"rise": -1}, UserError, "rise=-1: expected at least 0"),
        ({"mode": "fam"}, UserError, "mode='fam': must be one of fan, grill"),
        ({"side": None}, UserError, "side=None: must be one of top, both"),
        ({"trays": 1.0}, UserTypeError, "trays=1.0 is float: expected int"),
        ({"trays": True}, UserTypeError, "trays=True is bool: expected int"),
        ({"trays": None}, UserTypeError, "trays=None is NoneType: expected int"),
        ({"heat": True}, UserTypeError, "heat=True is bool: expected float"),
        ({"light": 1}, UserTypeError, "expected bool"),
        ({"weights": 3}, UserTypeError, "weights=3: expected a list"),
        ({"weights": [1, "x"]}, UserTypeError, "weights[1]='x' is str: expected float"),
        ({"extras": []}, UserTypeError, "extras=[]: expected a dict"),
        ({"recipe": 3}, UserTypeError, "recipe=3 is int: expected Path"),
        ({"trayz": 1}, UserKeyError, "unknown key 'trayz': did you mean trays?"),
        ({"Trays": 1}, UserKeyError, "unknown key 'Trays': did you mean trays?"),
        ({"zzz": 1}, UserKeyError, "unknown key 'zzz': the keys are dish, trays, "),
        ({"temperature_of_yesterday": 1.0}, UserKeyError, "unknown key"),
    ],
)
def test_values_that_are_refused(values, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        checked(Oven, values)


def test_the_default_of_a_list_is_nobody_elses():
    assert default_of(Oven, "fillings") is not default_of(Oven, "fillings")
    Oven("bread").fillings.append("x")
    assert Oven("bread").fillings == []
    assert default_of(Oven, "dish") is MISSING
    assert "temperature_of_yesterday" not in options_of(Oven)


def test_flags_without_a_word_are_the_defaults():
    assert from_flags(Oven, flags()) == Oven("bread")


def test_flags_of_every_kind():
    typed = flags(
        *"--trays 3 --heat 7 --mode fan --recipe a.txt --light".split(),
        *"--fillings a --fillings b --weights 1 --weights 2".split(),
    )
    made = from_flags(Oven, typed, temperature_of_yesterday=3.0)
    assert made == Oven(
        "bread", trays=3, heat=7.0, mode="fan", recipe=Path("a.txt"), light=True,
        fillings=["a", "b"], weights=[1.0, 2.0], temperature_of_yesterday=3.0,
    )  # fmt: skip
    assert flags().fillings == [], "a repeated flag changed the default"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trays 0", "--trays 0: must be 1 or more"),
        ("--trays 9", "--trays 9: must be 8 or less"),
        ("--heat 0", "--heat 0.0: must be more than 0"),
        ("--sugar 1", "--sugar 1.0: must be less than 1"),
        ("--heat inf", "--heat inf: expected a finite number"),
    ],
)
def test_an_error_names_the_flag(words, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        from_flags(Oven, flags(*words.split()))


def test_a_value_that_a_caller_gives_is_checked_like_a_flag():
    with pytest.raises(UserError, match="--trays 0: must be 1 or more"):
        check(Oven("bread", trays=0))
    with pytest.raises(UserTypeError, match="--recipe 3 is int: expected Path"):
        check(Oven("bread", recipe=3))
    check(Oven("bread"))


def test_what_argparse_itself_refuses():
    for words in (["--mode", "x"], ["--trays", "x"]):
        with pytest.raises(argparse.ArgumentError):
            flags(*words)
    parser = argparse.ArgumentParser()
    add_flags(parser, Oven)
    with pytest.raises(SystemExit):
        parser.parse_args([])  # --dish is required


def test_the_help_tells_default_note_range_and_unit():
    parser = argparse.ArgumentParser()
    add_flags(parser, Oven)
    told = " ".join(parser.format_help().split())
    for line in (
        "what to bake --trays",
        "trays at once (default 2; 1 to 8)",
        "of the air (default 180.0; a book; above 0; degrees)",
        "minutes of rest (default: none; at least 0)",
        "--light 100 % bright",
        "which heater (default both)",
        "to put in; may be repeated --weights",
    ):
        assert line in told
    assert "--fillings WHAT" in told and "--recipe FILE" in told and "{fan,grill}" in told


def test_the_nearest_name():
    assert nearest("ArcFase", ["arcface", "cosface"]) == "did you mean arcface?"
    assert nearest("x", ["arcface", "cosface"], "one of") == "one of arcface, cosface"
    assert nearest(None, iter(["arcface"])) == "the keys are arcface"


def test_the_table_of_the_documentation():
    food, rest = markdown(Oven).split("### ")[1:]
    assert food.startswith("Food\n\n| key | type | default | range, unit | ")
    assert "| `dish` | str | required |  | no | what to bake |" in food
    assert "| `trays` | int | `2` | 1 to 8 | yes | trays at once |" in food
    assert "| `heat` | float | `180.0` | above 0, degrees | no | of the air |" in rest
    assert "share \\| of the dough" in rest, "a bar in a cell ends the cell"
    assert "| `mode` | `fan`, `grill` or none | `none` |" in rest
    assert "| `names` | str or list[str] | `bread` |" in rest
    assert "| `light` | bool | `false` |" in rest
