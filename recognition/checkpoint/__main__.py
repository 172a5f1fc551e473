"""`python -m recognition.checkpoint COMMAND ...`: one module for each command."""

import sys

from data_tools.common import cli
from recognition.checkpoint import export_command, inspect_command, merge_command, verify_command

_COMMANDS = {
    "inspect": (inspect_command, "describe a checkpoint, or every one of a run"),
    "verify": (verify_command, "compare every file with its hash"),
    "merge": (merge_command, "the class rows of all ranks in one file"),
    "export": (export_command, "the network alone, with a card that describes it"),
}


def main(argv: list[str] | None = None, prog: str = "python -m recognition.checkpoint") -> int:
    """The exit code, as `cli.main`."""
    return cli.main(prog, "Checkpoints of runs.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
