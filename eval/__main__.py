"""`python -m eval COMMAND ...`: dispatches to the module of each command."""

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

COMMANDS = {
    "lfw": (lfw_command, "verify pairs: LFW, CFP-FP, AgeDB-30, CALFW, CPLFW, any .bin or list"),
    "ijb": (ijb_command, "IJB-B and IJB-C, 1:1 and 1:N"),
    "tinyface": (tinyface, "TinyFace: rank 1, 5, 20 with distractors"),
    "ijbs": (ijbs, "IJB-S: surveillance to single, to booking and to surveillance"),
    "rfw": (rfw, "RFW: four groups at one shared threshold"),
    "pairs": (pairs_command, "verify pairs of your own images or templates"),
    "identify": (identify_command, "search for your own probes in your own galleries"),
    "report": (report_command, "write one page with the results of one or more models"),
    "thresholds": (thresholds_command, "choose the operating points that export writes"),
}


def main(argv: list[str] | None = None, prog: str = "python -m eval") -> int:
    """Run the command that `argv` names and return its exit code, as `cli.main` does."""
    return cli.main(prog, "Evaluate a network.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
