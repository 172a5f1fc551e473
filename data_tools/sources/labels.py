"""The class numbers that lists, tables and labelled archives give their images."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.common.errors import UserError

MAX_LABEL = 2**31
_SHOWN = 40  # characters of a field in a message


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a table or a labelled sample holds its image and its label; "" is the default."""

    image: str = ""
    label: str = ""


class Listing:
    """The facts of a source (see Source) that a listing gathers."""

    identities: list[str]
    labels: np.ndarray
    sha256: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: list[tuple[str, str]] = []
        self.ignored = 0
        self.left_out: dict[str, int] = {}
        self.notes: list[str] = []
        self.bins: list[Path] = []


def class_number(field: object) -> int:
    """The class that a field names, a number or its text; 3.0 is 3.

    Raises: UserError: it is missing, text, negative, no whole number or 2^31 and more.
    """
    if field is None or field == "":
        raise UserError("the label is missing")
    value = number(str(field))
    if value is None or not 0 <= value < MAX_LABEL or value != int(value):
        hint = ""
        if value == -1:
            hint = ": Hugging Face marks a split without labels by -1"
        raise UserError(f"{str(field)[:_SHOWN]!r} is not a whole number from 0 below 2^31{hint}")
    return int(value)


def number(field: str) -> float | None:
    """The finite number that a text states; None if it states none."""
    try:
        value = float(field)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def numbered(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, ascending, and the place of each label [N] among them: int64.

    As np.unique, whose sort takes five times the memory of the labels.
    """
    if int(labels.max()) > 4 * len(labels) + 1_000_000:
        return np.unique(labels, return_inverse=True)
    occurs = np.zeros(int(labels.max()) + 1, bool)
    occurs[labels] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[labels]


def by_class(labels: np.ndarray) -> np.ndarray | None:
    """The order [N] that puts the images of each class together, each class as it stands; None if
    they are. A folder lists its images in this order, so the same images make the same set."""
    if bool((labels[1:] >= labels[:-1]).all()):
        return None
    return np.argsort(labels, kind="stable")
