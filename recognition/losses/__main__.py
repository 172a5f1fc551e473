"""The table of the margin losses: what each computes, its arguments and defaults, what it keeps.

    python -m recognition.losses               for a terminal
    python -m recognition.losses --markdown    as in docs/losses.md
    python -m recognition.losses --json        one line

Everything in it is read from the classes: the formula and its source from the first paragraph of
the docstring, whose rest says more (`python -c "from recognition.losses import MARGINS;
help(MARGINS['adaface'])"`).
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from typing import Any, NamedTuple, get_args

import numpy as np

from recognition.losses import MARGINS, make_margin
from recognition.losses.arguments import Argument, arguments_of
from recognition.losses.margin import Layer, Margin


class Entry(NamedTuple):
    name: str
    formula: str  # z_y is the target's logit, z_j another class's; with the source
    arguments: dict[str, Any]  # own ones, with their defaults; of words the default comes first
    state: list[str]
    gradients: list[str]


def entries() -> list[Entry]:
    return [_entry(name, margin) for name, margin in MARGINS.items()]


def markdown() -> str:
    """The table as docs/losses.md has it."""
    lines = ["| `margin=` | computes | arguments and defaults | state | gradient |"]
    lines.append("|" + "---|" * 5)
    for entry in entries():
        arguments = ", ".join(f"{k}={_value(v)}" for k, v in entry.arguments.items())
        arguments = arguments.replace("|", "\\|")
        cells = [
            f"`{entry.name}`",
            entry.formula.replace("|", "\\|"),
            f"`{arguments}`",
            "; ".join(entry.state) or "-",
            ", ".join(entry.gradients),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recognition.losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the table of docs/losses.md")
    form.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args(arguments)
    if args.json:
        print(json.dumps([entry._asdict() for entry in entries()]))
    elif args.markdown:
        print(markdown())
    else:
        _print_for_a_terminal()
    return 0


def _entry(name: str, margin: type[Margin]) -> Entry:
    taken = arguments_of(margin)
    own = {key: _shown(argument) for key, argument in taken.items() if key not in _LEFT_OUT}
    first_paragraph = (inspect.getdoc(margin) or "").split("\n\n")[0]
    gradients = ["exact", "straight_through"] if "gradient" in taken else ["exact"]
    formula = " ".join(first_paragraph.split())
    return Entry(name, formula, own, _state(make_margin(name, {})), gradients)


def _shown(argument: Argument) -> Any:
    """The default, and the other words where it is one of some."""
    words = [word for kind in argument.kinds for word in get_args(kind)]
    others = [word for word in words if word != argument.default]
    return "|".join([argument.default, *others]) if others else argument.default


_LEFT_OUT = ("gradient", "interclass_filtering_threshold")  # of every margin


def _state(margin: Margin) -> list[str]:
    """What a margin keeps, read from one that serves a small layer."""
    margin.bind(Layer(4, (0, 4), 8, class_counts=np.ones(4, dtype=np.int64)))
    learned = dict(margin.named_parameters())
    kinds: dict[str, list[str]] = {}
    for name in margin.state_dict():
        place = "of each class" if name in margin.per_class else "of the model"
        kinds.setdefault(f"learned, {place}" if name in learned else place, []).append(name)
    return [f"{', '.join(names)} ({kind})" for kind, names in kinds.items()]


def _value(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _print_for_a_terminal() -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for entry in entries():
        console.print(Text(entry.name, "bold"))
        own = ", ".join(f"{k}={_value(v)}" for k, v in entry.arguments.items())
        for label, text in (
            ("", entry.formula),
            ("arguments: ", own),
            ("state: ", "; ".join(entry.state)),
            ("gradient: ", ", ".join(entry.gradients)),
        ):
            if text:
                console.print(Text(label + text))
        console.print()
    console.print(
        Text(
            "Every loss also takes interclass_filtering_threshold (0: off), and works with "
            "num_subcenters (but for interface), sample_rate and any number of processes."
        )
    )


if __name__ == "__main__":
    sys.exit(main())
