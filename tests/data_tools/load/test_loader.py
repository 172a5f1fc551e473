"""The loader: exact batches whatever the threads do, errors that arrive, threads that end."""

import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import CancelledError
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data_tools import shards
from data_tools.load import order
from data_tools.load.augment import flip_mask
from data_tools.load.loader import Batch, Loader, normalise
from data_tools.shard_writer import ShardWriter, write_shard

N = 37


def picture(image: int) -> np.ndarray:
    """[112, 112, 3] RGB, flat, so that JPEG keeps it to a grey level or two."""
    return np.full((112, 112, 3), (image * 6, 255 - image * 6, 40), np.uint8)


def jpeg(rgb: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


class Memory:
    """A data set in memory: image i has label i % 5, and reading takes image-dependent time."""

    path = "memory"

    def __init__(self, delay: float = 0.0):
        self.encoded = [jpeg(picture(image)) for image in range(N)]
        self.labels = np.arange(N, dtype=np.int64) % 5
        self.num_classes, self.num_images = 5, N
        self.delay = delay
        self.reads = 0

    def __len__(self) -> int:
        return N

    def where(self, image: int) -> str:
        return f"memory: byte {100 * image}"

    def __getitem__(self, image: int) -> tuple[int, bytes]:
        self.reads += 1
        time.sleep(self.delay * ((image * 7919) % 10))
        return int(self.labels[image]), self.encoded[image]


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def decoding_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


def wait_for_no_threads(seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while decoding_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert decoding_threads() == 0


def test_a_batch_holds_what_the_order_says():
    data = Memory()
    for step, batch in enumerate(take(Loader(data, seed=3, global_batch=20), 6)):
        want = order.ids(N, 3, step * 20, 20)
        assert np.array_equal(batch.ids, want)
        assert np.array_equal(batch.positions, np.arange(step * 20, step * 20 + 20))
        assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == (want % 5).tolist()
        assert batch.flip.numpy().tolist() == flip_mask(3, batch.positions).tolist()
        assert batch.images.shape == (20, 3, 112, 112) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for row, image in zip(batch.images, want.tolist(), strict=True):
            pixels = row.permute(1, 2, 0).numpy().astype(int)
            assert np.abs(pixels - picture(image)).max() <= 3  # RGB, and nobody else's rows


def packed(out: Path, encoded: list[bytes]) -> shards.Shards:
    """A data set of two shards on the disk; image i has label i % 5."""
    images = [(i % 5, jpeg) for i, jpeg in enumerate(encoded)]
    with ShardWriter(out) as writer:
        halves = [
            write_shard(writer.partial, "train-00000-of-00002", images[:20]),
            write_shard(writer.partial, "train-00001-of-00002", images[20:]),
        ]
        writer.finish(halves, list("abcde"), (112, 112), {})
    return shards.open(out)


def test_shards_on_the_disk_give_the_same_batches(tmp_path: Path):
    memory = Memory()
    disk = packed(tmp_path / "set", memory.encoded)
    ours = take(Loader(disk, seed=6, global_batch=25, workers=3), 4)
    theirs = take(Loader(memory, seed=6, global_batch=25, workers=3), 4)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_a_bad_image_in_a_shard_is_named_by_file_and_id(tmp_path: Path):
    encoded = Memory().encoded
    encoded[30] = encoded[30][:400]  # cut off
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.rec: byte \d+, image 30: trunc"):
        take(Loader(packed(tmp_path / "set", encoded), seed=0, global_batch=N), 1)


def test_threads_change_nothing():
    slow = Memory(delay=0.0004)  # images finish in another order than they began
    one = take(Loader(Memory(), seed=1, global_batch=33, workers=1, prefetch=1), 5)
    many = take(Loader(slow, seed=1, global_batch=33, workers=7, prefetch=5), 5)
    for a, b in zip(one, many, strict=True):
        assert np.array_equal(a.ids, b.ids) and torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.flip, b.flip)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (3, 1), (4, 3)])
def test_all_ranks_together_read_the_stream(world: int, accumulation: int):
    steps, batch = 3, 41
    ranks = [
        take(
            Loader(
                Memory(), seed=2, global_batch=batch, world=world, rank=r, accumulation=accumulation
            ),
            steps * accumulation,
        )
        for r in range(world)
    ]
    ids = np.concatenate(
        [ranks[r][m].ids for m in range(steps * accumulation) for r in range(world)]
    )
    assert np.array_equal(ids, order.ids(N, 2, 0, steps * batch))
    flips = np.concatenate(
        [ranks[r][m].flip for m in range(steps * accumulation) for r in range(world)]
    )
    assert np.array_equal(flips, flip_mask(2, np.arange(steps * batch)))


def test_a_resume_gives_what_an_unbroken_run_gives():
    unbroken = take(Loader(Memory(), seed=5, global_batch=16, accumulation=2), 8)
    resumed = take(Loader(Memory(), seed=5, global_batch=16, accumulation=2, samples_seen=32), 4)
    for a, b in zip(unbroken[4:], resumed, strict=True):
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.positions, b.positions)
        assert torch.equal(a.images, b.images) and torch.equal(a.flip, b.flip)


def test_no_more_is_read_than_the_prefetch():
    data = Memory()
    with Loader(data, seed=0, global_batch=8, prefetch=3) as loader:
        next(loader)
        time.sleep(0.2)
        assert data.reads == 8 * (1 + 3)


def test_a_bad_image_is_raised_by_next_with_its_traceback_and_its_name():
    data = Memory()
    bad = int(order.ids(N, 0, 25, 1)[0])
    data.encoded[bad] = b""
    loader = Loader(data, seed=0, global_batch=10, prefetch=5)
    next(loader)
    next(loader)
    with pytest.raises(
        ValueError, match=f"memory: byte {100 * bad}, image {bad}: .*zero bytes"
    ) as caught:
        next(loader)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "decode" in frames and "_decode_rows" in frames
    with pytest.raises(RuntimeError, match="closed"):  # not StopIteration: a loop must not just end
        next(loader)
    wait_for_no_threads()


def test_an_error_of_the_reader_arrives_too():
    data = Memory()
    data.encoded = []  # IndexError in __getitem__
    with pytest.raises(IndexError):
        next(Loader(data, seed=0, global_batch=10))


def test_closing_is_quick_though_much_is_queued():
    data = Memory(delay=0.002)
    loader = Loader(data, seed=0, global_batch=300, workers=2, prefetch=50)

    def close_soon() -> None:
        while data.reads < 20:
            time.sleep(0.001)
        loader.close()

    threading.Thread(target=close_soon, daemon=True).start()
    with pytest.raises((CancelledError, RuntimeError)):  # closed under its feet: no hang
        while True:
            next(loader)
    wait_for_no_threads()
    assert data.reads < 300 * 5  # of 300 * 51: the queue is dropped


def test_a_forgotten_loader_ends_its_threads():
    data = Memory(delay=0.01)
    loader = Loader(data, seed=0, global_batch=64, prefetch=20)
    next(loader)
    assert decoding_threads() > 0
    del loader
    wait_for_no_threads()
    assert data.reads < 64 * 10  # of 64 * 21: the queue is dropped


def test_an_abandoned_iterator_does_not_keep_the_process_alive():
    program = (
        "from tests.data_tools.load.test_loader import Loader, Memory\n"
        "kept = Loader(Memory(delay=0.001), seed=0, global_batch=64, prefetch=4)\n"
        "next(kept)\n"
        "print('done')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_waiting_is_measured():
    data = Memory(delay=0.01)
    with Loader(data, seed=0, global_batch=20, workers=1, prefetch=1) as loader:
        began = time.perf_counter()
        next(loader)
        spent = time.perf_counter() - began
        waited = loader.wait_seconds
        assert spent / 2 < waited <= spent  # the reading sleeps for most of it
        while data.reads < 40:  # the next batch is ready before it is asked for
            time.sleep(0.01)
        next(loader)
        assert loader.wait_seconds - waited < waited / 2


def test_labels_without_a_class_are_refused_before_anything_is_read():
    data = Memory()
    data.labels[7] = 5
    with pytest.raises(ValueError, match=r"the label 5 of image 7 is outside \[0, 5\) \(1 such"):
        Loader(data, seed=0, global_batch=10)
    assert data.reads == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 5, "world": 3, "accumulation": 2}, "global batch of 5"),
        ({"global_batch": 8, "world": 2, "rank": 2}, "rank 2"),
        ({"global_batch": 8, "workers": 0}, "workers = 0"),
        ({"global_batch": 8, "prefetch": 0}, "prefetch = 0"),
        ({"global_batch": 8, "samples_seen": -1}, "samples_seen = -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Loader(Memory(), seed=0, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to pin for")
def test_pinning_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="pin_memory needs a GPU"):
        Loader(Memory(), seed=0, global_batch=8, pin_memory=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches():
    batch = take(Loader(Memory(), seed=0, global_batch=8, pin_memory=True), 1)[0]
    assert batch.images.is_pinned() and batch.labels.is_pinned() and batch.flip.is_pinned()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalise_is_the_formula(layout: torch.memory_format, dtype: torch.dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 12, 14), np.uint8)
    pixels[0].flat[:256] = np.arange(256)
    mask = np.array([True, False, True, True, False])
    images = torch.from_numpy(pixels).contiguous(memory_format=layout)
    got = normalise(images, torch.from_numpy(mask), dtype)

    want = ((pixels / 255) - 0.5) / 0.5
    want[mask] = want[mask][..., ::-1]
    tolerance = {torch.float32: 2e-7, torch.float64: 1e-15, torch.bfloat16: 2**-9}[dtype]
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
    assert np.abs(got.double().numpy() - want).max() <= tolerance
    assert np.array_equal(images.numpy(), pixels)  # the argument is left alone


def test_half_the_images_are_flipped_afresh_each_epoch():
    n = 20_000
    first, second = flip_mask(1, np.arange(2 * n)).reshape(2, n)
    for mask in (first, second, first == second, first[1:] == first[:-1]):
        assert abs(mask.mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    assert not np.array_equal(first, flip_mask(2, np.arange(n)))
    assert np.array_equal(first[100:200], flip_mask(1, np.arange(100, 200)))


def test_memory_is_used_again_but_never_while_a_batch_is_held():
    data = Memory()
    with Loader(data, seed=0, global_batch=12, prefetch=1) as loader:
        held = [next(loader) for _ in range(5)]
        part = held.pop(2).images[3:5, 1].numpy()  # a view of a view keeps the whole alive
        before, of_part = [batch.images.clone() for batch in held], part.copy()
        seen = set()
        for _ in range(20):
            batch = next(loader)
            seen.add(batch.images.data_ptr())
            assert batch.images.data_ptr() not in {other.images.data_ptr() for other in held}
        assert len(seen) <= 4  # prefetch + 1 in work, this one, and one between
        assert all(torch.equal(a, b.images) for a, b in zip(before, held, strict=True))
        assert np.array_equal(part, of_part)
    del loader
    assert all(torch.equal(a, b.images) for a, b in zip(before, held, strict=True))
