"""Batches of images for training: the contract of every source, and the one that uses the CPU.

Letters: b images of this rank in one micro-step.

Decoding runs in threads of this process: OpenCV frees the interpreter lock while it decodes,
images land in the batch's own memory and nothing is pickled. Which images make up which batch is
order.py's pure function, so the number of threads changes nothing but the speed.
"""

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from data_tools.common.errors import UserError
from data_tools.images.decode import decode
from data_tools.load import augment
from data_tools.load.order import Order, ShuffleBlocks
from data_tools.load.read_ahead import ReadAhead
from data_tools.shards import Shards, check_labels
from data_tools.union import Union

_ROWS_PER_TASK = 16  # images that a thread decodes between two looks at the queue: 1 to 2 ms


class Batch(NamedTuple):
    """What one rank trains on in one micro-step; the tensors are pinned if asked for."""

    # [b, 3, 112, 112] RGB, channels last in memory (strides of NHWC). uint8, or float32 that is
    # mirrored and normalised already (on a GPU, by dali.py): normalise() takes both.
    images: Tensor
    labels: Tensor  # int64 [b], each in [0, num_classes)
    flip: Tensor  # bool [b]: mirror these, see augment.flip_mask; normalise() does
    ids: np.ndarray  # int64 [b]: which images of the data set
    positions: np.ndarray  # int64 [b]: where they stand in the endless stream of order.py


class BatchSource(Protocol):
    """An endless iterator of Batch: the same batches from every implementation, on every run.

    Batch k (from 0) of a source made with samples_seen = s is micro-step k % accumulation of
    optimiser step k // accumulation after s: the images order.Order gives, in that order.
    """

    wait_seconds: float  # total time that next() waited for images

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def close(self) -> None: ...


class Stream:
    """What each micro-step of a rank trains on, without its pixels: the part all sources share.

    Raises:
        ValueError: a label outside [0, num_classes), a batch with no image for some rank, or sizes
            that make no sense.
    """

    def __init__(
        self,
        shards: Shards | Union,
        *,
        seed: int,
        global_batch: int,  # images of one optimiser step, over all ranks and micro-steps
        world: int = 1,
        rank: int = 0,
        accumulation: int = 1,  # micro-steps in an optimiser step
        samples_seen: int = 0,  # images trained on before, over all ranks
        size: int = 112,  # pixels, height and width
        resize: bool = False,  # square images of another size are faces that are aligned
        blocks: ShuffleBlocks | None = None,  # None: every image is shuffled on its own
        chances: augment.Probabilities = augment.Probabilities(),  # noqa: B008 (immutable)
        shares: Sequence[int] = (),  # of the batch, for each set of a Union; none: one stream
    ) -> None:
        if accumulation < 1 or samples_seen < 0:
            raise UserError(
                f"accumulation = {accumulation} must be at least 1 and samples_seen = "
                f"{samples_seen} at least 0"
            )
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} does not exist among {world}: ranks are numbered from 0")
        if global_batch < world * accumulation:
            raise UserError(
                f"a global batch of {global_batch} leaves a rank without an image: {world} ranks "
                f"times {accumulation} micro-steps need at least {world * accumulation}"
            )
        if not all(0 <= chance <= 1 for chance in chances):
            raise UserError(f"{chances}: each must be a probability, 0 to 1")
        check_labels(shards)
        self.shards = shards
        self.size = size
        self.resize = resize
        self.chances = chances
        self._order = make_order(shards, seed, shares, blocks)
        first = self._order.rows(samples_seen, global_batch, accumulation, 0, world)
        if min(map(sum, first)) < 1:
            raise UserError(f"a global batch of {global_batch} leaves a rank without an image")
        self._read_ahead = ReadAhead(shards, self._order)
        self._global_batch = global_batch
        self._share = (accumulation, world, rank)
        self._samples_seen = samples_seen  # at the start of the next optimiser step
        self._micro = 0

    def most_rows(self) -> int:
        """No micro-step has more: a set may add a row by the division and one by its share."""
        accumulation, world, _ = self._share
        return self._global_batch // (accumulation * world) + 2 * len(self._order.sizes)

    def next(self) -> tuple[Batch, augment.Draws | None]:
        """The next micro-step, its images still empty (uint8 [0]), and how to augment them."""
        accumulation, world, rank = self._share
        stretches = self._order.stretches(
            self._samples_seen, self._global_batch, accumulation, self._micro, world, rank
        )
        self._micro = (self._micro + 1) % accumulation
        if self._micro == 0:
            self._samples_seen += self._global_batch
        self._read_ahead.ask(stretches)
        positions, ids = self._order.draw(stretches)  # [b]
        seed = self._order.seed
        labels = torch.from_numpy(self.shards.labels[ids])
        flip = torch.from_numpy(augment.flip_mask(seed, positions))
        draws = None
        if any(self.chances):
            draws = augment.draw(seed, positions, self.chances, self.size)
        return Batch(torch.empty(0, dtype=torch.uint8), labels, flip, ids, positions), draws


class ThreadedSource:
    """What both sources share: the stream, the threads that read it, and how they end.

    The threads end with close(), with the `with` block, with the last reference to the source, or
    with the process. An error in next() closes the source.
    """

    def __init__(
        self, shards: Shards | Union, workers: int, prefetch: int, stream: dict[str, Any]
    ) -> None:
        if workers < 1 or prefetch < 1:
            raise UserError(f"workers = {workers}, prefetch = {prefetch} must be at least 1")
        self._stream = Stream(shards, **stream)
        self.wait_seconds = 0.0
        self._shards = shards
        self._prefetch = prefetch
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        # No task refers to the source, so dropping it ends the threads while batches are pending.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def _next(self) -> Batch:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this loader is closed (an earlier error closes it too)")
        try:
            return self._next()
        except BaseException:  # KeyboardInterrupt too: no thread goes on behind a failed step
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads: each finishes the few images in its hands, the queue is dropped."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)


class Loader(ThreadedSource):
    """The BatchSource that reads shards and decodes on the CPU.

    At most prefetch + 1 batches are in memory besides those the caller holds. next() raises the
    exception of a thread (an image that does not decode) with its own traceback. Further arguments
    are those of Stream.

    Raises:
        ValueError: as Stream, or pinned memory asked for without a GPU.
    """

    def __init__(
        self,
        shards: Shards | Union,
        *,
        workers: int = 2,  # decoding threads
        prefetch: int = 4,  # batches made ahead of the caller
        pin_memory: bool = False,
        **stream: Any,
    ) -> None:
        if pin_memory and not torch.cuda.is_available():
            raise UserError("pin_memory needs a GPU and there is none: leave it off")
        super().__init__(shards, workers, prefetch, stream)
        cv2.setNumThreads(0)  # the threads here are the parallelism; OpenCV's own would fight them
        self._pin_memory = pin_memory
        self._free: list[np.ndarray] = []  # memory of batches that nobody holds any more
        self._pending: deque[tuple[Batch, list[Future[None]]]] = deque()

    def _next(self) -> Batch:
        while len(self._pending) <= self._prefetch:
            self._submit()
        batch, tasks = self._pending.popleft()
        started = time.perf_counter()
        for task in tasks:
            task.result()
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        super().close()
        self._pending.clear()

    def _submit(self) -> None:
        """Queues the next batch: lays out its memory and hands its rows to the threads."""
        batch, draws = self._stream.next()
        count, size = len(batch.ids), self._stream.size
        labels, flip = batch.labels, batch.flip
        if self._pin_memory:
            pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=True)
            labels, flip = labels.pin_memory(), flip.pin_memory()
        else:
            pixels = self._recycled(count, size)
        rows = pixels.numpy()  # the same memory
        tasks = [
            self._pool.submit(
                _decode_rows, self._shards, batch.ids, draws, rows, first, self._stream.resize
            )
            for first in range(0, count, _ROWS_PER_TASK)
        ]
        images = pixels.permute(0, 3, 1, 2)
        self._pending.append((batch._replace(images=images, labels=labels, flip=flip), tasks))

    def _recycled(self, count: int, size: int) -> Tensor:
        """uint8 [count, size, size, 3], in the memory of a batch that is gone if there is one.

        New memory costs a page fault every 4 KiB, 7 % of the decoding.
        """
        needed = count * size * size * 3
        memory = None
        with contextlib.suppress(IndexError):
            memory = self._free.pop()
        if memory is None or memory.size < needed:
            memory = np.empty(self._stream.most_rows() * size * size * 3, np.uint8)
        view = memory[:needed]
        # The tensor holds the view; when the last tensor on it goes, the memory is free again.
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view).view(count, size, size, 3)


def normalise(images: Tensor, flip: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """((x / 255) - 0.5) / 0.5 of uint8 images [b, 3, h, w], those of flip [b] mirrored.

    Computed in fp32 (fp64 if that is asked for) where the images are, and rounded to `dtype`
    once; the memory layout (channels last or not) is kept. Of images in floating point all this is
    done, see Batch: they are rounded to `dtype` alone.
    """
    if images.is_floating_point():
        return images.to(dtype)
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    wide = images.to(torch.promote_types(dtype, torch.float32))
    return wide.div_(255).sub_(0.5).div_(0.5).to(dtype)


def _decode_rows(
    shards: Shards | Union,
    ids: np.ndarray,
    draws: augment.Draws | None,
    rows: np.ndarray,
    first: int,
    resize: bool,
) -> None:
    """Decodes images `ids` [b] into rows [b, size, size, 3], a task's worth of them."""
    size = rows.shape[1]
    for row in range(first, min(first + _ROWS_PER_TASK, len(ids))):
        image = int(ids[row])
        _, encoded = shards[image]
        try:
            pixels = decode(encoded, size, resize=resize)
        except ValueError:  # once more, to say which: a name for each image costs 1 %
            decode(encoded, size, f"{shards.where(image)}, image {image}", resize)
            raise
        rows[row] = pixels if draws is None else augment.apply(pixels, draws, row)


def make_order(
    data: Shards | Union, seed: int, shares: Sequence[int] = (), blocks: ShuffleBlocks | None = None
) -> Order:
    """The order of a set; of a Union as one stream, or by the share of each set in a batch.

    Raises:
        ValueError: the shares are not a positive number for each set.
    """
    if not shares:
        return Order((data.num_images,), seed, blocks=blocks)
    sizes = data.sizes if isinstance(data, Union) else (data.num_images,)
    if len(shares) != len(sizes) or min(shares) < 1:
        raise UserError(
            f"shares of the batch {list(shares)} for {len(sizes)} data sets: a positive whole "
            "number for each"
        )
    return Order(sizes, seed, tuple(shares), blocks)
