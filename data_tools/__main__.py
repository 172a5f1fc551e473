"""`python -m data_tools COMMAND ...`: one module a command, joined here."""

import sys

from data_tools.clean import embed, merge, overlap, purify, relabel_command
from data_tools.common import cli
from data_tools.inspect import inspect, unpack, verify, view
from data_tools.pack import pack_command, pairs
from data_tools.synthetic import generate

COMMANDS = {
    "pack": (pack_command, "pack images into shards"),
    "inspect": (inspect, "print what a data set is"),
    "verify": (verify, "check every record and hash of a data set"),
    "pairs": (pairs, "make a verification set NAME.bin"),
    "unpack": (unpack, "a data set back to files"),
    "view": (view, "a contact sheet of an identity or a query"),
    "embed": (embed, "features of a data set"),
    "purify": (purify, "find wrong images by a sub-center run"),
    "overlap": (overlap, "find what training and test set share"),
    "merge": (merge, "propose labels to join and to cut"),
    "relabel": (relabel_command, "put a decision of cleaning in force"),
    "synthesize": (generate, "draw faces of generated identities"),
}


def main(argv: list[str] | None = None, prog: str = "python -m data_tools") -> int:
    """Run the command that `argv` names and return its exit code, as `cli.main` does."""
    return cli.main(prog, "Data of face sets.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
