"""`python -m recognition.inversion RUN ...`, and `... privacy RUN ...`."""

import sys

from data_tools.common import cli
from recognition.inversion import privacy_command, synthesise_command

_COMMANDS = {
    "synthesise": (synthesise_command, "faces of classes or embeddings (also without this word)"),
    "privacy": (privacy_command, "how well the embeddings of a set are inverted"),
}


def main(argv: list[str] | None = None, prog: str = "python -m recognition.inversion") -> int:
    """The exit code, as `commands.main`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*_COMMANDS, "-h", "--help"):
        argv = ["synthesise", *argv]
    return cli.main(prog, "Faces out of a trained network.", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
