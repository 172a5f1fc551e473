"""`python -m eval COMMAND ...`: one module a command, joined here."""

import sys

from data_tools.common import cli
from eval.protocols import (
    identify_command,
    ijb_command,
    ijbs,
    lfw_command,
    pairs_command,
    rfw,
    thresholds_command,
    tinyface,
)
from eval.report import report_command

_COMMANDS = {
    "lfw": (lfw_command, "verify pairs: LFW, CFP-FP, AgeDB-30, CALFW, CPLFW, any .bin or list"),
    "ijb": (ijb_command, "IJB-B and IJB-C, 1:1 and 1:N"),
    "tinyface": (tinyface, "TinyFace: rank 1, 5, 20 with distractors"),
    "ijbs": (ijbs, "IJB-S: surveillance to single, booking, surveillance"),
    "rfw": (rfw, "RFW: four groups and a shared threshold"),
    "pairs": (pairs_command, "verify pairs of your own images or templates"),
    "identify": (identify_command, "search your own probes in your own galleries"),
    "report": (report_command, "one page with the results of one or several models"),
    "thresholds": (thresholds_command, "choose the operating points that export writes"),
}


def main(argv: list[str] | None = None) -> int:
    """The exit code, as `commands.main`."""
    return cli.main("eval", "Evaluate a network.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
