"""`python -m data_tools COMMAND ...`: one module a command, joined here.

A command has `add_arguments(parser)` and `run(args) -> dict`; the dict is what `--json` prints, and
an `ok` of False in it makes the exit code 1.
"""

import argparse
import json
import sys

from data_tools import inspect, pack, pairs, synthetic, verify

_COMMANDS = {
    "pack": (pack, "pack images into shards"),
    "inspect": (inspect, "print what a data set is"),
    "verify": (verify, "check every record and hash of a data set"),
    "pairs": (pairs, "make a verification set NAME.bin"),
    "synthesize": (synthetic, "draw faces of generated identities"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 if the command did what it says, 1 if not, 2 for a mistyped command line."""
    parser = argparse.ArgumentParser(prog="python -m data_tools", description="Data of face sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as a JSON line")
    args = parser.parse_args(argv)
    try:
        result = _COMMANDS[args.command][0].run(args)
    except (ValueError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("error: " + " ".join(str(text).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing half-made is left", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result))
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
