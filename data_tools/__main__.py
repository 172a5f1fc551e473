"""`python -m data_tools COMMAND ...`: one module a command, joined here."""

import sys

from data_tools import commands, inspect, pack_command, pairs, synthetic, verify

_COMMANDS = {
    "pack": (pack_command, "pack images into shards"),
    "inspect": (inspect, "print what a data set is"),
    "verify": (verify, "check every record and hash of a data set"),
    "pairs": (pairs, "make a verification set NAME.bin"),
    "synthesize": (synthetic, "draw faces of generated identities"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code, as `commands.main`."""
    return commands.main("data_tools", "Data of face sets.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
