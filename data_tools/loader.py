"""Batches of decoded images for training, and the contract that every source of them fills.

Letters: b images of this rank in one micro-step.

Decoding runs in threads of this process: OpenCV frees the interpreter lock while it decodes,
images land in the batch's own memory and nothing is pickled. Which images make up which batch is
order.py's pure function, so the number of threads changes nothing but the speed.
"""

import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from data_tools import order
from data_tools.augment import flip_mask
from data_tools.decode import decode
from data_tools.shards import Shards

_ROWS_PER_TASK = 16  # images that a thread decodes between two looks at the queue: 1 to 2 ms


class Batch(NamedTuple):
    """What one rank trains on in one micro-step; the tensors are pinned if asked for."""

    images: Tensor  # uint8 [b, 3, 112, 112] RGB, channels last in memory (strides of NHWC)
    labels: Tensor  # int64 [b], each in [0, num_classes)
    flip: Tensor  # bool [b]: mirror these, see augment.flip_mask; normalise() does it
    ids: np.ndarray  # int64 [b]: which images of the data set
    positions: np.ndarray  # int64 [b]: where they stand in the endless stream of order.py


class BatchSource(Protocol):
    """An endless iterator of Batch: the same batches from every implementation, on every run.

    Batch k (from 0) of a source made with samples_seen = s is micro-step k % accumulation of
    optimiser step k // accumulation after s: the images order.step_ids gives, in that order.
    """

    wait_seconds: float  # total time that next() waited for images

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def close(self) -> None: ...


class Loader:
    """The BatchSource that reads shards and decodes on the CPU.

    At most prefetch + 1 batches are in memory besides those the caller holds. An exception in a
    thread (an image that does not decode) is raised by next() with its own traceback and closes
    the loader. The threads end with close(), with the `with` block, with the last reference to
    the loader, or with the process.

    Raises:
        ValueError: a label outside [0, num_classes), a batch with no image for some rank, sizes
            that make no sense, or pinned memory asked for without a GPU.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        seed: int,
        global_batch: int,  # images of one optimiser step, over all ranks and micro-steps
        world: int = 1,
        rank: int = 0,
        accumulation: int = 1,  # micro-steps in an optimiser step
        samples_seen: int = 0,  # images trained on before, over all ranks
        workers: int = 2,  # decoding threads
        prefetch: int = 4,  # batches made ahead of the caller
        size: int = 112,  # pixels, height and width
        pin_memory: bool = False,
    ) -> None:
        if workers < 1 or prefetch < 1 or accumulation < 1 or samples_seen < 0:
            raise ValueError(
                f"workers = {workers}, prefetch = {prefetch}, accumulation = {accumulation} must "
                f"be at least 1 and samples_seen = {samples_seen} at least 0"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not exist among {world}: ranks are numbered from 0")
        if global_batch < world * accumulation:
            raise ValueError(
                f"a global batch of {global_batch} leaves a rank without an image: {world} ranks "
                f"times {accumulation} micro-steps need at least {world * accumulation}"
            )
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory needs a GPU and there is none: leave it off")
        check_labels(shards)
        cv2.setNumThreads(0)  # the threads here are the parallelism; OpenCV's own would fight them
        self.wait_seconds = 0.0
        self._shards = shards
        self._seed = seed
        self._share = (global_batch, accumulation, world, rank)
        self._samples_seen = samples_seen  # at the start of the next optimiser step to submit
        self._micro = 0
        self._prefetch = prefetch
        self._size = size
        self._pin_memory = pin_memory
        self._pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        # No task refers to the loader, so dropping it ends the threads while batches are pending.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this loader is closed (an earlier error closes it too)")
        while len(self._pending) <= self._prefetch:
            self._submit()
        batch, tasks = self._pending.popleft()
        started = time.perf_counter()
        try:
            for task in tasks:
                task.result()
        except BaseException:  # a KeyboardInterrupt as well: no thread goes on behind a failed step
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - started
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads: each finishes the few images in its hands, the queue is dropped."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _submit(self) -> None:
        """Queues the next batch: lays out its memory and hands its rows to the threads."""
        global_batch, accumulation, world, rank = self._share
        start, stop = order.step_positions(
            self._samples_seen, global_batch, accumulation, self._micro, world, rank
        )
        self._micro = (self._micro + 1) % accumulation
        if self._micro == 0:
            self._samples_seen += global_batch

        positions = np.arange(start, stop, dtype=np.int64)  # [b]
        ids = order.ids(self._shards.num_images, self._seed, start, stop - start)  # [b]
        pixels = torch.empty(
            (len(ids), self._size, self._size, 3), dtype=torch.uint8, pin_memory=self._pin_memory
        )
        labels = torch.from_numpy(self._shards.labels[ids])
        flip = torch.from_numpy(flip_mask(self._seed, positions))
        if self._pin_memory:
            labels, flip = labels.pin_memory(), flip.pin_memory()
        rows = pixels.numpy()  # the same memory
        tasks = [
            self._pool.submit(_decode_rows, self._shards, ids[i : i + _ROWS_PER_TASK], rows[i:])
            for i in range(0, len(ids), _ROWS_PER_TASK)
        ]
        batch = Batch(pixels.permute(0, 3, 1, 2), labels, flip, ids, positions)
        self._pending.append((batch, tasks))


def normalise(images: Tensor, flip: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """((x / 255) - 0.5) / 0.5 of uint8 images [b, 3, h, w], those of flip [b] mirrored.

    Computed in fp32 (fp64 if that is asked for) where the images are, and rounded to `dtype`
    once; the memory layout (channels last or not) is kept.
    """
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    wide = images.to(torch.promote_types(dtype, torch.float32))
    return wide.div_(255).sub_(0.5).div_(0.5).to(dtype)


def _decode_rows(shards: Shards, ids: np.ndarray, rows: np.ndarray) -> None:
    """Decodes images `ids` [k] into the first k of rows [>= k, size, size, 3]."""
    size = rows.shape[1]
    for row, image in zip(rows, ids.tolist(), strict=False):
        _, encoded = shards[image]
        row[:] = decode(encoded, size, f"{shards.where(image)}, image {image}")


def check_labels(shards: Shards) -> None:
    """Refuses labels that the classification layer has no row for, once for the whole data set."""
    wrong = np.flatnonzero((shards.labels < 0) | (shards.labels >= shards.num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(
            f"{shards.path}: {wrong.size} labels are outside [0, {shards.num_classes}); the first "
            f"is {shards.labels[first]}, of image {first}. Correct num_classes or pack again"
        )
