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
"""

import math

import numpy as np

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 [n] -> uint64 [n]: the finaliser of SplitMix64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed_hash(seed: int, purpose: int, x: np.ndarray) -> np.ndarray:
    """uint64 [n], uniform in each x [n] >= 0 and independent between seeds and purposes.

    `purpose` keeps apart draws that share a seed and a counter (the order and the flips, say).
    """
    key = mix(np.array([seed % 2**64], np.uint64))
    key = mix(key ^ np.uint64(purpose))
    return mix(key + (np.asarray(x).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def ids(num_images: int, seed: int, start: int, count: int) -> np.ndarray:
    """int64 [count]: the images at positions start .. start + count - 1 of the endless stream.

    Raises:
        ValueError: there are no images, or start or count is negative.
    """
    if num_images < 1:
        raise ValueError(f"num_images = {num_images}: a data set needs at least one image")
    if start < 0 or count < 0:
        raise ValueError(f"start = {start}, count = {count}: neither may be negative")
    epoch, x = np.divmod(np.arange(start, start + count, dtype=np.int64), num_images)  # [count]
    key = keyed_hash(seed, 0, epoch)
    x = _feistel(x.astype(np.uint64), num_images, key)
    outside = np.flatnonzero(x >= num_images)
    while outside.size:
        x[outside] = _feistel(x[outside], num_images, key[outside])
        outside = outside[x[outside] >= num_images]
    return x.astype(np.int64)


def _feistel(x: np.ndarray, num_images: int, key: np.ndarray) -> np.ndarray:
    """A bijection of range(a * b) for each key: uint64 x [n], key [n] -> uint64 [n]."""
    a = math.isqrt(num_images - 1) + 1
    b = -(-num_images // a)
    left, right = np.divmod(x, np.uint64(b))  # [n] below a, [n] below b
    for step in range(_ROUNDS):
        key = key + _GOLDEN
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
        raise ValueError(f"part {part} of {parts} does not exist: parts are numbered from 0")
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


def step_ids(
    num_images: int,
    seed: int,
    samples_seen: int,
    global_batch: int,
    accumulation: int,
    micro: int,
    world: int,
    rank: int,
) -> np.ndarray:
    """int64 [b]: the images that one rank trains on in one micro-step; see step_positions."""
    start, stop = step_positions(samples_seen, global_batch, accumulation, micro, world, rank)
    return ids(num_images, seed, start, stop - start)
