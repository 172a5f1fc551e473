"""Embeddings of a whole set, computed in cached blocks by several processes; resumable.

A block is BLOCK images, stored in one file. Process r of W computes those of the blocks r, r + W,
.. that do not exist yet, so a killed run resumes where it stopped, on any number of processes. The
embeddings do not depend on this number, because batches never cross a block. The directory of a set
is named by a hash of the model's weights, the images' content and the input contract, so a second
protocol on the same images reuses its blocks. A block ends with a hash of its content, which is
checked before use. The processes share only these files and need no process group. If another
process finishes no block for a long time, because it died or never started, the first process
computes the rest itself. Embeddings are personal data: only their owner may read the directory.

Letters: V views (the image and its mirror image); the others are in eval/__init__.py.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import arrays, files
from data_tools.common.errors import UserError
from eval.embedders.images import ImageSet

if TYPE_CHECKING:
    from eval.embedders.embedder import Embedder

BLOCK = 1024  # images
FORMAT = 2
IN_MEMORY = 4 << 30  # bytes: a larger matrix of embeddings is stored in a file
AHEAD = 2  # batches decoded ahead of the network for each thread
_POLL = 0.2  # seconds between two checks for the blocks of other processes
# Seconds without any new block after which this process computes the blocks of the others; at
# least _BLOCK_TIMES the longest time that it needed for a block. Too short a wait repeats work but
# never changes a result.
PATIENCE = 120.0
_BLOCK_TIMES = 4

Advance = Callable[[int], object]  # called with the number of images done since the last call


class ImagePlace(NamedTuple):
    """The rank of this process and the number of processes, from torchrun's environment."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "ImagePlace":
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


class EmbeddingStore:
    """The embeddings of a set, as blocks in memory or in files."""

    def __init__(self, blocks: list[Any], num: int, flip: bool) -> None:
        self._blocks, self._num, self.flip = blocks, num, flip

    def __len__(self) -> int:
        return self._num

    def alone(self) -> "EmbeddingStore":
        """The same embeddings without those of the mirror images."""
        return EmbeddingStore(self._blocks, self._num, False)

    def block(self, number: int) -> NDArray[np.float32]:
        """[n, V, D] float32: the embeddings of the images from number * BLOCK on."""
        block = self._blocks[number]
        array = block if isinstance(block, np.ndarray) else arrays.load_hashed(block)
        return array if self.flip else array[:, :1]

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        return (self.block(number) for number in range(len(self._blocks)))

    def matrix(self, dtype: Any = np.float32) -> NDArray:
        """[N, D]: e(image) + e(mirror image), or e(image) without the flip, in `dtype`.

        A matrix of more than IN_MEMORY bytes is mapped from an unnamed temporary file in $TMPDIR.
        """
        whole: NDArray | None = None
        for number, block in enumerate(self.blocks()):
            if whole is None:
                whole = _empty((self._num, block.shape[2]), dtype)
            views = block.astype(dtype, copy=False)
            whole[number * BLOCK : number * BLOCK + len(block)] = (
                views[:, 0] + views[:, 1] if self.flip else views[:, 0]
            )
        assert whole is not None
        return whole

    def norms(self) -> NDArray[np.float64]:
        """[N, V]: the norms of the embeddings as the network returns them."""
        return np.concatenate(
            [np.linalg.norm(block.astype(np.float64), axis=2) for block in self.blocks()]
        )


def extract(
    embedder: "Embedder",
    images: ImageSet,
    flip: bool = True,
    cache: Path | None = None,
    batch_size: int = 64,
    threads: int = 0,
    place: ImagePlace | None = None,
    advance: Advance = lambda n: None,
) -> EmbeddingStore | None:
    """The embeddings of all images; None in every process but the first.

    cache: the directory for all sets. threads: decoding threads; 0 chooses a number for this
    machine.

    Raises:
        ValueError: an image is broken, an embedding is not finite, or several processes run
            without a cache.
        OSError: an image or the cache cannot be read or written.
    """
    place = place or ImagePlace.of_environment()
    num_blocks = -(-len(images) // BLOCK)
    if not num_blocks:
        raise UserError(f"{images.name}: no images")
    if cache is None:
        if place.world > 1:
            raise UserError("several processes share embeddings by files: give --cache DIR")
        blocks: list[Any] = [
            block
            for _, block in _compute(
                embedder, images, flip, range(num_blocks), batch_size, threads, advance
            )
        ]
        return EmbeddingStore(blocks, len(images), flip)
    directory = _directory(cache, embedder, images, flip, place.rank == 0)
    paths = [directory / f"block-{number:07d}.npy" for number in range(num_blocks)]
    length = functools.partial(_length, len(images))
    views = 2 if flip or directory.name.endswith("-flip") else 1
    missing = [i for i, path in enumerate(paths) if not _whole(path, length(i), views)]
    advance(sum(map(length, range(num_blocks))) - sum(map(length, missing)))
    longest = 0.0  # seconds that a block took

    def make(numbers: list[int]) -> None:
        nonlocal longest
        began = time.monotonic()
        made = _compute(embedder, images, views == 2, numbers, batch_size, threads, advance)
        for number, block in made:
            arrays.write_hashed(paths[number], block)
            now = time.monotonic()
            longest, began = max(longest, now - began), now

    make([i for i in missing if i % place.world == place.rank])
    if place.rank:
        return None
    waiting = [i for i in missing if i % place.world]
    patience = max(PATIENCE, _BLOCK_TIMES * longest)
    while waiting:
        absent = _wait(paths, waiting, patience)
        advance(sum(map(length, waiting)) - sum(map(length, absent)))
        waiting = absent
        if waiting and patience:
            late = ", ".join(map(str, sorted({i % place.world for i in waiting})))
            print(
                f"warning: {images.name}: no new block from process {late} of {place.world} for "
                f"{patience:.0f} s; the first process computes the remaining {len(waiting)}",
                file=sys.stderr,
            )
            patience = 0.0
        if waiting:
            make([waiting.pop()])  # from the end: a process that is only slow reaches it last
    return EmbeddingStore(list(paths), len(images), flip)


def _wait(paths: list[Path], waiting: list[int], patience: float) -> list[int]:
    """Wait until all blocks exist or none has appeared for `patience` seconds; the missing ones."""
    changed = time.monotonic()
    while True:
        absent = [i for i in waiting if not files.is_file(paths[i])]
        if len(absent) < len(waiting):
            changed = time.monotonic()
        if not absent or time.monotonic() - changed > patience:
            return absent
        waiting = absent
        time.sleep(_POLL)


def batches(
    images: ImageSet, ranges: list[range], prepare: Callable[[NDArray[np.uint8]], Any], threads: int
) -> Iterator[tuple[range, Any]]:
    """Yield (numbers, prepare(uint8 RGB [n, 112, 112, 3])) per range; threads decode ahead."""

    def read(numbers: range) -> Any:
        return prepare(np.stack([images[i] for i in numbers]))

    threads = threads or min(16, max(1, (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Any] = deque()
        todo = iter(ranges)
        try:
            for numbers in todo:
                coming.append((numbers, pool.submit(read, numbers)))
                if len(coming) > AHEAD * threads:
                    done, future = coming.popleft()
                    yield done, future.result()
            while coming:
                done, future = coming.popleft()
                yield done, future.result()
        finally:
            for _, future in coming:
                future.cancel()


def _compute(
    embedder: "Embedder",
    images: ImageSet,
    flip: bool,
    numbers: Any,
    batch_size: int,
    threads: int,
    advance: Advance,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (number, [n, V, D]) of each block."""

    def prepare(pixels: NDArray[np.uint8]) -> list[Any]:
        mirrored = [np.ascontiguousarray(pixels[:, :, ::-1])] if flip else []
        return [embedder.prepare(x) for x in (pixels, *mirrored)]

    ranges = []
    for number in numbers:
        start, stop = number * BLOCK, number * BLOCK + _length(len(images), number)
        ranges += [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
    parts: list[NDArray[np.float32]] = []
    for some, prepared in batches(images, ranges, prepare, threads):
        views = np.stack([embedder.forward(x) for x in prepared], axis=1)  # [n, V, D]
        if not np.isfinite(views).all():
            bad = some[int(np.flatnonzero(~np.isfinite(views).all(axis=(1, 2)))[0])]
            raise UserError(f"{images.name}: the embedding of image {bad} is not finite")
        parts.append(views)
        advance(len(some))
        number = some[0] // BLOCK
        if some[-1] + 1 == number * BLOCK + _length(len(images), number):
            yield number, np.concatenate(parts)
            parts = []


def _empty(shape: tuple[int, int], dtype: Any) -> NDArray:
    if shape[0] * shape[1] * np.dtype(dtype).itemsize <= IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the open file
        return np.memmap(file, dtype, mode="w+", shape=shape)


def _length(num: int, number: int) -> int:
    return min(BLOCK, num - number * BLOCK)


def _directory(
    cache: Path, embedder: "Embedder", images: ImageSet, flip: bool, is_first: bool
) -> Path:
    """The directory of this set's blocks; blocks with mirror images also serve without them."""
    facts = {
        "format": FORMAT,
        "block": BLOCK,
        "model": embedder.digest,
        "images": images.digest(),
        "num": len(images),
        "input": list(embedder.contract),
        "alignment": images.alignment,
    }
    text = json.dumps(facts, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:40]
    both = cache / f"{name}-flip"
    last = both / f"block-{-(-len(images) // BLOCK) - 1:07d}.npy"
    directory = both if flip or files.is_file(last) else cache / f"{name}-plain"
    files.make_private(cache)
    files.make_private(directory)
    if is_first and not files.is_file(directory / "facts.json"):
        text = json.dumps({**facts, "name": images.name}, indent=1) + "\n"
        files.write_text(directory / "facts.json", text, files.PRIVATE_FILE)
    return directory


def _whole(path: Path, length: int, views: int) -> bool:
    """Whether the block is complete; a damaged one is removed with a warning."""
    if not files.exists(path):
        return False
    try:
        array = arrays.load_hashed(path)
    except (OSError, UserError) as error:
        print(f"warning: {path} is damaged and will be recomputed: {error}", file=sys.stderr)
        path.unlink(missing_ok=True)
        return False
    return array.shape[:2] == (length, views) and array.ndim == 3 and array.dtype == np.float32
