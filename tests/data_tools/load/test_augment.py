"""AdaFace's augmentations: the distribution its code draws from, the arithmetic of PIL."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_tools import shards
from data_tools.load import augment
from data_tools.load.augment import Probabilities
from data_tools.load.loader import Loader, Stream
from tests.data_tools.samples import pixels
from tests.real import real

N = 40_000
POSITIONS = np.arange(N)
ALL = Probabilities(0.2, 0.2, 0.2)


def kolmogorov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of the two empirical distributions, in units where 1.95 is p = 0.001."""
    places = np.sort(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), places, "right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max() / math.sqrt(1 / len(a) + 1 / len(b))


def test_each_is_applied_as_often_as_asked_and_independently():
    drawn = augment.draw(1, POSITIONS, ALL, 112)
    applied = np.stack(
        [drawn.crop, drawn.low_res, drawn.photometric, augment.flip_mask(1, POSITIONS)]
    )
    assert np.abs(applied.mean(1) - [0.2, 0.2, 0.2, 0.5]).max() < 5 * 0.5 / math.sqrt(N)
    assert np.abs(np.corrcoef(applied) - np.eye(4)).max() < 5 / math.sqrt(N)
    none = augment.draw(1, POSITIONS, Probabilities(), 112)
    assert not (none.crop | none.low_res | none.photometric).any()
    every = augment.draw(1, POSITIONS, Probabilities(1, 1, 1), 112)
    assert (every.crop & every.low_res & every.photometric).all()


def test_boxes_have_the_distribution_of_random_resized_crop():
    """Against a plain loop with its own generator, as torchvision describes the operation."""
    random, wanted = np.random.default_rng(0), []
    for _ in range(N):
        for _ in range(10):
            area = 112 * 112 * random.uniform(0.2, 1)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= 112 and h <= 112:
                wanted.append((random.integers(112 - h + 1), random.integers(112 - w + 1), h, w))
                break
        else:
            wanted.append((0, 0, 112, 112))
    box, plain = augment.draw(2, POSITIONS, ALL, 112).box, np.array(wanted)
    for column in range(4):
        assert kolmogorov(box[:, column], plain[:, column]) < 1.95
    assert kolmogorov(box[:, 2] * box[:, 3], plain[:, 2] * plain[:, 3]) < 1.95
    assert kolmogorov(box[:, 3] / box[:, 2], plain[:, 3] / plain[:, 2]) < 1.95
    assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= 112).all()


def test_sides_interpolations_factors_and_turns():
    drawn = augment.draw(3, POSITIONS, ALL, 112)
    random = np.random.default_rng(1)
    assert kolmogorov(drawn.side, (random.uniform(0.2, 1.0, N) * 112).astype(int)) < 1.95
    for column in range(3):
        assert kolmogorov(drawn.factor[:, column], random.uniform(0.5, 1.5, N)) < 1.95
    pairs = drawn.interpolation @ [5, 1]
    turns = drawn.turn @ [9, 3, 1]
    for values, kinds in ((pairs, 25), (turns, 6)):
        counts = np.unique(values, return_counts=True)[1]
        assert len(counts) == kinds
        assert ((counts - N / kinds) ** 2 / (N / kinds)).sum() < kinds + 5 * math.sqrt(2 * kinds)
    assert (np.sort(drawn.turn, 1) == [0, 1, 2]).all()


def test_drawn_afresh_each_epoch_and_the_same_again():
    first, again = (augment.draw(7, np.arange(100, 600), ALL, 112) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    part = augment.draw(7, np.arange(200, 300), ALL, 112)
    assert all(np.array_equal(a[100:200], b) for a, b in zip(first, part, strict=True))
    for other in (augment.draw(8, np.arange(100, 600), ALL, 112),
                  augment.draw(7, np.arange(600, 1100), ALL, 112)):  # fmt: skip
        assert not np.array_equal(first.crop, other.crop)
        assert abs(np.corrcoef(first.factor[:, 0], other.factor[:, 0])[0, 1]) < 5 / math.sqrt(500)


def only(**fields) -> augment.Draws:
    plain = augment.draw(0, np.arange(1), Probabilities(), 112)
    return plain._replace(**{name: np.array([value]) for name, value in fields.items()})


def test_a_crop_keeps_its_place_on_black():
    image = pixels(3)
    got = augment.apply(image, only(crop=True, box=(10, 20, 50, 31)), 0)
    assert np.array_equal(got[10:60, 20:51], image[10:60, 20:51])
    got[10:60, 20:51] = 0
    assert not got.any()


def test_a_low_resolution_is_opencvs():
    image = pixels(3)
    got = augment.apply(image, only(low_res=True, side=40, interpolation=(2, 3)), 0)
    small = cv2.resize(image, (40, 40), interpolation=cv2.INTER_AREA)
    assert np.array_equal(got, cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.31, 1.5])
@pytest.mark.parametrize("turn", augment.TURNS.tolist(), ids=str)
def test_photometric_is_pils_to_the_bit(turn, factor):
    image = pixels(5)
    factors = np.float32([factor, 2 - factor, 1.1])
    got = augment.apply(image, only(photometric=True, turn=turn, factor=factors), 0)
    want = Image.fromarray(image)
    enhance = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for kind, by in zip(turn, factors.tolist(), strict=True):
        want = enhance[kind](want).enhance(by)
    assert np.array_equal(got, np.array(want))


def test_the_loader_applies_what_is_drawn_and_nothing_by_default():
    data = shards.open(real("recordio/popkorn"))
    plain = Loader(data, seed=1, global_batch=24)
    changed = Loader(data, seed=1, global_batch=24, chances=Probabilities(0.3, 0.3, 0.3))
    with plain, changed:
        a, b = next(plain), next(changed)
    drawn = augment.draw(1, a.positions, Probabilities(0.3, 0.3, 0.3), 112)
    same = (a.images == b.images).flatten(1).all(1).numpy()
    assert np.array_equal(same, ~(drawn.crop | drawn.low_res | drawn.photometric))
    for row in range(24):
        image = np.ascontiguousarray(a.images[row].permute(1, 2, 0).numpy())
        want = augment.apply(image, drawn, row)
        assert np.array_equal(b.images[row].permute(1, 2, 0).numpy(), want)


def test_no_probability_is_refused():
    data = shards.open(real("recordio/popkorn"))
    with pytest.raises(ValueError, match="each must be a probability"):
        Stream(data, seed=0, global_batch=4, chances=Probabilities(crop=1.5))
