"""The BatchSource that decodes with NVIDIA DALI: on the GPU (nvJPEG), or on the CPU without one.

Threads read the encoded images of the ids that order.py gives, and feed them to a DALI graph,
batches ahead of the caller. On a GPU the graph mirrors and normalises too. On the CPU it leaves
that to loader.normalise, as DALI's elementwise arithmetic takes longer than its decoding there
(launch/LOG.md); the pixels are those of loader.Loader bit for bit: both are libjpeg-turbo, and the
kinds on which the two differ (CMYK JPEG, 16-bit PNG, see image_file.is_plain) the CPU's decoder
decodes for the graph. nvJPEG rounds otherwise, so pixels of a GPU differ by a grey level or two.

fn.readers.mxnet is not used: it has only a shuffle buffer, cannot follow a given order, and is no
faster (launch/LOG.md).
"""

import importlib.util
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from data_tools.common.errors import UserError
from data_tools.images.decode import decode, decode_any_size
from data_tools.images.image_file import fault, is_plain
from data_tools.load import augment
from data_tools.load.loader import Batch, ThreadedSource
from data_tools.shards import Shards
from data_tools.union import Union

REQUIREMENT = "nvidia-dali-cuda130==2.4.0"
_ROWS_PER_TASK = 64  # images read by a thread between two looks at the queue
_DEPTH = 2  # batches in the graph at a time
_AREA_SAMPLES = 4  # of a pixel's side, for OpenCV's INTER_AREA
# Columns of the numbers fed for each image.
_CROP, _BOX, _LOW_RES, _SIDE, _KINDS, _PHOTOMETRIC, _TURN = 0, 1, 5, 6, 7, 9, 10
_AREA = -1  # among DALI's own numbers of interpolations


def check_installed() -> None:
    """Raises: ValueError saying how to install DALI, where it is missing."""
    # find_spec of a submodule imports its package, which fails where nothing of nvidia's is there.
    if not (importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")):
        raise UserError(
            f"loader=dali needs DALI, which is not installed: pip install {REQUIREMENT} (Linux), "
            "or choose loader=cpu"
        )


class Dali(ThreadedSource):
    """A BatchSource on `device`; see Loader for its promises. Further arguments: those of Stream.

    normalised: mirror and normalise in the graph, images being float32; None: on a GPU only.

    Raises:
        ValueError: as Stream; DALI is not installed; the images are not `size` x `size`.
    """

    def __init__(
        self,
        shards: Shards | Union,
        *,
        device: torch.device | str = "cpu",
        workers: int = 2,  # threads that read, and as many that decode
        prefetch: int = 4,  # batches read ahead of the graph
        normalised: bool | None = None,
        **stream: Any,
    ) -> None:
        check_installed()
        super().__init__(shards, workers, prefetch, stream)
        size = self._stream.size
        if shards.image_size not in (None, (size, size)):
            raise UserError(
                f"{shards.path} holds {shards.image_size} images and {size}x{size} are asked for: "
                "pack them at that size, or choose loader=cpu with resize=true"
            )
        self.device = torch.device(device)
        if normalised is None:
            normalised = self.device.type == "cuda"
        self._pipe = _pipeline(
            most_rows=self._stream.most_rows(),
            threads=workers,
            device=self.device,
            size=size,
            augmented=any(self._stream.chances),
            normalised=normalised,
        )
        self._normalised = normalised
        self._reading: deque[tuple[Batch, augment.Draws | None, list[Future]]] = deque()
        self._decoding: deque[tuple[Batch, list[np.ndarray]]] = deque()

    def _next(self) -> Batch:
        started = time.perf_counter()
        if not self._decoding:  # the first run of a graph takes all that it can hold
            for _ in range(_DEPTH):
                self._feed()
            self._pipe.schedule_run()
        batch, encoded = self._decoding[0]
        images = self._images(batch, encoded)
        self._decoding.popleft()
        self._feed()
        self._pipe.schedule_run()
        self.wait_seconds += time.perf_counter() - started
        return batch._replace(images=images)

    def close(self) -> None:
        """End the threads; batches in the graph are dropped with it."""
        super().close()
        self._reading.clear()
        self._decoding.clear()
        self._pipe = None

    def _feed(self) -> None:
        """Hands the next batch to the graph, once it is read, and keeps the threads reading."""
        while len(self._reading) <= self._prefetch:
            batch, draws = self._stream.next()
            tasks = [
                self._pool.submit(_read, self._shards, batch.ids[i : i + _ROWS_PER_TASK])
                for i in range(0, len(batch.ids), _ROWS_PER_TASK)
            ]
            self._reading.append((batch, draws, tasks))
        batch, draws, tasks = self._reading.popleft()
        encoded = [image for task in tasks for image in task.result()]
        self._pipe.feed_input("encoded", encoded)
        if draws is not None:
            self._pipe.feed_input("numbers", _numbers(draws))
            self._pipe.feed_input("factor", draws.factor)
        if self._normalised:
            self._pipe.feed_input("flip", batch.flip.numpy().astype(np.int32))
        self._decoding.append((batch, encoded))  # the graph reads this memory until it is done

    def _images(self, batch: Batch, encoded: list[np.ndarray]) -> torch.Tensor:
        """[b, 3, size, size] of the oldest batch in the graph."""
        try:
            # On the stream that will use them: nothing waits, and freed memory is not reused early.
            gpu = self.device.type == "cuda"
            stream = torch.cuda.current_stream(self.device) if gpu else None
            images, *decoded = self._pipe.share_outputs(cuda_stream=stream)
            shapes = {tuple(shape) for shape in images.shape()}
            if decoded:  # what a low resolution would have made look right
                shapes |= {(h, w, 3) for h, w, _ in decoded[0].as_array().tolist()}  # or grey
        except RuntimeError as error:
            raise self._named(batch, encoded) or error from error
        size = self._stream.size
        if shapes != {(size, size, 3)}:
            raise self._named(batch, encoded) or ValueError(
                f"{self._shards.path}: DALI gives images of {shapes}, not {size}x{size}"
            )
        pixels = torch.from_dlpack(images.as_tensor())  # no copy: the tensor owns the memory now
        self._pipe.release_outputs()
        return pixels.permute(0, 3, 1, 2)

    def _named(self, batch: Batch, encoded: list[np.ndarray]) -> Exception | None:
        """What the CPU's decoder says of the first image of the batch that cannot be used."""
        size = self._stream.size
        other_size = None
        for image, content in zip(batch.ids.tolist(), encoded, strict=True):
            where = f"{self._shards.where(image)}, image {image}"
            try:
                decode(content.tobytes(), size, where, self._stream.resize)
            except ValueError as error:
                return error
            height, width = decode_any_size(content.tobytes()).shape[:2]
            if other_size is None and (height, width) != (size, size):
                other_size = ValueError(
                    f"{where}: {width}x{height} pixels, where the others have {size}x{size}: pack "
                    f"the set again, or choose loader=cpu with resize=true"
                )
        return other_size


def _read(shards: Shards | Union, ids: np.ndarray) -> list[np.ndarray]:
    """The encoded images, uint8 [bytes] each. Raises: ValueError naming one that is damaged."""
    encoded = []
    for image in ids.tolist():
        _, content = shards[image]
        if what := fault(content):  # DALI would paint over the end of one that is cut off
            raise UserError(f"{shards.where(image)}, image {image}: {what}")
        if not is_plain(content):
            content = _as_decoded(content, f"{shards.where(image)}, image {image}")
        encoded.append(np.frombuffer(content, np.uint8))
    return encoded


def _as_decoded(content: bytes, where: str) -> bytes:
    """The pixels of the CPU's decoder as a PPM, of a kind on which decoders differ by a grey level
    or more: CMYK and RGB JPEG, 16-bit PNG, palettes, transparency."""
    pixels = decode_any_size(content, where)
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def _numbers(draws: augment.Draws) -> np.ndarray:
    """int32 [b, 13]: everything but the factors, in the columns named above."""
    from nvidia.dali import types

    kinds = [  # in the order of augment.INTERPOLATIONS; the graph does the area itself
        types.INTERP_NN,
        types.INTERP_LINEAR,
        _AREA,
        types.INTERP_CUBIC,
        types.INTERP_LANCZOS3,
    ]
    columns = [
        draws.crop[:, None],
        draws.box,
        draws.low_res[:, None],
        draws.side[:, None],
        np.array([int(kind) for kind in kinds])[draws.interpolation],
        draws.photometric[:, None],
        draws.turn,
    ]
    return np.concatenate(columns, 1).astype(np.int32)


def _pipeline(
    most_rows: int,
    threads: int,
    device: torch.device,
    size: int,
    augmented: bool,
    normalised: bool,
) -> Any:
    """The graph: encoded images [bytes] -> [size, size, 3], uint8 or float32."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    step = _augmentation(size)

    @pipeline_def(
        batch_size=most_rows,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=_DEPTH,
        exec_dynamic=True,  # outputs may be kept without a copy
        enable_conditionals=True,
        seed=0,  # nothing is drawn in the graph
    )
    def graph():  # type: ignore[no-untyped-def]
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        images = fn.decoders.image(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        outputs: tuple[Any, ...] = ()
        if augmented:
            numbers = fn.external_source(name="numbers", dtype=types.INT32, ndim=1)
            factor = fn.external_source(name="factor", dtype=types.FLOAT, ndim=1)
            images = step(images, numbers, factor)
            outputs = (fn.peek_image_shape(encoded),)  # [3]: height, width, channels
        if normalised:
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            images = fn.flip(images, horizontal=flip)
            half = types.Constant(0.5, types.FLOAT)
            images = (images / types.Constant(255, types.FLOAT) - half) / half
        return images, *outputs

    pipe = graph()
    pipe.build()
    return pipe


def _augmentation(size: int) -> Callable:
    """augment.apply as a part of the graph: crop and photometric to the bit, resizing nearly."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    def resized(images, side, kind, to_side):  # type: ignore[no-untyped-def]
        """From side x side to to_side x to_side pixels, int32 scalars, as OpenCV does it."""
        if kind == _AREA:
            # The mean over a grid of points in each pixel: OpenCV's is the integral over it.
            samples = (_AREA_SAMPLES * size + to_side - 1) / to_side
            many = fn.cast(samples, dtype=types.INT32)
            wide = fn.cast(fn.stack(to_side * many, to_side * many), dtype=types.FLOAT)
            points = fn.resize(images, size=wide, interp_type=types.INTERP_NN, antialias=False)
            points = fn.reshape(points, shape=fn.stack(to_side, many, to_side, many, 3), layout="")
            mean = fn.reductions.mean(points, axes=[1, 3])
            out = fn.reshape(fn.cast(mean, dtype=types.UINT8), layout="HWC")
        else:
            # OpenCV's nearest pixel is that of a pixel's corner, DALI's that of its centre.
            scale = fn.cast(side, dtype=types.FLOAT) / fn.cast(to_side, dtype=types.FLOAT)
            nearest = fn.cast(kind == int(types.INTERP_NN), dtype=types.FLOAT)
            start = nearest * (0.001 - 0.5 * scale)
            end = start + fn.cast(side, dtype=types.FLOAT)
            out = fn.resize(
                images,
                size=fn.cast(fn.stack(to_side, to_side), dtype=types.FLOAT),
                roi_start=fn.stack(start, start),
                roi_end=fn.stack(end, end),
                interp_type=fn.reinterpret(kind, dtype=types.INTERP_TYPE),
                antialias=False,
            )
        return out

    def jittered(images, kind, factor):  # type: ignore[no-untyped-def]
        weights = types.Constant(augment.GREY)
        weighted = fn.cast(images, dtype=types.INT32) * weights
        grey = fn.reductions.sum(weighted, axes=[2], keep_dims=True, dtype=types.INT32)
        grey = fn.cast((grey + 2**15) // 2**16, dtype=types.FLOAT)  # [h, w, 1]
        mean = fn.reductions.mean(grey, axes=[0, 1, 2], keep_dims=True)
        mean = dali_math.floor(mean + 0.5)
        contrast = fn.cast(kind == augment.CONTRAST, dtype=types.FLOAT)
        saturation = fn.cast(kind == augment.SATURATION, dtype=types.FLOAT)
        ground = contrast * mean + saturation * grey
        wide = ground + factor * (fn.cast(images, dtype=types.FLOAT) - ground)
        return fn.cast(dali_math.floor(dali_math.clamp(wide, 0.0, 255.0)), dtype=types.UINT8)

    def step(images, numbers, factor):  # type: ignore[no-untyped-def]
        if numbers[_CROP] > 0:
            place, extent = numbers[_BOX : _BOX + 2], numbers[_BOX + 2 : _BOX + 4]
            kept = fn.slice(images, start=place, shape=extent, axes=[0, 1])
            images = fn.slice(
                kept,
                start=-place,
                shape=[size, size],
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        if numbers[_LOW_RES] > 0:
            full = numbers[_SIDE] * 0 + size
            small = resized(images, full, numbers[_KINDS], numbers[_SIDE])
            images = resized(small, numbers[_SIDE], numbers[_KINDS + 1], full)
        if numbers[_PHOTOMETRIC] > 0:
            images = jittered(images, numbers[_TURN], factor[0])
            images = jittered(images, numbers[_TURN + 1], factor[1])
            images = jittered(images, numbers[_TURN + 2], factor[2])
        return images

    return step
