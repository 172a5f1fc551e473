"""DALI gives what the CPU loader gives: order to the bit, pixels to the bit on the CPU."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import shards
from data_tools.load import dali, order
from data_tools.load.augment import Probabilities, draw
from data_tools.load.dali import Dali
from data_tools.load.loader import Batch, Loader, normalise
from data_tools.load.order import ShuffleBlocks
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.shard_writer import ShardWriter, write_shard
from tests.data_tools.samples import encoded, folder, pixels
from tests.real import real

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DALI exists on Linux alone")
N = 53


def packed(out: Path, images: list[bytes], size: tuple[int, int] | None = (112, 112)):
    """A set of two shards; image i has label i % 5."""
    records = [(i % 5, image) for i, image in enumerate(images)]
    with ShardWriter(out) as writer:
        halves = [
            write_shard(writer.partial, "train-00000-of-00002", records[:20]),
            write_shard(writer.partial, "train-00001-of-00002", records[20:]),
        ]
        writer.finish(halves, list("abcde"), size, {})
    return shards.open(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> shards.Shards:
    return packed(tmp_path_factory.mktemp("dali") / "set", [encoded(i) for i in range(N)])


def take(source, count: int) -> list[Batch]:
    with source:
        return [next(source) for _ in range(count)]


def assert_same(a: Batch, b: Batch) -> None:
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.positions, b.positions)
    assert torch.equal(a.labels, b.labels) and b.labels.dtype == torch.int64
    assert torch.equal(a.flip, b.flip)
    assert a.images.dtype == b.images.dtype and torch.equal(a.images, b.images)
    assert b.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "arguments",
    [
        {"global_batch": 20},
        {"global_batch": 41, "world": 3, "rank": 0, "accumulation": 3},
        {"global_batch": 41, "world": 3, "rank": 2, "accumulation": 3, "samples_seen": 82},
        {"global_batch": 130},  # two epochs and a bit in a batch
        {"global_batch": 16, "blocks": ShuffleBlocks(5, 3)},
        {"global_batch": 24, "chances": Probabilities(crop=0.5, photometric=0.5)},
    ],
    ids=str,
)
def test_every_batch_is_that_of_the_cpu_loader(data, arguments):
    ours = take(Loader(data, seed=3, **arguments), 9)
    for a, b in zip(ours, take(Dali(data, seed=3, **arguments), 9), strict=True):
        assert_same(a, b)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> shards.Shards:
    out = tmp_path_factory.mktemp("photographs") / "set"
    pack(real("lfw112"), out, PackOptions(shards=2))
    return shards.open(out)


def test_real_photographs_have_the_same_pixels(photographs):
    ours = take(Loader(photographs, seed=1, global_batch=500), 4)
    for a, b in zip(ours, take(Dali(photographs, seed=1, global_batch=500), 4), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_other_formats_too(tmp_path, suffix):
    data = packed(tmp_path / "set", [encoded(i, suffix=suffix) for i in range(N)])
    assert_same(*[take(kind(data, seed=0, global_batch=N), 1)[0] for kind in (Loader, Dali)])


def test_grey_and_turned_images_too(tmp_path):
    grey = cv2.imencode(".jpg", cv2.cvtColor(pixels(1), cv2.COLOR_RGB2GRAY))[1].tobytes()
    exif = (
        b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    )
    turned = encoded(2)[:2] + exif + encoded(2)[2:]
    data = packed(tmp_path / "set", [grey, turned] + [encoded(i) for i in range(30)])
    assert_same(*[take(kind(data, seed=0, global_batch=32), 1)[0] for kind in (Loader, Dali)])


def saved(seed, mode, form, **options):
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels(seed)[:, :, ::-1])).convert(mode)
    picture.save(file, form, **options)
    return file.getvalue()


def test_kinds_on_which_decoders_differ_have_the_same_pixels(tmp_path):
    """In place: a pack would have made JPEGs of them, unless they were passed through."""
    deep = np.random.default_rng(0).integers(0, 1 << 16, (112, 112, 3), np.uint16)
    kinds = [
        saved(1, "CMYK", "JPEG", quality=95), saved(2, "RGB", "JPEG", keep_rgb=True),
        saved(3, "RGBA", "PNG"), saved(4, "P", "PNG"), saved(5, "1", "PNG"), saved(6, "LA", "PNG"),
        saved(7, "RGB", "TIFF"), saved(8, "RGB", "PPM"), saved(9, "RGBA", "WEBP"),
        cv2.imencode(".png", deep)[1].tobytes(), cv2.imencode(".png", deep[:, :, 0])[1].tobytes(),
    ]  # fmt: skip
    data = packed(tmp_path / "set", (kinds * 3)[:N])
    for ours, cpu in zip(
        take(Dali(data, seed=7, global_batch=30), 2),
        take(Loader(data, seed=7, global_batch=30), 2),
        strict=True,
    ):
        assert_same(ours, cpu)


def test_the_graph_normalises_and_mirrors_to_the_bit(data):
    arguments = {"seed": 2, "global_batch": 30, "chances": Probabilities(0.5, 0.0, 0.5)}
    graph = take(Dali(data, normalised=True, **arguments), 4)
    for a, b in zip(take(Loader(data, **arguments), 4), graph, strict=True):
        assert b.images.dtype == torch.float32
        assert torch.equal(normalise(a.images, a.flip), normalise(b.images, b.flip))


def test_a_low_resolution_is_nearly_that_of_opencv(photographs):
    """Mean difference within each pair of interpolations, and the sharpness that is left."""
    arguments = {"seed": 3, "global_batch": 1500, "chances": Probabilities(low_res=1.0)}
    a, b = (take(kind(photographs, prefetch=1, **arguments), 1)[0] for kind in (Loader, Dali))
    kinds = draw(3, a.positions, arguments["chances"], 112).interpolation
    difference = (a.images.float() - b.images.float()).abs().mean((1, 2, 3)).numpy()
    sharpness = [
        np.array([cv2.Laplacian(x, cv2.CV_32F).var() for x in s.images.permute(0, 2, 3, 1).numpy()])
        for s in (a, b)
    ]
    for down in range(5):
        for up in range(5):
            some = (kinds == (down, up)).all(1)
            assert some.sum() > 25 and difference[some].mean() < 1.5  # of 255
            ratio = sharpness[1][some].mean() / sharpness[0][some].mean()
            assert 0.8 < ratio < 1.25, (down, up)
    # Kolmogorov and Smirnov on the whole: what chance alone has at 1500 against 1500, p = 0.001.
    places = np.sort(np.concatenate(sharpness))
    shares = [np.searchsorted(np.sort(s), places, "right") / len(s) for s in sharpness]
    assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / 1500)


def test_a_resume_gives_what_an_unbroken_run_gives(data):
    arguments = {"seed": 5, "global_batch": 16, "chances": Probabilities(0.3, 0.3, 0.3)}
    unbroken = take(Dali(data, **arguments), 6)
    resumed = take(Dali(data, samples_seen=48, **arguments), 3)
    for a, b in zip(unbroken[3:], resumed, strict=True):
        assert_same(a, b)


def test_batches_stay_as_they_are_while_later_ones_are_made(data):
    with Dali(data, seed=0, global_batch=10) as source:
        first = next(source)
        before = first.images.clone()
        for _ in range(8):
            next(source)
        assert torch.equal(first.images, before)


def test_an_image_of_another_size_does_not_slip_through_the_augmentations(tmp_path):
    data = packed(tmp_path / "set", [encoded(i, 64 if i == 30 else 112) for i in range(N)])
    for chances in (Probabilities(low_res=1.0), Probabilities(1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="image 30: 64x64 pixels"):
            next(Dali(data, seed=0, global_batch=N, chances=chances))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(30)[:400], "truncated"),
        (b"", "zero bytes"),
        (encoded(3)[:300] + encoded(3)[-2:], "truncated"),
        (encoded(30, 64), "64x64 pixels"),
        (encoded(30, 112, 100), "100x112 pixels"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_by_file_and_id(tmp_path, content, words):
    images = [encoded(i) for i in range(N)]
    images[30] = content
    data = packed(tmp_path / "set", images)
    source = Dali(data, seed=0, global_batch=N)
    with pytest.raises(ValueError, match=rf"00001-of-00002\.rec: byte \d+, image 30: .*{words}"):
        next(source)
    with pytest.raises(RuntimeError, match="closed"):
        next(source)
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_a_set_of_another_size_is_refused(tmp_path):
    data = packed(tmp_path / "set", [encoded(i, 64) for i in range(30)], (64, 64))
    with pytest.raises(ValueError, match="holds .64, 64. images and 112x112 are asked for"):
        Dali(data, seed=0, global_batch=5)


def test_a_forgotten_source_ends_its_threads_and_the_process():
    program = (
        "import sys, data_tools.shards as s\n"
        "from data_tools.load.dali import Dali\n"
        "kept = Dali(s.open(sys.argv[1]), seed=0, global_batch=8)\n"
        "next(kept)\n"
        "print('done')\n"
    )
    path = str(real("recordio/popkorn"))
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_waiting_is_measured(data):
    with Dali(data, seed=0, global_batch=20) as source:
        next(source)
        assert source.wait_seconds > 0


def test_without_dali_the_message_says_what_to_install(data, monkeypatch):
    monkeypatch.setattr(dali.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install nvidia-dali-cuda130==2\.4\.0.*loader=cpu"):
        Dali(data, seed=0, global_batch=5)


def test_the_stated_requirement_is_the_pinned_one():
    pinned = (Path(__file__).parents[3] / "requirements.txt").read_text()
    assert dali.REQUIREMENT in pinned


def test_dalis_own_reader_reads_our_shards(tmp_path):
    """fn.readers.mxnet on each shard: every record, its label and its pixels."""
    from nvidia.dali import fn, pipeline_def, types

    pack(folder(tmp_path / "faces", [5, 2, 7, 1, 4]), tmp_path / "set", PackOptions(shards=2))
    data = shards.open(tmp_path / "set")
    for number, shard in enumerate(data.index["shards"]):
        stem = tmp_path / "set" / shard["name"]

        @pipeline_def(batch_size=shard["images"], num_threads=1, device_id=None)
        def graph(stem=stem):
            content, labels = fn.readers.mxnet(path=[f"{stem}.rec"], index_path=[f"{stem}.idx"])
            return fn.decoders.image(content, device="cpu", output_type=types.RGB), labels

        found, labels = graph().run()
        start = data.starts[number]
        wanted = np.arange(start, start + shard["images"])
        assert labels.as_array()[:, 0].tolist() == data.labels[wanted].tolist()
        for row, image in enumerate(wanted.tolist()):
            assert np.array_equal(found.at(row), dali.decode(data[image][1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_order_is_the_same_and_the_pixels_nearly(data):
    ours = take(Loader(data, seed=3, global_batch=20), 6)
    for a, b in zip(ours, take(Dali(data, seed=3, global_batch=20, device="cuda"), 6), strict=True):
        assert np.array_equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert b.images.is_cuda and b.images.dtype == torch.float32
        difference = (normalise(a.images, a.flip) - b.images.cpu()).abs() * 127.5
        assert difference.mean() < 1 and difference.max() < 16  # grey levels: nvJPEG's rounding
    chances = Probabilities(0.5, 0.5, 0.5)
    kinds = [(Loader, {}), (Dali, {"device": "cuda"})]
    a, b = (take(kind(data, seed=3, global_batch=40, chances=chances, **more), 1)[0]
            for kind, more in kinds)  # fmt: skip
    difference = (normalise(a.images, a.flip) - b.images.cpu()).abs() * 127.5
    assert difference.mean() < 3


def test_the_order_is_that_of_order_py(data):
    batch = take(Dali(data, seed=9, global_batch=40, samples_seen=40), 1)[0]
    assert np.array_equal(batch.ids, order.ids(N, 9, 40, 40))
