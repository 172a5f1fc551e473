"""What every command does with its errors and its exit code."""

import pytest

import data_tools.__main__
import eval.__main__
from data_tools.common import cli
from data_tools.common.errors import UserError, UserKeyError, one_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("no 'a' here"), "no 'a' here"),
        (UserError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (KeyError(), ""),
    ],
)
def test_one_line(error, text):
    assert one_line(error) == text


@pytest.mark.parametrize(
    ("outcome", "code", "out", "err"),
    [
        ({"n": 1}, 0, '{"n": 1}\n', ""),
        ({"ok": False}, 1, '{"ok": false}\n', ""),
        (UserKeyError("no such key"), 1, "", "error: no such key\n"),
        (KeyboardInterrupt(), 130, "", "error: interrupted; nothing half-made is left\n"),
    ],
)
def test_exit_codes(capsys, outcome, code, out, err):
    class Command:
        """Does what the test says."""

        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(args):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

    assert cli.main("p", "A program.", {"do": (Command, "do it")}, ["do", "--json"]) == code
    assert capsys.readouterr() == (out, err)


def test_a_bug_keeps_its_traceback():
    class Command:
        add_arguments = staticmethod(lambda parser: None)
        run = staticmethod(lambda args: [][0])

    with pytest.raises(IndexError):
        cli.main("p", "A program.", {"do": (Command, "do it")}, ["do"])


@pytest.mark.parametrize("program", [data_tools.__main__, eval.__main__])
def test_without_arguments_the_commands_are_printed(capsys, monkeypatch, program):
    monkeypatch.setattr("sys.argv", ["program"])
    assert program.main() == 2
    out = capsys.readouterr().out
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("    ")}

    assert program.COMMANDS.keys() <= listed


def test_an_interrupted_command_says_what_is_left(capsys):
    class Command:
        """Is interrupted."""

        add_arguments = staticmethod(lambda parser: None)

        @staticmethod
        def run(args):
            raise KeyboardInterrupt("2 shards are kept")

    assert cli.main("p", "A program.", {"do": (Command, "do it")}, ["do"]) == 130
    assert capsys.readouterr().err == "error: interrupted; 2 shards are kept\n"
