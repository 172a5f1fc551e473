"""The drawing of a face: a person in a pose, from back to front."""

import cv2
import numpy as np

from data_tools.synthetic.canvas import (
    SIZE,
    Colour,
    Sheet,
    closed,
    disc,
    fill,
    mirrored,
    outline,
    ribbon,
    shade,
)
from data_tools.synthetic.people import Person, Pose

_EYES = 51.6  # y

# Palettes, RGB.
_SKIN = ((250, 222, 205), (238, 194, 165), (205, 152, 115), (150, 100, 70), (88, 58, 44))
_HAIR = ((24, 20, 20), (62, 40, 28), (110, 68, 36), (150, 62, 30), (205, 164, 96), (170, 168, 166))
_IRIS = ((48, 28, 18), (92, 58, 28), (120, 108, 52), (78, 120, 84), (70, 118, 168), (128, 142, 152))
_FRAME = ((20, 20, 22), (90, 50, 30), (150, 30, 40), (60, 70, 110), (190, 175, 140))


def paint(image: np.ndarray, person: Person, pose: Pose, marks: np.ndarray) -> None:
    """Draws the person over the background in image, uint8 [SIZE, SIZE, 3].

    `marks` [32, 2] in [0, 1) places the person's moles, freckles and scar.
    """
    sheet = Sheet(image, pose)
    skin = shade(_SKIN, person.skin) * (1 + pose.tan) + (person.ruddy, -person.ruddy / 2, 0)
    hair = shade(_HAIR, person.hair)
    _behind(sheet, person, pose, skin, hair)
    sheet.fill(_head(person), skin)
    _relief(sheet, person, pose)
    _marks(sheet, person, skin, marks)
    for side in (-1.0, 1.0):
        _eye(sheet, person, pose, side, skin)
        _brow(sheet, person, pose, side, skin, hair)
    _nose(sheet, person, skin)
    _mouth(sheet, person, pose, skin)
    _beard(sheet, person, pose, hair)
    _fringe(sheet, person, pose, hair)
    if person.glasses > 0 and pose.bare_eyes > 0.15:
        _glasses(sheet, person)


def _head(p: Person) -> np.ndarray:
    return mirrored(
        (0, -7),
        (p.forehead * 0.62, -2),
        (p.forehead, 16),
        (p.temples, 42),
        (p.cheeks, 66),
        (p.jaw, 91),
        (p.chin, p.chin_y - 5),
        (0, p.chin_y),
    )


def _behind(sheet: Sheet, p: Person, pose: Pose, skin: Colour, hair: Colour) -> None:
    """What the head stands before: hair, neck, clothes, ears."""
    if p.hairline > -4:  # otherwise bald
        end, wide = p.hair_length + pose.hair_grow, p.hair_volume + pose.hair_ruffle * 0.6
        sheet.fill(mirrored((0, -40), (wide, 0), (wide, end - 12), (wide * 0.8, end)), hair * 0.72)
    neck = p.jaw * 0.78
    sheet.fill(np.array([(-neck, 90), (neck, 90), (neck + 3, 140), (-neck - 3, 140)]), skin * 0.7)
    for side in (-1.0, 1.0):
        x = side * (p.temples + p.cheeks) * 0.5
        sheet.fill(disc(x, p.ears_y, p.ears * 0.8, p.ears * 1.25 + 2), skin * 0.9)
        sheet.fill(disc(x + side, p.ears_y, p.ears * 0.4, p.ears * 0.8), skin * 0.7)


def _relief(sheet: Sheet, p: Person, pose: Pose) -> None:
    """Soft light and dark areas of the skin: one grey layer, blurred, times the picture / 128."""
    grey = np.full((SIZE, SIZE), 128, np.uint8)

    def area(points: np.ndarray, strength: float, lift: float = 0.0) -> None:
        fill(grey, sheet.place(points, lift), np.array([128.0 + strength]))

    if p.stubble > 0:
        jaw = mirrored(
            (p.mouth_width, 82), (p.cheeks, 70), (p.jaw, 93), (p.chin, p.chin_y), (0, 122)
        )
        area(jaw, -p.stubble * 90)
    area(ribbon((-22, 27, 2), (0, 24, 2.5), (22, 27, 2)), p.wrinkles)
    area(disc(0, p.chin_y - 9, 4, 3), -p.dimple)
    for side in (-1.0, 1.0):
        eye = _EYES + p.eye_y
        area(disc(side * p.eye_x, eye - 2, p.eye_width + 4, p.eye_height + 4), -p.eye_depth)
        area(disc(side * p.eye_x, eye + p.eye_height + 4, p.eye_width, 1.8), -p.bags)
        area(disc(side * p.cheeks * 0.62, 68, 8, 5), p.cheekbones)
        x, y = p.nose_width + 2, p.nose_y - 1
        corner = p.mouth_width + 3 + pose.smile
        fold = ((x, y), (x + 2.2, y), (corner + 2, p.mouth_y - 1), (corner, p.mouth_y))
        area(np.array(fold) * (side, 1), -p.folds - 3 * max(pose.smile, 0))
        flank = ((p.nose_ridge, 50), (p.nose_ridge + 4, 50), (p.nose_width + 2, p.nose_y))
        area(np.array((*flank, (p.nose_ridge, p.nose_y))) * (side, 1), -p.nose_relief, lift=3)
    ridge, tip = p.nose_ridge, p.nose_y - 2
    area(
        closed(
            (-ridge, 48),
            (ridge, 48),
            (ridge + p.nose_bend, 60),
            (ridge + 1, tip),
            (-ridge - 1, tip),
        ),
        p.nose_relief * 0.7,
        lift=6,
    )
    soft = cv2.blur(cv2.blur(grey, (5, 5)), (5, 5))
    cv2.multiply(sheet.image, cv2.cvtColor(soft, cv2.COLOR_GRAY2RGB), sheet.image, 1 / 128)


def _marks(sheet: Sheet, p: Person, skin: Colour, marks: np.ndarray) -> None:
    """Freckles over nose and cheeks, moles anywhere, a scar."""
    for x, y in marks[: max(0, int(p.freckles))]:
        sheet.fill(disc((x - 0.5) * 62, 58 + y * 20, 0.75, 0.7), skin * (0.74, 0.66, 0.6))
    for x, y in marks[26 : 26 + max(0, int(p.moles))]:
        size = 0.9 + 1.1 * ((x * 7) % 1)
        sheet.fill(disc((x - 0.5) * 64, 30 + y * 76, size, size), skin * (0.42, 0.34, 0.32))
    if p.scar > 0:
        (x, y), (dx, dy) = marks[30:32]
        x, y, dx, dy = (x - 0.5) * 56, 34 + y * 66, 10 * dx - 5, 4 + 8 * dy
        sheet.fill(
            np.array([(x, y), (x + 1.6, y), (x + dx + 1, y + dy), (x + dx, y + dy)]), skin * 1.2
        )


def _eye(sheet: Sheet, p: Person, pose: Pose, side: float, skin: Colour) -> None:
    """Opening, iris and pupil cut off by it, lashes, crease."""
    x, y = side * p.eye_x, _EYES + p.eye_y
    width, height = p.eye_width, p.eye_height
    up, skew = height * pose.lids, side * p.eye_skew * width
    inner, outer = (
        (x - side * width, y + p.eye_tilt * 0.5),
        (x + side * width, y - p.eye_tilt * 0.5),
    )
    upper = (
        (x - side * width * 0.5 + skew * 0.5, y - up * 0.85),
        (x + side * width * 0.5 + skew * 0.5, y - up * 0.85),
    )
    lower = (
        (x + side * width * 0.45, y + height * 0.55),
        (x - side * width * 0.45, y + height * 0.6),
    )
    opening = sheet.place(closed(inner, *upper, outer, *lower), 1.0)

    left, top = np.maximum(opening.min(0).astype(int) - 2, 0)
    right, bottom = opening.max(0).astype(int) + 3
    patch = sheet.image[top:bottom, left:right]
    inside = np.zeros(patch.shape, np.uint8)
    fill(inside, opening - (left, top), np.full(3, 255.0))
    ball = np.full(patch.shape, (232, 226, 222), np.uint8)
    centre = (x + pose.gaze_x, y + pose.gaze_y - 0.3)
    for size, colour in (
        (p.eye_iris, shade(_IRIS, p.iris)),
        (p.eye_iris * 0.45, np.full(3, 14.0)),
    ):
        fill(ball, sheet.place(disc(*centre, size, size), 1.0) - (left, top), colour)
    shown = cv2.multiply(ball, inside, scale=1 / 255)
    kept = cv2.multiply(patch, 255 - inside, scale=1 / 255)
    cv2.add(shown, kept, patch)

    lash, dark = p.eye_lashes * 0.5, skin * 0.22
    lid = ((*inner, 0.2), (*upper[0], lash), (*upper[1], lash), (*outer, lash * 0.7))
    sheet.fill(ribbon(*lid), dark, 1.0)
    crease = up * 0.85 + p.eye_crease
    line = ((inner[0], y - 1.2, 0.1), (x, y - crease, 0.45), (outer[0], y - 0.8, 0.1))
    sheet.fill(ribbon(*line), skin * 0.62, 1.0)


def _brow(sheet: Sheet, p: Person, pose: Pose, side: float, skin: Colour, hair: Colour) -> None:
    x, y = side * (p.eye_x + p.brow_gap), _EYES + p.eye_y - p.brow_y - pose.brows
    width, tilt = p.brow_width, p.brow_tilt
    band = (
        (x - side * width, y + tilt + pose.frown * 1.6, p.brow_height),
        (x, y - p.brow_arch * 0.6, p.brow_height * 0.95),
        (x + side * width * 0.5, y - p.brow_arch * 0.7 - tilt * 0.5, p.brow_height * 0.8),
        (x + side * width * 1.1, y - tilt, 0.3),
    )
    sheet.fill(ribbon(*band), skin * 0.5 * (1 - p.brow_dark) + hair * 0.75 * p.brow_dark, 2.0)


def _nose(sheet: Sheet, p: Person, skin: Colour) -> None:
    """Wings, nostrils and the shadow below the tip."""
    y, width = p.nose_y, p.nose_width
    for side in (-1.0, 1.0):
        wing = (
            (side * width * 0.92, y - 5),
            (side * (width + 0.8), y - 1),
            (side * width * 0.8, y + 1),
        )
        sheet.fill(closed(*wing, (side * (width - 0.6), y - 2)), skin * 0.6, 5.0)
        sheet.fill(
            disc(side * width * 0.48, y + 0.6, p.nostrils * 1.2, p.nostrils * 0.7), skin * 0.3, 7.0
        )
    tip = ((-width * 0.55, y + 1, 0.2), (0, y + 1 + p.nose_tip, 0.7), (width * 0.55, y + 1, 0.2))
    sheet.fill(ribbon(*tip), skin * 0.55, 8.0)


def _mouth(sheet: Sheet, p: Person, pose: Pose, skin: Colour) -> None:
    """Lips; between them a line, or teeth and the dark when the mouth is open."""
    y, gape = p.mouth_y, max(pose.gape, 0.0)
    width = p.mouth_width + pose.smile * 0.8 - pose.pout - gape * 0.3
    rise, bow = pose.smile, p.lip_bow
    left, right = (-width, y - rise - p.mouth_tilt), (width, y - rise + p.mouth_tilt)
    amount = min(max(p.lips + pose.make_up, 0.0), 1.0)
    lip = skin * (1 - amount) * 0.9 + np.array([168, 52, 62]) * amount
    top, half = y - gape * 0.35, width * 0.45
    upper, low = top - p.lip_upper, y + gape * 0.65
    peaks = ((-half * 0.5, upper - bow * 0.5), (0, upper + bow), (half * 0.5, upper - bow * 0.5))
    sheet.fill(closed(left, *peaks, right, (half, top), (-half, top)), lip * 0.86, 2.0)
    if gape > 0.4:
        hole = closed(left, (-half, top), (half, top), right, (half, low), (-half, low))
        sheet.fill(hole, np.array([58.0, 18, 20]), 2.0)
        if gape > 1.5:
            sheet.fill(
                ribbon((-half, top + 0.8, 0.9), (half, top + 0.8, 0.9)), np.full(3, 228.0), 2.0
            )
    bottom = low + p.lip_lower
    sheet.fill(
        closed(left, (-half, low), (half, low), right, (half, bottom), (-half, bottom)), lip, 2.0
    )
    line = ((*left, 0.25), (-half, top, 0.4), (half, top, 0.4), (*right, 0.25))
    sheet.fill(ribbon(*line), lip * 0.38, 2.0)


def _beard(sheet: Sheet, p: Person, pose: Pose, hair: Colour) -> None:
    """Moustache and goatee, where the person has them."""
    top = p.mouth_y - max(pose.gape, 0.0) * 0.35 - p.lip_upper - 2.2
    if p.moustache > 0:
        width, end = p.mouth_width * (0.7 + 0.2 * p.moustache), p.mouth_y - 0.5 - pose.smile
        band = (
            (-width, end, 0.3),
            (-width * 0.5, top, p.moustache),
            (0, top - 0.8, p.moustache * 0.8),
        )
        mirror = ((-x, y, half) for x, y, half in band[1::-1])
        sheet.fill(ribbon(*band, *mirror), hair * 0.85, 3.0)
    if p.goatee > 0:
        low = p.mouth_y + max(pose.gape, 0.0) * 0.65 + p.lip_lower + 3
        width = 3 + p.goatee * 9
        sheet.fill(mirrored((0, low), (width, low + 2), (width * 0.7, 124), (0, 128)), hair * 0.85)


def _fringe(sheet: Sheet, p: Person, pose: Pose, hair: Colour) -> None:
    """Hair before the face: its line over the forehead, its sides, some strands."""
    if p.hairline <= -4:
        return
    line = p.hairline + pose.hair_ruffle * 0.5
    part, wave, inside = p.hair_part, p.hair_wave, p.temples - p.hair_inset
    low = p.hair_sides + pose.hair_ruffle
    edge = [
        (-inside - 9.0, low),
        (-inside, low - 4),
        (-inside * 0.92, (line + low) * 0.5),
        (-inside * 0.6, line - part * 24 + wave * 0.5),
        (-inside * 0.15, line - part * 8 - wave * 0.7),
        (inside * 0.3, line + part * 10 + wave * 0.6),
        (inside * 0.65, line + part * 26 + wave * 0.2),
        (inside * 0.92, (line + low) * 0.5),
        (inside, low - 4),
        (inside + 9.0, low),
    ]
    sheet.fill(closed(*edge, (p.hair_volume, 0), (0, -60), (-p.hair_volume, 0)), hair, 1.0)
    for i, (x, y) in enumerate(edge[2:8]):
        strand = ((x * 0.9, y - 1), (x * 0.9 + 1.4, y - 1), (x * 0.5 + part * 30, -30.0))
        sheet.fill(np.array(strand), hair * (1.35 if i % 2 else 0.7), 1.0)


def _glasses(sheet: Sheet, p: Person) -> None:
    """Two rims and a bridge."""
    colour = shade(_FRAME, p.glasses_tone)
    width, height = p.glasses_width, p.glasses_height
    square = closed(
        (-width, 0),
        (-width, -height),
        (width, -height),
        (width, 0),
        (width, height),
        (-width, height),
    )
    rim = disc(0, 0, width, height) if p.glasses_round > 0.5 else square
    for side in (-1.0, 1.0):
        outline(sheet.image, sheet.place(rim + (side * 17.6, _EYES + 1), 5.0), colour)
    gap = 17.6 - width
    sheet.fill(ribbon((-gap, _EYES, 0.7), (0, _EYES - 1.5, 0.7), (gap, _EYES, 0.7)), colour, 7.0)
