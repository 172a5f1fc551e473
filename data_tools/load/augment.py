"""What training changes in an image; every draw is a hash of (seed, position in the stream).

A position is passed once and is one image in one epoch, so each epoch draws afresh, and the draw
is the same at every world size and after a resume (order.py says what a position is).

Mirroring is always on. The other three are AdaFace's (arXiv:2204.00964, dataset/augmenter.py of
its code), off by default, each with a probability of its own, in this order: crop, low_res,
photometric, then the mirroring. Arithmetic and draws are those of the code's PIL and OpenCV calls;
hue, which it leaves at 0, does not exist here.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.load.order import keyed_hash

# Purposes of the draws; order.py has 0 and 2 to 4.
_FLIP, _CROP, _LOW_RES, _PHOTOMETRIC, _SIDE, _DOWN, _UP, _TURN = 1, *range(5, 12)
_FACTORS = 12  # to 14
_AREA, _ASPECT = 16, 32  # to 25, 41: one for each attempt
_TOP, _LEFT = 48, 49

_ATTEMPTS = 10  # at a crop that fits, as torchvision's RandomResizedCrop
_LEAST_AREA = 0.2  # of the image, kept by a crop
_MOST_ASPECT = 4 / 3  # width / height of a crop, or its inverse
_LEAST_SIDE = 0.2  # of the image's, of a low resolution
_JITTER = 0.5  # of brightness, contrast and saturation
GREY = np.array([19595, 38470, 7471], np.int32)  # 2^16 x the weights of R, G, B, as in PIL

# Interpolations a low resolution is made with, and enlarged with.
INTERPOLATIONS = (
    cv2.INTER_NEAREST,
    cv2.INTER_LINEAR,
    cv2.INTER_AREA,
    cv2.INTER_CUBIC,
    cv2.INTER_LANCZOS4,
)
BRIGHTNESS, CONTRAST, SATURATION = range(3)
TURNS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION))))  # [6, 3]


class Probabilities(NamedTuple):
    """How often each augmentation is applied. AdaFace's models had 0.2 each."""

    crop: float = 0.0
    low_res: float = 0.0
    photometric: float = 0.0


class Draws(NamedTuple):
    """What happens to each of b images of size x size pixels."""

    crop: np.ndarray  # bool [b]
    box: np.ndarray  # int32 [b, 4]: top, left, height, width of what is kept; the rest is black
    low_res: np.ndarray  # bool [b]
    side: np.ndarray  # int32 [b] pixels of the small image
    interpolation: np.ndarray  # int32 [b, 2]: of INTERPOLATIONS, down and up
    photometric: np.ndarray  # bool [b]
    turn: np.ndarray  # int32 [b, 3]: the order of BRIGHTNESS, CONTRAST, SATURATION
    factor: np.ndarray  # float32 [b, 3]: of the three in that order; 1 changes nothing


def flip_mask(seed: int, positions: np.ndarray) -> np.ndarray:
    """bool [b]: which images to mirror left to right, half of them, for the int64 positions [b]."""
    return (keyed_hash(seed, _FLIP, positions) >> np.uint64(63)).astype(bool)


def draw(seed: int, positions: np.ndarray, chances: Probabilities, size: int) -> Draws:
    """The augmentations of the images at int64 positions [b]."""

    def uniform(purpose: int) -> np.ndarray:  # float64 [b] in [0, 1)
        return (keyed_hash(seed, purpose, positions) >> np.uint64(11)) * 2.0**-53

    interpolation = np.stack([uniform(_DOWN), uniform(_UP)], 1) * len(INTERPOLATIONS)
    turn = TURNS[(uniform(_TURN) * len(TURNS)).astype(np.int64)]  # [b, 3]
    factor = np.stack([uniform(_FACTORS + k) for k in range(3)], 1) * (2 * _JITTER) + 1 - _JITTER
    return Draws(
        crop=uniform(_CROP) < chances.crop,
        box=_boxes(uniform, len(positions), size),
        low_res=uniform(_LOW_RES) < chances.low_res,
        side=(size * (_LEAST_SIDE + (1 - _LEAST_SIDE) * uniform(_SIDE))).astype(np.int32),
        interpolation=interpolation.astype(np.int32),
        photometric=uniform(_PHOTOMETRIC) < chances.photometric,
        turn=turn.astype(np.int32),
        factor=factor.astype(np.float32),
    )


def _boxes(uniform: Callable[[int], np.ndarray], count: int, size: int) -> np.ndarray:
    """int32 [b, 4]: area and aspect drawn until they fit; the whole image if they never do."""
    height = np.full(count, size)
    width = np.full(count, size)
    done = np.zeros(count, bool)
    for attempt in range(_ATTEMPTS):
        area = size**2 * (_LEAST_AREA + (1 - _LEAST_AREA) * uniform(_AREA + attempt))
        aspect = np.exp(np.log(_MOST_ASPECT) * (2 * uniform(_ASPECT + attempt) - 1))
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = ~done & (w <= size) & (h <= size)
        height[fits], width[fits] = h[fits], w[fits]
        done |= fits
    top = (uniform(_TOP) * (size - height + 1)).astype(np.int64)
    left = (uniform(_LEFT) * (size - width + 1)).astype(np.int64)
    return np.stack([top, left, height, width], 1).astype(np.int32)


def apply(image: np.ndarray, draws: Draws, row: int) -> np.ndarray:
    """The image uint8 [size, size, 3] RGB with the draws of one row; mirroring comes later."""
    if draws.crop[row]:
        top, left, height, width = draws.box[row]
        kept = np.zeros_like(image)
        kept[top : top + height, left : left + width] = image[
            top : top + height, left : left + width
        ]
        image = kept
    if draws.low_res[row]:
        side = int(draws.side[row])
        down, up = (INTERPOLATIONS[k] for k in draws.interpolation[row])
        small = cv2.resize(image, (side, side), interpolation=down)
        image = cv2.resize(small, image.shape[1::-1], interpolation=up)
    if draws.photometric[row]:
        for kind, factor in zip(draws.turn[row], draws.factor[row], strict=True):
            image = _jittered(image, int(kind), float(factor))
    return image


def _jittered(image: np.ndarray, kind: int, factor: float) -> np.ndarray:
    """The image blended with black (brightness), its mean grey (contrast) or its grey (saturation).

    In float32, then cut off to whole numbers in 0 .. 255, as PIL.ImageEnhance does.
    """
    wide = image.astype(np.float32)
    ground: np.ndarray | np.float32 = np.float32(0)
    if kind != BRIGHTNESS:  # whole numbers below 2^24: float32 is exact
        grey = (cv2.transform(wide, GREY[None].astype(np.float32)) + 2.0**15) * 2.0**-16  # [h, w]
        ground = np.floor(grey, out=grey).reshape(*grey.shape[:2], 1)
    if kind == CONTRAST:
        ground = np.float32(int(np.mean(ground) + 0.5))
    wide -= ground
    wide *= np.float32(factor)
    wide += ground
    return np.clip(wide, 0, 255, out=wide).astype(np.uint8)
