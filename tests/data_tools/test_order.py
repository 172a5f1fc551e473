"""The order of samples: a fresh permutation each epoch, cut the same way at every world size."""

import time

import numpy as np
import pytest

from data_tools import order

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 99, 100, 101, 1023, 1024, 1025, 10007]


@pytest.mark.parametrize("num_images", SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 12345])
def test_every_id_comes_once_an_epoch(num_images: int, epoch: int):
    got = order.ids(num_images, seed=7, start=epoch * num_images, count=num_images)
    assert got.dtype == np.int64
    assert np.array_equal(np.sort(got), np.arange(num_images))


def test_a_stretch_of_a_large_epoch_repeats_nothing_and_stays_in_range():
    got = order.ids(42_474_557, seed=0, start=3 * 42_474_557, count=200_000)
    assert len(np.unique(got)) == 200_000
    assert 0 <= got.min() and got.max() < 42_474_557


def test_any_stretch_is_a_slice_of_the_stream():
    whole = order.ids(101, seed=3, start=0, count=1000)  # nine epochs and a bit
    for start, count in [(0, 1), (100, 2), (50, 500), (999, 1), (7, 0), (202, 101)]:
        assert np.array_equal(order.ids(101, 3, start, count), whole[start : start + count])


def test_epochs_and_seeds_differ_and_the_same_seed_does_not():
    n = 10_007
    epochs = order.ids(n, 5, 0, 20 * n).reshape(20, n)
    seeds = np.stack([order.ids(n, seed, 0, n) for seed in [0, 1, 2, 2**40, 2**63, -1]])
    for orders in (epochs, seeds):
        for i in range(len(orders)):
            for j in range(i):  # two random permutations agree in one place on average
                assert np.count_nonzero(orders[i] == orders[j]) < 12
    assert np.array_equal(order.ids(n, 5, 0, n), epochs[0])


def test_every_permutation_of_three_is_as_likely():
    epochs = order.ids(3, seed=11, start=0, count=3 * 60_000).reshape(-1, 3)
    _, counts = np.unique(epochs @ [9, 3, 1], return_counts=True)
    assert len(counts) == 6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30  # chi-square, 5 degrees: p = 1e-5


@pytest.mark.parametrize("num_images", [16, 97, 1000])
def test_where_an_image_comes_is_uniform(num_images: int):
    """Over many epochs each (image, tenth of the epoch) is as frequent: chi-square."""
    epochs = 4000
    got = order.ids(num_images, 1, 0, epochs * num_images).reshape(epochs, num_images)
    where = np.argsort(got, axis=1)[:, :16]  # [epochs, 16] the position of images 0 .. 15
    tenths = where * 10 // num_images
    widths = np.bincount(np.arange(num_images) * 10 // num_images, minlength=10)
    expected = epochs * widths / num_images
    for image in range(16):
        seen = np.bincount(tenths[:, image], minlength=10)
        assert ((seen - expected) ** 2 / expected).sum() < 45  # 9 degrees: p = 1e-6


def test_neighbours_in_the_order_are_unrelated():
    n = 100_003
    got = order.ids(n, seed=2, start=0, count=n)
    place = np.argsort(got)
    noise = 5 / np.sqrt(n)  # five standard deviations of a correlation
    for lag in (1, 2, 316, 317):  # 317 is the radix of the digits
        assert abs(np.corrcoef(got[:-lag], got[lag:])[0, 1]) < noise
        assert abs(np.corrcoef(place[:-lag], place[lag:])[0, 1]) < noise
    steps = np.diff(got)
    assert np.count_nonzero(np.abs(steps) == 1) < 15  # two expected
    next_epoch = order.ids(n, seed=2, start=n, count=n)
    assert abs(np.corrcoef(got, next_epoch)[0, 1]) < noise


@pytest.mark.parametrize("num_images", [1024, 1000, 10_007])
def test_parity_and_residues_do_not_leak(num_images: int):
    """The even positions hold as many even ids as chance has it (and modulo 3, 8 as well)."""
    got = order.ids(num_images, seed=9, start=0, count=200 * num_images).reshape(200, num_images)
    for modulus in (2, 3, 8):
        same = (got % modulus == np.arange(num_images) % modulus).mean()
        assert abs(same - 1 / modulus) < 5 / np.sqrt(got.size)


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (3, 3), (2, 5), (0, 2), (8192, 7)])
def test_rank_slices_are_contiguous_and_even(count: int, parts: int):
    slices = [order.rank_slice(count, parts, part) for part in range(parts)]
    assert slices[0][0] == 0 and slices[-1][1] == count
    assert all(a[1] == b[0] for a, b in zip(slices, slices[1:], strict=False))
    sizes = [stop - start for start, stop in slices]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_ranks_and_micro_steps_together_read_the_stream(world: int, accumulation: int):
    n, batch, steps = 103, 43, 6  # 43 is a multiple of nothing and six batches pass two epochs
    got = [
        order.step_ids(n, 4, step * batch, batch, accumulation, micro, world, rank)
        for step in range(steps)
        for micro in range(accumulation)
        for rank in range(world)
    ]
    assert np.array_equal(np.concatenate(got), order.ids(n, 4, 0, steps * batch))


def test_a_resume_at_another_world_size_continues_the_stream():
    n, batch = 103, 20
    before = [order.step_ids(n, 4, seen, batch, 1, 0, 4, r) for seen in (0, 20) for r in range(4)]
    after = [
        order.step_ids(n, 4, seen, batch, 2, m, 3, r)
        for seen in (40, 60)
        for m in (0, 1)
        for r in range(3)
    ]
    assert np.array_equal(np.concatenate(before + after), order.ids(n, 4, 0, 80))


def test_forty_two_million_images_cost_no_more_than_the_batch():
    order.ids(42_474_557, 0, 0, 4096)
    times = []
    for start in (10**6, 10**9, 10**12):
        began = time.perf_counter()
        order.ids(42_474_557, 0, start, 4096)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 1), "num_images = 0"),
        ((5, 0, -1, 1), "start = -1"),
        ((5, 0, 0, -2), "count = -2"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        order.ids(*arguments)


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="part 4 of 4"):
        order.rank_slice(10, 4, 4)
