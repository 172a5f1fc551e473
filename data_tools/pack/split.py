"""Who and what of a source is packed: index arithmetic on its labels, a function of the seed.

In this order: identities with fewer than `min_images` listed images are left out; `hold_out` of the
others are drawn for verification; `split` sets identities, or images of each, aside as a second
set; of the rest each identity keeps at most `max_images`. The images of an identity that are set
aside or kept are drawn evenly.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_tools.common.errors import UserError


@dataclass(frozen=True, slots=True)
class HoldOut:
    seed: int = 0
    hold_out: int = 0  # identities
    split: str = ""  # "images=SHARE" or "identities=SHARE"
    min_images: int = 1
    max_images: int = 0  # 0: all of them

    def share(self) -> tuple[str, float]:
        """What is set aside, and how much of it. Raises: ValueError if `split` does not say."""
        if not self.split:
            return "", 0.0
        what, _, share = self.split.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if what not in ("images", "identities") or not 0 < value < 1:
            raise UserError(
                f"--split {self.split}: say images=SHARE or identities=SHARE, 0 < SHARE < 1"
            )
        return what, value


class SplitParts(NamedTuple):
    """What becomes of N images of I identities."""

    trained: np.ndarray  # [C] identity of each class
    images: np.ndarray  # [n] images to train on
    held: np.ndarray  # identities for verification pairs
    aside: np.ndarray  # identities of the second set: `trained` if images were split
    aside_images: np.ndarray
    without: np.ndarray  # identities without a listed image
    few: np.ndarray  # identities with some, but fewer than min_images
    over: int  # images beyond max_images


def choose(labels: np.ndarray, num_identities: int, choice: HoldOut) -> SplitParts:
    """The parts. Raises: ValueError if fewer than two identities would be left to train on."""
    what, share = choice.share()
    counts = np.bincount(labels, minlength=num_identities)
    usable = np.flatnonzero(counts >= max(choice.min_images, 1))
    few = np.flatnonzero((counts > 0) & (counts < choice.min_images))
    random = np.random.default_rng([choice.seed, 1])
    drawn = random.permutation(usable)
    num_aside = round(share * len(usable)) if what == "identities" else 0
    if len(usable) < 2 + choice.hold_out + num_aside:
        most = len(usable) - 2 - num_aside
        raise UserError(
            f"{len(usable)} of {num_identities} identities have a listed image"
            + (f" (or the {choice.min_images} asked for)" if choice.min_images > 1 else "")
            + f"; {choice.hold_out + num_aside} to hold out and 2 to train on are needed"
            + (f"; --hold-out can be at most {most}" if most > 0 else "")
        )
    held = np.sort(drawn[: choice.hold_out])
    aside = np.sort(drawn[choice.hold_out : choice.hold_out + num_aside])
    trained = np.sort(drawn[choice.hold_out + num_aside :])
    part_of = np.zeros(num_identities, np.int8)  # 1 trained, 2 aside
    part_of[trained], part_of[aside] = 1, 2
    mine = part_of[labels]
    images, aside_images = np.flatnonzero(mine == 1), np.flatnonzero(mine == 2)
    if what == "images":
        wanted = np.minimum(np.round(share * counts), counts - 1).astype(np.int64)
        first = _place(labels[images], choice.seed) < wanted[labels[images]]
        images, aside_images = images[~first], images[first]
        aside = trained
    over = 0
    if choice.max_images:
        keep = _place(labels[images], choice.seed + 1) < choice.max_images
        over = int((~keep).sum())
        images = images[keep]
    without = np.flatnonzero(counts == 0)
    return SplitParts(trained, images, held, aside, aside_images, without, few, over)


def _place(labels: np.ndarray, seed: int) -> np.ndarray:
    """The place of each image among those of its identity, drawn: int64 [n] from 0."""
    key = np.random.default_rng([seed, 3]).permutation(len(labels))
    order = np.lexsort((key, labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - starts[labels[order]]
    return place
