"""The sheet that faces are drawn on, its camera, and the shapes: smooth curves, bands, ellipses.

Shapes are [k, 2] points in the coordinates of people.py. The camera turns, nods, rolls, scales and
shifts the points before OpenCV fills them, so no pixel is resampled. Colours are RGB.
"""

from functools import cache

import cv2
import numpy as np

from data_tools.synthetic.people import Pose

SIZE = 112
_MIDDLE = np.array([55.9, 68.0])  # where the camera turns the face, in the frame
_CENTRE = np.array([0.0, 68.0])  # the same place on the face
_FALL = np.array([0.011, 0.004])  # how fast the face falls back from there
_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates
_STEPS = 4  # points that a spline puts between two control points

Colour = np.ndarray  # float64 [3]


class Sheet:
    """The picture, and the camera that takes points of the face to it."""

    def __init__(self, image: np.ndarray, pose: Pose) -> None:
        self.image = image  # uint8 [SIZE, SIZE, 3]
        cos, sin = pose.scale * np.cos(pose.roll), pose.scale * np.sin(pose.roll)
        roll = np.array([[cos, sin], [-sin, cos]])
        self._across = np.diag((np.cos(pose.turn), np.cos(pose.nod))) @ roll
        self._ahead = np.array((np.sin(pose.turn), np.sin(pose.nod))) @ roll  # [2] for depth 1
        self._fall = np.outer(_FALL, self._ahead)
        self._origin = _MIDDLE + (pose.shift_x, pose.shift_y)

    def place(self, points: np.ndarray, lift: float = 0.0) -> np.ndarray:
        """[k, 2] points of the face, `lift` pixels before its surface -> [k, 2] in the picture.

        The surface is a paraboloid around the nose, depth = 14 + lift - 0.011 x^2 - 0.004 y^2;
        the turn and the nod shorten x and y and add depth times their sines, the roll turns the
        result.
        """
        xy = points - _CENTRE
        at = self._origin + (14.0 + lift) * self._ahead
        return xy @ self._across - (xy * xy) @ self._fall + at

    def fill(self, points: np.ndarray, colour: Colour, lift: float = 0.0) -> None:
        fill(self.image, self.place(points, lift), colour)


def fill(image: np.ndarray, points: np.ndarray, colour: Colour) -> None:
    """Fills the polygon of points [k, 2] in the picture, with smooth edges."""
    cv2.fillPoly(image, [_fixed_point(points)], colour.tolist(), cv2.LINE_AA, _SHIFT)


def outline(image: np.ndarray, points: np.ndarray, colour: Colour) -> None:
    """Draws that polygon as a line one pixel wide."""
    cv2.polylines(image, [_fixed_point(points)], True, colour.tolist(), 1, cv2.LINE_AA, _SHIFT)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return (points * (1 << _SHIFT)).astype(np.int32)


def shade(palette: tuple[tuple[int, ...], ...], place: float) -> Colour:
    """The palette's colour at place 0 to 1, between its entries in proportion."""
    at = place * (len(palette) - 1)
    i = min(int(at), len(palette) - 2)
    return np.array(palette[i]) * (1 - at + i) + np.array(palette[i + 1]) * (at - i)


@cache
def _spline(controls: int) -> np.ndarray:
    """[controls * _STEPS, controls]: the closed Catmull-Rom curve through control points."""
    t = np.arange(_STEPS)[:, None] / _STEPS
    cubic = np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    weights = np.concatenate([t**0, t, t**2, t**3], 1) @ cubic  # [_STEPS, 4] on points -1 .. 2
    matrix = np.zeros((controls * _STEPS, controls))
    for i in range(controls):
        for j in range(4):
            matrix[i * _STEPS : (i + 1) * _STEPS, (i + j - 1) % controls] += weights[:, j]
    return matrix


def closed(*points: tuple[float, float]) -> np.ndarray:
    """[k, 2]: a smooth closed curve through the points."""
    return _spline(len(points)) @ np.array(points)


def ribbon(*points: tuple[float, float, float]) -> np.ndarray:
    """[k, 2]: a band along points (x, y, half its height), mostly left to right."""
    return closed(
        *((x, y - half) for x, y, half in points), *((x, y + half) for x, y, half in points[::-1])
    )


@cache
def _circle() -> np.ndarray:
    angle = np.arange(14) * (2 * np.pi / 14)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def disc(x: float, y: float, width: float, height: float) -> np.ndarray:
    """[14, 2]: an ellipse by its half axes."""
    return _circle() * (width, height) + (x, y)


def mirrored(*right: tuple[float, float]) -> np.ndarray:
    """[k, 2]: a symmetric closed curve; the points run down the right side, x >= 0."""
    left = ((-x, y) for x, y in reversed(right) if x)
    return closed(*right, *left)
