"""Drawn people: what stays the same in all pictures of a person, and what each picture changes.

Lengths are pixels of the 112 x 112 frame that faces are aligned to, x counted from the face's
middle and y from the top: eyes near (-+17.6, 51.6), nose near (0, 71.7), mouth corners near
(-+14.6, 92.3).
"""

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Self, cast

import numpy as np


def span(low: float, high: float) -> Any:
    """A field that is uniform in [low, high)."""
    return field(metadata={"span": (low, high)})


class Drawn:
    """A dataclass of spans that is drawn whole."""

    @classmethod
    def draw(cls, random: np.random.Generator) -> Self:
        """Every field uniform in its span, and independent of the others."""
        low, high = _spans(cast(Any, cls))
        return cls(*(low + (high - low) * random.random(len(low))).tolist())


@cache
def _spans(kind: Any) -> tuple[np.ndarray, np.ndarray]:
    """[k] lowest and [k] highest values of the fields."""
    low, high = np.array([f.metadata["span"] for f in fields(kind)]).T
    return low, high


@dataclass(frozen=True, slots=True)
class Person(Drawn):
    """What stays the same in all pictures of an identity. Lengths are half widths in pixels."""

    # tones: places on a palette, 0 to 1
    skin: float = span(0.0, 1.0)
    ruddy: float = span(-14, 14)  # red minus green
    hair: float = span(0.0, 1.0)
    iris: float = span(0.0, 1.0)
    lips: float = span(0.15, 0.75)
    # outline
    forehead: float = span(29, 39)
    temples: float = span(37, 46)
    cheeks: float = span(36, 47)
    jaw: float = span(26, 42)
    chin: float = span(9, 22)
    chin_y: float = span(106, 121)
    ears: float = span(4, 11)
    ears_y: float = span(54, 68)
    # eyes
    eye_x: float = span(15.6, 19.6)
    eye_y: float = span(-2, 2)
    eye_width: float = span(5.6, 9.4)
    eye_height: float = span(2.3, 5.2)
    eye_tilt: float = span(-2.2, 2.2)
    eye_skew: float = span(-0.35, 0.35)  # where the upper lid is highest
    eye_iris: float = span(2.5, 3.9)
    eye_crease: float = span(1.0, 4.5)
    eye_lashes: float = span(0.6, 2.0)
    eye_depth: float = span(4, 34)  # darkness of the sockets
    bags: float = span(-16, 20)
    # brows
    brow_y: float = span(7.0, 13.5)  # above the eye
    brow_width: float = span(6.5, 11.5)
    brow_height: float = span(0.7, 2.9)
    brow_arch: float = span(-0.8, 4.2)
    brow_tilt: float = span(-2.8, 2.8)
    brow_gap: float = span(-3, 2.5)
    brow_dark: float = span(0.25, 1.0)
    # nose
    nose_y: float = span(67.5, 77)
    nose_width: float = span(5.2, 11)
    nose_ridge: float = span(1.4, 4.4)
    nose_relief: float = span(8, 42)
    nose_tip: float = span(-1.5, 3.5)  # how far the tip hangs below the wings
    nose_bend: float = span(-2.2, 2.2)
    nostrils: float = span(0.8, 2.4)
    # mouth
    mouth_y: float = span(88.5, 96)
    mouth_width: float = span(10.5, 18.5)
    lip_upper: float = span(1.0, 4.4)
    lip_lower: float = span(1.6, 5.6)
    lip_bow: float = span(0.0, 1.6)
    mouth_tilt: float = span(-1.2, 1.2)
    folds: float = span(-12, 34)  # from nose to mouth
    cheekbones: float = span(-10, 26)
    dimple: float = span(-20, 24)  # of the chin
    wrinkles: float = span(-30, 26)  # of the forehead
    # hair
    hairline: float = span(-8, 31)  # y
    hair_part: float = span(-0.32, 0.32)
    hair_wave: float = span(-7, 9)
    hair_sides: float = span(25, 82)
    hair_inset: float = span(-3, 7)
    hair_volume: float = span(38, 60)
    hair_length: float = span(40, 150)
    stubble: float = span(-0.9, 0.62)
    moustache: float = span(-2.6, 2.4)
    goatee: float = span(-3.0, 1.0)
    # marks
    moles: float = span(-1.0, 4.0)
    freckles: float = span(-30, 26)
    scar: float = span(-2.0, 1.0)
    glasses: float = span(-3.4, 1.0)
    glasses_round: float = span(0.0, 1.0)
    glasses_width: float = span(9.5, 13.5)
    glasses_height: float = span(5.5, 10)
    glasses_tone: float = span(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Pose(Drawn):
    """What differs between pictures of a person, as far as the drawing goes."""

    turn: float = span(-0.42, 0.42)  # radians, about the vertical axis
    nod: float = span(-0.24, 0.24)  # radians, about the horizontal axis
    roll: float = span(-0.11, 0.11)  # radians, in the picture
    scale: float = span(0.92, 1.08)
    shift_x: float = span(-3.2, 3.2)
    shift_y: float = span(-3.2, 3.2)
    smile: float = span(-1.2, 3.4)  # rise of the mouth's corners
    gape: float = span(-5.0, 6.0)  # opening of the mouth
    pout: float = span(-1.8, 1.8)
    lids: float = span(0.35, 1.2)  # opening of the eyes
    brows: float = span(-1.6, 2.6)
    frown: float = span(-1.0, 1.0)
    gaze_x: float = span(-2.0, 2.0)
    gaze_y: float = span(-0.8, 0.8)
    hair_ruffle: float = span(-4, 4)
    hair_grow: float = span(-16, 16)
    tan: float = span(-0.09, 0.09)
    make_up: float = span(-0.18, 0.18)
    bare_eyes: float = span(0.0, 1.0)  # glasses are off below 0.15
