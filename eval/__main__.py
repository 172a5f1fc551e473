"""`python -m eval COMMAND ...`: one module a command, joined here."""

import sys

from data_tools import commands
from eval import lfw_command

_COMMANDS = {
    "lfw": (lfw_command, "verify pairs: LFW, CFP-FP, AgeDB-30, CALFW, CPLFW, sets of your own"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code, as `commands.main`."""
    return commands.main("eval", "Evaluate a network.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
