"""The order of samples, as pure functions of (seed, samples seen, world, rank).

N images form one endless stream of positions 0, 1, 2, ...: epoch e is the stretch [e N, (e + 1)
N) and holds every image once, in an order of its own. Batches are cut from that stream without
regard to where epochs end, so there is no partial batch. Nothing is stored and nothing is drawn
in sequence: any part of the stream costs O(its length), at 42 million images too, and a resumed
run only needs to know how many samples it has seen.

The order inside an epoch is a keyed bijection of range(N): a Feistel network on the digits of x =
left * b + right with a b >= N, whose results >= N are sent through it again (cycle walking; Black
and Rogaway, "Ciphers with arbitrary finite domains", 2002). a and b are near sqrt(N), so a b - N
< a + b and almost nothing walks.

Where random reads are slow (spinning disks, network file systems), Blocks shuffles in two levels:
blocks of neighbouring images come in random order, and the images of a window of blocks are mixed.

Several sets are drawn from side by side, each in its own order, by its share of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_tools.common.draws import GOLDEN, mix
from data_tools.common.errors import UserError

_ROUNDS = 8
_OF_BLOCKS, _OF_WINDOW, _OF_OFFSET = 2, 3, 4  # purposes; 0 orders single images, 1 is augment.py's


def keyed_hash(seed: int, purpose: int, x: np.ndarray) -> np.ndarray:
    """uint64 [n], uniform in each x [n] >= 0 and independent between seeds and purposes.

    `purpose` keeps apart draws that share a seed and a counter (the order and the flips, say).
    """
    key = mix(np.array([seed % 2**64], np.uint64))
    key = mix(key ^ np.uint64(purpose))
    return mix(key + (np.asarray(x).astype(np.uint64) + np.uint64(1)) * GOLDEN)


class ShuffleBlocks(NamedTuple):
    """A shuffle that reads the disk in long stretches: N images in blocks, blocks in windows.

    An epoch cuts the images, from an offset of its own on, into blocks of neighbours, draws the
    order of the blocks, and mixes all images of `window` consecutive blocks. A reader that holds
    size * window images (0.7 GB at the defaults and 10 KB an image) finds every read in memory.
    """

    size: int = 1024  # images of a block: neighbours on the disk
    window: int = 64  # blocks that are mixed


def ids(
    num_images: int, seed: int, start: int, count: int, blocks: ShuffleBlocks | None = None
) -> np.ndarray:
    """int64 [count]: the images at positions start .. start + count - 1 of the endless stream.

    Raises:
        ValueError: there are no images, start or count is negative, or blocks are empty.
    """
    if num_images < 1:
        raise UserError(f"num_images = {num_images}: a data set needs at least one image")
    if start < 0 or count < 0:
        raise UserError(f"start = {start}, count = {count}: neither may be negative")
    epoch, x = np.divmod(np.arange(start, start + count, dtype=np.int64), num_images)  # [count]
    if blocks is not None:
        return _in_blocks(num_images, seed, epoch, x, blocks)
    return _shuffled(x, num_images, keyed_hash(seed, 0, epoch))


def _shuffled(x: np.ndarray, modulus: int, key: np.ndarray) -> np.ndarray:
    """Where each x [n] of range(modulus) goes under the bijection of its key uint64 [n]: int64."""
    x = _feistel(x.astype(np.uint64), modulus, key)
    outside = np.flatnonzero(x >= modulus)
    while outside.size:
        x[outside] = _feistel(x[outside], modulus, key[outside])
        outside = outside[x[outside] >= modulus]
    return x.astype(np.int64)


def _in_blocks(
    num_images: int, seed: int, epoch: np.ndarray, x: np.ndarray, blocks: ShuffleBlocks
) -> np.ndarray:
    """The images at places x [n] of the epochs [n], shuffled in blocks.

    What is left over after the last full block is the end of the last window; the offset of the
    epoch makes that another stretch each time.
    """
    size, width = blocks.size, blocks.size * blocks.window
    if blocks.size < 1 or blocks.window < 1:
        raise UserError(f"{blocks}: a block needs an image and a window a block")
    key = keyed_hash(seed, _OF_BLOCKS, epoch)
    window = x // width
    within = x - window * width
    last = window == num_images // width  # shorter than the others
    window_key = mix(keyed_hash(seed, _OF_WINDOW, epoch) ^ mix(window.astype(np.uint64)))
    for some, length in ((~last, width), (last, num_images % width)):
        if some.any():
            within[some] = _shuffled(within[some], length, window_key[some])
    x = window * width + within
    block, place = np.divmod(x, size)
    full = block < num_images // size
    if full.any():
        block[full] = _shuffled(block[full], num_images // size, key[full])
    offset = keyed_hash(seed, _OF_OFFSET, epoch) % np.uint64(num_images)
    return (block * size + place + offset.astype(np.int64)) % num_images


def window_stretches(
    num_images: int, seed: int, position: int, blocks: ShuffleBlocks
) -> np.ndarray:
    """int64 [m, 2]: the stretches [start, stop) of images that the window of a position reads.

    In the order of the disk, none around the end of the set.
    """
    epoch, x = divmod(position, num_images)
    width = blocks.size * blocks.window
    first = x // width * width
    slots = np.arange(first // blocks.size, -(-min(first + width, num_images) // blocks.size))
    full = slots < num_images // blocks.size
    key = keyed_hash(seed, _OF_BLOCKS, np.array([epoch]))
    starts = slots * blocks.size
    if full.any():
        count = int(full.sum())
        order = _shuffled(slots[full], num_images // blocks.size, np.repeat(key, count))
        starts[full] = order * blocks.size
    stops = np.where(full, starts + blocks.size, num_images)
    offset = int(keyed_hash(seed, _OF_OFFSET, np.array([epoch]))[0] % np.uint64(num_images))
    starts, lengths = (starts + offset) % num_images, stops - starts
    ends = starts + lengths
    around = ends > num_images
    pieces = [np.stack([starts, np.minimum(ends, num_images)], 1)]
    pieces += [np.stack([np.zeros_like(ends), ends - num_images], 1)[around]]
    stretches = np.concatenate(pieces)
    return stretches[np.argsort(stretches[:, 0])]


def _feistel(x: np.ndarray, num_images: int, key: np.ndarray) -> np.ndarray:
    """A bijection of range(a * b) for each key: uint64 x [n], key [n] -> uint64 [n]."""
    a = math.isqrt(num_images - 1) + 1
    b = -(-num_images // a)
    left, right = np.divmod(x, np.uint64(b))  # [n] below a, [n] below b
    for step in range(_ROUNDS):
        key = key + GOLDEN
        if step % 2 == 0:
            left = _add_modulo(left, mix(key ^ right), a)
        else:
            right = _add_modulo(right, mix(key ^ left), b)
    return left * np.uint64(b) + right


def _add_modulo(x: np.ndarray, random: np.ndarray, modulus: int) -> np.ndarray:
    """(x + r) mod modulus, r = floor(modulus * (random >> 32) / 2^32); x < modulus < 2^32."""
    m = np.uint64(modulus)
    x = x + (((random >> np.uint64(32)) * m) >> np.uint64(32))
    return np.where(x >= m, x - m, x)


def rank_slice(count: int, parts: int, part: int) -> tuple[int, int]:
    """(start, stop) of one of `parts` contiguous shares of range(count).

    The first count % parts shares hold one more than the others.

    Raises:
        ValueError: part is not in [0, parts).
    """
    if not 0 <= part < parts:
        raise UserError(f"part {part} of {parts} does not exist: parts are numbered from 0")
    share, extra = divmod(count, parts)
    start = part * share + min(part, extra)
    return start, start + share + (part < extra)


def step_positions(
    samples_seen: int, global_batch: int, accumulation: int, micro: int, world: int, rank: int
) -> tuple[int, int]:
    """[start, stop) of the stream that one rank reads in one micro-step.

    The optimiser step reads [samples_seen, samples_seen + global_batch); micro-batch `micro` is
    its share of `accumulation` contiguous ones; the rank's rows are its share of `world`
    contiguous ones of that. So ranks in order, inside micro-batches in order, read the same
    stream at every world size.
    """
    first, last = rank_slice(global_batch, accumulation, micro)
    start, stop = rank_slice(last - first, world, rank)
    return samples_seen + first + start, samples_seen + first + stop


@dataclass(frozen=True)
class Order:
    """Which images a rank trains on in a micro-step, of one set or of several side by side.

    Of the first s samples of a run, set k has had count(s)[k]: its share, to within a sample. So
    what a set reads in an optimiser step is a stretch of its own endless stream, a function of the
    samples seen alone; batches of any size, and a batch size that changes, read each stream whole.
    """

    sizes: tuple[int, ...]  # images of each set; the ids of set k follow those of set k - 1
    seed: int
    shares: tuple[int, ...] = (1,)  # of a batch, relative to one another
    blocks: ShuffleBlocks | None = None

    def count(self, samples: int) -> list[int]:
        """How many of the first `samples` of the run each set has; their sum is `samples`."""
        counts, left, weight = [], samples, sum(self.shares)
        for share in self.shares:
            counts.append(left * share // weight)  # exact: integers
            left, weight = left - counts[-1], weight - share
        return counts

    def stretches(
        self,
        samples_seen: int,
        global_batch: int,
        accumulation: int,
        micro: int,
        world: int,
        rank: int,
    ) -> list[tuple[int, int]]:
        """[start, stop) of each set's stream that one rank reads in one micro-step."""
        seen, after = self.count(samples_seen), self.count(samples_seen + global_batch)
        return [
            step_positions(start, stop - start, accumulation, micro, world, rank)
            for start, stop in zip(seen, after, strict=True)
        ]

    def rows(
        self, samples_seen: int, global_batch: int, accumulation: int, micro: int, world: int
    ) -> list[list[int]]:
        """How many rows each rank has of each set in a micro-step: [world][sets]."""
        step = (samples_seen, global_batch, accumulation, micro, world)
        stretches = [self.stretches(*step, rank) for rank in range(world)]
        return [[stop - start for start, stop in one] for one in stretches]

    def draw(self, stretches: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Positions and ids, int64 [b] each, set by set. No two rows of a run share a position."""
        positions, images, first = [], [], 0
        for k, ((start, stop), size) in enumerate(zip(stretches, self.sizes, strict=True)):
            positions.append(np.arange(start, stop, dtype=np.int64) * len(self.sizes) + k)
            images.append(ids(size, self.seed + k, start, stop - start, self.blocks) + first)
            first += size
        return np.concatenate(positions), np.concatenate(images)
