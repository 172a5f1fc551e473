"""`python -m PACKAGE COMMAND ...`: the parser, the errors and the exit code of such a program.

A command is a module with `add_arguments(parser)` and `run(args) -> dict`; the dict is what
`--json` prints, and an `ok` of False in it makes the exit code 1. A process that only helped
another one returns None and prints nothing.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import ParamSpec

from data_tools.common.errors import USER_ERRORS, one_line
from data_tools.common.schema import check_number


def add_workers(parser: argparse.ArgumentParser, help: str = "processes (all cores)") -> None:
    """The flag `--workers N`, whose value main() checks."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=help)


P = ParamSpec("P")


def on_one_line(
    *more: type[Exception], lead: Callable[[], str] = lambda: "error"
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """A decorator of a program's main(): an error of the user and Ctrl-C end it with one line.

    more: exceptions of its own that are no bugs. lead: what the line starts with, such as the rank.
    The exit codes are 1 and, for Ctrl-C, 130.
    """

    expected: tuple[type[Exception], ...] = (*more, *USER_ERRORS)

    def decorate(function: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return function(*args, **kwargs)
            except expected as error:
                print(f"{lead()}: {one_line(error)}", file=sys.stderr, flush=True)
                return 1
            except KeyboardInterrupt as error:
                left = one_line(error) or "nothing half-made is left"
                print(f"{lead()}: interrupted; {left}", file=sys.stderr, flush=True)
                return 130

        return wrapped

    return decorate


def main(
    prog: str,  # as typed, such as `python -m eval`
    description: str,
    commands: Mapping[str, tuple[ModuleType, str]],  # name -> (module, one line on it)
    argv: Sequence[str] | None = None,
) -> int:
    """The exit code: 0 if the command did what it says, 1 if not, 2 for a mistyped command line.

    Without arguments it prints the commands, and the exit code is 2.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    choice = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in commands.items():
        command = choice.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON line, last")
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help()
        return 2
    args = parser.parse_args(argv)
    return _run(commands[args.command][0], args)


@on_one_line()
def _run(command: ModuleType, args: argparse.Namespace) -> int:
    check_number("--workers", getattr(args, "workers", 1), 1)
    result = command.run(args)
    if result is None:
        return 0
    if args.json:
        print(json.dumps(result, allow_nan=False))
    return 0 if result.get("ok", True) else 1
