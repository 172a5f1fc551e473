"""`python -m eval COMMAND ...`: one module a command, joined here."""

import sys

from data_tools import commands
from eval import identify_command, ijb_command, lfw_command, pairs_command

_COMMANDS = {
    "lfw": (lfw_command, "verify pairs: LFW, CFP-FP, AgeDB-30, CALFW, CPLFW, any .bin or list"),
    "ijb": (ijb_command, "IJB-B and IJB-C, 1:1 and 1:N"),
    "pairs": (pairs_command, "verify pairs of your own images or templates"),
    "identify": (identify_command, "search your own probes in your own galleries"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code, as `commands.main`."""
    return commands.main("eval", "Evaluate a network.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
