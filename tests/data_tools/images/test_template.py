"""The five-point similarity against scikit-image and a closed form, the warp on real faces."""

import cv2
import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from data_tools.images import template
from tests.real import REAL, real


def five_points(rng, kind):
    """The template moved, turned, scaled and disturbed; or points that look like no face."""
    if kind == "noise":
        return rng.uniform(0, 250, (5, 2))
    if kind == "mirrored":
        return template.TEMPLATE * [-1, 1] + rng.normal(size=(5, 2))
    angle, scale = rng.uniform(-np.pi, np.pi), np.exp(rng.uniform(-2, 3))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * (template.TEMPLATE @ turn.T + rng.normal(size=(5, 2))) + rng.uniform(
        -500, 500, 2
    )


def closed_form(points):
    """Complex least squares in float64: target = a * source + b minimises the squared error."""
    source = points.astype(np.float64) @ [1, 1j]
    target = template.TEMPLATE.astype(np.float64) @ [1, 1j]
    s, t = source - source.mean(), target - target.mean()
    a = np.vdot(s, t) / np.vdot(s, s).real
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


@pytest.mark.parametrize("kind", ["face", "noise", "mirrored"])
def test_similarity_equals_scikit_image(kind):
    rng = np.random.default_rng(0)
    for _ in range(300):
        points = five_points(rng, kind).astype(np.float32)
        expected = SimilarityTransform.from_estimate(points, template.TEMPLATE).params[:2]
        ours = template.similarity(points)
        assert ours.shape == (2, 3)
        # Far below the 1e-6 to 1e-4 pixels by which float64 arithmetic would differ.
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["face", "noise", "mirrored"])
def test_similarity_equals_the_closed_form(kind):
    rng = np.random.default_rng(1)
    for _ in range(300):
        points = five_points(rng, kind).astype(np.float32)
        expected = closed_form(points)
        ours = template.similarity(points)
        reach = 1 + abs(points).max()  # float32 rounding grows with the coordinates
        placed = points @ ours[:, :2].T + ours[:, 2]
        right = points @ expected[:, :2].T + expected[:, 2]
        np.testing.assert_allclose(placed, right, rtol=0, atol=2e-6 * reach)


def test_the_template_is_that_of_the_ijb_scripts():
    # They take the points for 96 x 112 and add 8 to x in float32.
    narrow = np.float32([30.2946, 65.5318, 48.0252, 33.5493, 62.7299])
    assert template.TEMPLATE.dtype == np.float32
    assert template.TEMPLATE[:, 0].tolist() == (narrow + np.float32(8)).tolist()
    assert (
        template.TEMPLATE[:, 1].tolist()
        == np.float32([51.6963, 51.5014, 71.7366, 92.3655, 92.2041]).tolist()
    )


def test_known_similarities_are_recovered():
    assert template.similarity(template.TEMPLATE) == pytest.approx(
        np.array([[1, 0, 0], [0, 1, 0]]), abs=2e-5
    )
    doubled = template.similarity(2 * template.TEMPLATE + [10, 20])
    assert doubled == pytest.approx(np.array([[0.5, 0, -5], [0, 0.5, -10]]), abs=2e-5)
    larger = template.similarity(template.TEMPLATE, size=224)
    assert larger == pytest.approx(np.array([[2, 0, 0], [0, 2, 0]]), abs=4e-5)


def test_collinear_points_still_define_a_similarity():
    points = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]], dtype=np.float32) + 30
    np.testing.assert_allclose(
        template.similarity(points), closed_form(points), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    "points, message",
    [
        (np.full((5, 2), 0.1), "one place"),
        (np.full((5, 2), np.nan), "finite"),
        ([[1, 2], [3, 4], [5, 6], [7, 8], [9, np.inf]], "finite"),
        (np.ones((4, 2)), "\\[5, 2\\]"),
        (np.ones(10), "\\[5, 2\\]"),
        (template.TEMPLATE * 1e30, "no similarity"),
    ],
)
def test_degenerate_points_are_refused(points, message):
    with pytest.raises(ValueError, match=message), np.errstate(over="ignore", invalid="ignore"):
        template.similarity(points)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        np.zeros((0, 9, 3), np.uint8),
    ],
)
def test_warp_refuses_other_images(image):
    with pytest.raises(ValueError, match="uint8 \\[h, w, 3\\]"):
        template.warp(image, template.TEMPLATE)


def test_warp_is_bilinear_with_black_around():
    image = np.random.default_rng(0).integers(1, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(template.warp(image, template.TEMPLATE), image)
    moved = template.warp(image, template.TEMPLATE + [8, 0])
    np.testing.assert_array_equal(moved[:, :103], image[:, 8:111])
    assert not moved[:, 104:].any()
    half = template.warp(image, template.TEMPLATE + [0.5, 0])[50, 50].astype(float)
    assert abs(half - (image[50, 50].astype(float) + image[50, 51]) / 2).max() <= 1
    assert template.warp(image, template.TEMPLATE, size=224).shape == (224, 224, 3)


def landmarks(name):
    """{image: points [5, 2]} of a landmarks file: name, detector score, x1 y1 .. x5 y5."""
    rows = [line.split() for line in real(name).read_text().splitlines()]
    return {row[0]: np.array(row[2:], dtype=np.float32).reshape(5, 2) for row in rows}


def test_real_faces_fall_on_their_aligned_copies():
    points = landmarks("lfw112_landmarks_250px.txt")
    originals = sorted((REAL / "lfw250").glob("*/*.jpg"))
    assert len(originals) == 40
    for path in originals:
        name = f"{path.parent.name}/{path.name}"
        aligned = cv2.imread(str(REAL / "lfw112" / name)).astype(int)
        warped = template.warp(cv2.imread(str(path)), points[name])
        assert abs(warped - aligned).mean() < 2  # the copy has been through JPEG
        shifted = template.warp(cv2.imread(str(path)), points[name] + np.float32([1, 0]))
        assert abs(shifted - aligned).mean() > 2 * abs(warped - aligned).mean()


@pytest.mark.parametrize("person", ["001", "002"])
def test_large_photographs(person):
    # The landmarks were found on the photographs of 1350 pixels reduced to 300.
    points = landmarks("london112_landmarks.txt")[f"{person}/{person}_neutral.jpg"]
    photograph = cv2.imread(str(REAL / "london_full" / f"{person}_03.jpg"))
    reduced = cv2.resize(photograph, (300, 300), interpolation=cv2.INTER_AREA)
    aligned = cv2.imread(str(REAL / "london112" / person / f"{person}_neutral.jpg")).astype(int)
    assert abs(template.warp(reduced, points) - aligned).mean() < 3
    assert abs(template.warp(photograph, 4.5 * points) - aligned).mean() < 10
