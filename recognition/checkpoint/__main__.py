"""`python -m recognition.checkpoint COMMAND ...`: one module a command, joined here."""

import sys

from data_tools.common import cli
from recognition.checkpoint import export_command, inspect_command, merge_command, verify_command

_COMMANDS = {
    "inspect": (inspect_command, "print what a checkpoint, or every one of a run, is"),
    "verify": (verify_command, "hold every file against its hash"),
    "merge": (merge_command, "the class rows of all ranks into one file"),
    "export": (export_command, "the network alone, with a card that says what it is"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code, as `commands.main`."""
    return cli.main("recognition.checkpoint", "Checkpoints of runs.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
