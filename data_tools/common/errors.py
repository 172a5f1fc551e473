"""Errors for what a user did wrong. A command prints them on one line, without a traceback.

An OSError (a full disk, a missing file, no permission) is printed the same way, because its message
names the file. Every other exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """The request cannot be done as asked: the message says what, where and what to do."""


class UserKeyError(UserError, KeyError):
    """A name that does not exist: a key, an argument, an identity."""

    def __str__(self) -> str:  # KeyError's own would quote the message
        return str(self.args[0]) if self.args else ""


class UserTypeError(UserError, TypeError):
    """A value of the wrong type."""


USER_ERRORS = (UserError, OSError)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; a KeyError's without its quotes."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())
