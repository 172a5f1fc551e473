"""The numbers of an inversion against cases whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recognition.inversion import metrics, pictures, privacy


def test_likeness_of_known_faces():
    gallery = np.eye(4) * 3
    made = np.array([[1.0, 0, 0, 0], [0, 1, 2, 0], [0, 0, 1, 0], [0, 0, 0, 9]])
    found = metrics.likeness(made, [gallery[:3], gallery[3:]], np.arange(4))
    assert found["identity_rate"] == 0.75  # the second is nearer to the third
    assert found["cosine_mean"] == pytest.approx((3 + 5**-0.5) / 4)
    assert (found["chance"], found["times_chance"], found["gallery"]) == (0.25, 3.0, 4)
    tie = metrics.likeness(np.array([[1.0, 1, 0, 0]]), [gallery], np.array([0]))
    assert tie["identity_rate"] == 0  # as near to another: not told apart
    centres_of_two = np.stack([np.eye(4)[:2], np.eye(4)[2:]])  # [2 classes, 2 centres, 4]
    several = metrics.likeness(np.eye(4)[[1]], [centres_of_two], np.array([0]))
    assert several["cosine_mean"] == 1.0 and several["identity_rate"] == 1.0


def test_frechet_distance_is_that_of_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    for n, m, size in ((50, 70, 6), (40, 9, 12), (5, 4, 12)):
        a = generator.normal(size=(n, size)) @ generator.normal(size=(size, size))
        b = generator.normal(size=(m, size)) + 1
        s, t = np.cov(a.T), np.cov(b.T)
        root = np.linalg.eigvals(s @ t)  # tr of the root: sum of roots of the eigenvalues
        root = np.sqrt(np.maximum(root.real, 0)).sum()
        if n > size and m > size:
            assert np.trace(linalg.sqrtm(s @ t)).real == pytest.approx(root, rel=1e-8)
        gap = a.mean(0) - b.mean(0)
        expected = gap @ gap + np.trace(s) + np.trace(t) - 2 * root
        assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(s))
    one = generator.normal(size=(100000, 1))
    assert metrics.frechet_distance(one, 3 * one + 5) == pytest.approx(
        (2 * one.mean() + 5) ** 2 + 4 * one.var(ddof=1), rel=1e-9
    )
    for wrong in (a[:1], a[:, :3], np.full_like(a, np.nan)):
        with pytest.raises(ValueError):
            metrics.frechet_distance(wrong, b)


def test_a_threshold_lets_no_more_impostors_pass_than_its_far():
    scores = np.random.default_rng(0).permutation(np.arange(1000) / 1000)
    for far, count in ((0.01, 10), (0.001, 1), (0.5, 500)):
        assert (scores > privacy.threshold_at(scores, far)).sum() == count
    assert privacy.threshold_at(scores, 0.0009) is None
    tied = np.zeros(100)
    assert (tied > privacy.threshold_at(tied, 0.1)).sum() == 0


def test_pictures_are_clipped_and_laid_out():
    images = torch.zeros(5, 3, 112, 112)
    images[1] = 3.0
    pixels = pictures.as_pixels(images)
    assert pixels[0].max() in (127, 128) and (pixels[1] == 255).all()
    laid = pictures.grid(pixels)
    assert laid.shape == (224, 336, 3) and (laid[:112, 112:224] == 255).all()
    assert laid[0, 0, 0] in (127, 128) and (laid[112:, 224:] == 255).all()
