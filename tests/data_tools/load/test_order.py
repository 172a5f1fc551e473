"""The order of samples: a fresh permutation each epoch, cut the same way at every world size."""

import tracemalloc

import numpy as np
import pytest

from data_tools.load import order

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


def step_ids(num_images: int, seed: int, *micro_step: int) -> np.ndarray:
    """int64 [b]: the images of one set that one rank trains on; see order.step_positions."""
    start, stop = order.step_positions(*micro_step)
    return order.ids(num_images, seed, start, stop - start)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_ranks_and_micro_steps_together_read_the_stream(world: int, accumulation: int):
    n, batch, steps = 103, 43, 6  # 43 is a multiple of nothing and six batches pass two epochs
    got = [
        step_ids(n, 4, step * batch, batch, accumulation, micro, world, rank)
        for step in range(steps)
        for micro in range(accumulation)
        for rank in range(world)
    ]
    assert np.array_equal(np.concatenate(got), order.ids(n, 4, 0, steps * batch))


def test_a_resume_at_another_world_size_continues_the_stream():
    n, batch = 103, 20
    before = [step_ids(n, 4, seen, batch, 1, 0, 4, r) for seen in (0, 20) for r in range(4)]
    after = [
        step_ids(n, 4, seen, batch, 2, m, 3, r)
        for seen in (40, 60)
        for m in (0, 1)
        for r in range(3)
    ]
    assert np.array_equal(np.concatenate(before + after), order.ids(n, 4, 0, 80))


def test_forty_two_million_images_cost_no_more_than_the_batch():
    """In memory, which bounds the work: no array is as long as the epoch."""
    peaks = []
    for images in (42_475, 42_474_557):
        for start in (10**6, 10**9, 10**12):
            tracemalloc.start()
            order.ids(images, 0, start, 4096)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks[3:]) < 2 * max(peaks[:3]) < 4096 * 8 * 100


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


# --- In blocks ------------------------------------------------------------------------------------

BLOCKS = [
    order.ShuffleBlocks(1, 1),
    order.ShuffleBlocks(4, 3),
    order.ShuffleBlocks(7, 100),
    order.ShuffleBlocks(1000, 2),
]


@pytest.mark.parametrize("num_images", [1, 5, 12, 13, 100, 1023, 10007])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_in_blocks_too_every_id_comes_once_an_epoch(num_images: int, blocks: order.ShuffleBlocks):
    for epoch in (0, 3):
        got = order.ids(num_images, 7, epoch * num_images, num_images, blocks)
        assert np.array_equal(np.sort(got), np.arange(num_images))
    whole = order.ids(num_images, 7, 0, 3 * num_images, blocks)  # over the ends of epochs
    part = order.ids(num_images, 7, 1, 2 * num_images, blocks)
    assert np.array_equal(part, whole[1 : 1 + 2 * num_images])


@pytest.mark.parametrize("num_images", [100, 1000, 1009])
def test_a_window_reads_the_stretches_that_are_said_and_no_others(num_images: int):
    blocks = order.ShuffleBlocks(10, 4)
    for epoch in range(3):
        for first in range(0, num_images, 40):
            start = epoch * num_images + first
            got = order.ids(num_images, 1, start, min(40, num_images - first), blocks)
            stretches = order.window_stretches(num_images, 1, start, blocks)
            said = np.concatenate([np.arange(a, b) for a, b in stretches])
            assert np.array_equal(np.sort(got), np.sort(said))
            assert len(stretches) <= 4 + 2  # blocks, the rest, the end of the set
            assert (stretches[1:, 0] >= stretches[:-1, 1]).all()


def test_the_randomness_of_blocks():
    """Within a window as a whole shuffle; neighbours on the disk share a window, as they must."""
    n, blocks = 200_000, order.ShuffleBlocks(100, 50)
    epochs = order.ids(n, 3, 0, 2 * n, blocks).reshape(2, n)
    place = np.argsort(epochs, axis=1)
    assert abs(np.corrcoef(place[0], place[1])[0, 1]) < 0.15  # 2000 blocks: 1 / sqrt(2000) x 5
    for row in epochs:
        assert abs(np.corrcoef(row, np.arange(n))[0, 1]) < 0.15
        for lag in (1, 2, 100):  # no run of neighbours, in any direction
            together = np.abs(row[lag:] - row[:-lag]) == 1
            assert together.mean() < 4 * 2 / 5000
    offsets = [order.ids(n, seed, 0, 5000, blocks).min() % 100 for seed in range(200)]
    assert len(set(offsets)) > 60  # blocks are cut elsewhere each time
    within = epochs[0][:5000]
    ranks = np.argsort(np.argsort(within))
    assert abs(np.corrcoef(ranks, np.arange(5000))[0, 1]) < 5 / np.sqrt(5000)


def test_blocks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="a block needs an image"):
        order.ids(10, 0, 0, 5, order.ShuffleBlocks(0, 3))


# --- Several sets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (1, 2, 5), (7, 1, 1, 4)])
def test_shares_add_up_and_each_set_reads_its_own_stream(shares: tuple):
    sizes = (50, 31, 7, 200)[: len(shares)]
    mixed = order.Order(sizes, 5, shares)
    read: list[list] = [[] for _ in sizes]
    samples = 0
    for batch in [16, 16, 9, 40, 16]:  # a batch size that changes at resumes
        positions = []
        for micro in range(2):
            rows = [mixed.stretches(samples, batch, 2, micro, 3, rank) for rank in range(3)]
            counts = [sum(own) for own in mixed.rows(samples, batch, 2, micro, 3)]
            assert counts == [len(mixed.draw(stretches)[1]) for stretches in rows]
            for stretches in rows:
                places, ids = mixed.draw(stretches)
                positions += places.tolist()
                for k, first in enumerate(np.cumsum([0, *sizes])[:-1].tolist()):
                    own = ids[(ids >= first) & (ids < first + sizes[k])]
                    read[k] += (own - first).tolist()
        assert len(set(positions)) == len(positions) == batch
        samples += batch
    for k, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        assert read[k] == order.ids(size, 5 + k, 0, len(read[k])).tolist()
        assert abs(len(read[k]) - samples * share / sum(shares)) < len(shares)


def test_one_set_is_what_it_was_without_shares():
    one = order.Order((103,), 4)
    for micro in range(3):
        positions, ids = one.draw(one.stretches(43, 43, 3, micro, 2, 1))
        assert np.array_equal(ids, step_ids(103, 4, 43, 43, 3, micro, 2, 1))
        start, stop = order.step_positions(43, 43, 3, micro, 2, 1)
        assert np.array_equal(positions, np.arange(start, stop))
