"""What every command does with its errors and its exit code."""

import pytest

from data_tools import commands
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

    assert commands.main("p", "A program.", {"do": (Command, "do it")}, ["do", "--json"]) == code
    assert capsys.readouterr() == (out, err)


def test_a_bug_keeps_its_traceback():
    class Command:
        add_arguments = staticmethod(lambda parser: None)
        run = staticmethod(lambda args: [][0])

    with pytest.raises(IndexError):
        commands.main("p", "A program.", {"do": (Command, "do it")}, ["do"])
