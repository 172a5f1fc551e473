"""How fast training gets its images, as ratios in one run: loaders against bare decoding.

    python launch/bench/loader.py SHARDS [--threads 2] [--rounds 15]
    python launch/bench/loader.py --index 42474557          (memory of the reader; no images)

Every round times, in an order that turns, on --threads threads each:

    bare        cv2.imdecode alone of images that lie in memory
    cpu, dali   our two loaders; dali_normalised with mirror and normalisation in DALI's graph;
                *_augmented with AdaFace's three at 0.2; dali_gpu decodes on a GPU, if there is one
    dali_mxnet  DALI's fn.readers.mxnet with its own shuffle buffer, into the same decoder: what
                dali would be if it did not have to keep an order or resume
    arcface     arcface_torch's way, written out below: records, OpenCV's decoder as in MXNet, a PIL
                image, random mirror, tensor, normalisation, in a DataLoader of as many processes

Rates are images/s until batches are in memory, after a warm-up; a ratio is taken round by round, so
that other work on the machine meets both, and its median counts. arcface's batches are normalised
float32 and those of the others uint8, as the network's device normalises them; `cpu+normalise` does
it here, in one thread. Other work on the machine slows threads that wait for one another more than
others: the same ratios by processor time stand beside. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from data_tools import shards
from data_tools.common import cli, text
from data_tools.common.errors import UserError
from data_tools.images.decode import _FLAGS
from data_tools.load import order
from data_tools.load.augment import Probabilities
from data_tools.load.dali import Dali
from data_tools.load.loader import Loader, normalise

_BATCH = 128  # images
_WARM_UP = 10  # batches: more than any of them holds ready
_RATIOS = [  # of rates, and the target
    ("cpu", "bare", 0.85),
    ("cpu", "arcface", 2.5),
    ("cpu+normalise", "arcface", None),
    ("dali", "cpu", 1.0),
    ("dali", "bare", None),
    ("dali", "dali_mxnet", None),
    ("dali_normalised", "dali", None),
    ("cpu_augmented", "cpu", None),
    ("dali_augmented", "cpu_augmented", None),
]


@cli.on_one_line()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="?", type=Path, help="a packed set")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="default %(default)s")
    parser.add_argument("--batches", type=int, default=16, help="timed in a round; %(default)s")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="time these alone")
    parser.add_argument("--index", type=int, metavar="N", help="open a generated set of N images")
    args = parser.parse_args(arguments)
    if args.index:
        report = opened(args.index)
    elif args.shards:
        report = rates(shards.open(args.shards), args)
    else:
        parser.error("name a packed set, or --index N")
    print(json.dumps(report))
    return 0


def rates(data: shards.Shards, args: argparse.Namespace) -> dict:
    threads, rounds, batches = args.threads, args.rounds, args.batches
    arcface = ArcfaceTorch(data)
    adaface = Probabilities(0.2, 0.2, 0.2)
    ways: dict[str, Callable[[], Iterator]] = {
        "bare": lambda: bare(data, threads),
        "cpu": lambda: _endless(Loader(data, seed=0, global_batch=_BATCH, workers=threads)),
        "cpu+normalise": lambda: _normalised(
            Loader(data, seed=0, global_batch=_BATCH, workers=threads)
        ),
        "dali": lambda: _endless(Dali(data, seed=0, global_batch=_BATCH, workers=threads)),
        "dali_normalised": lambda: _endless(
            Dali(data, seed=0, global_batch=_BATCH, workers=threads, normalised=True)
        ),
        "cpu_augmented": lambda: _endless(
            Loader(data, seed=0, global_batch=_BATCH, workers=threads, chances=adaface)
        ),
        "dali_augmented": lambda: _endless(
            Dali(data, seed=0, global_batch=_BATCH, workers=threads, chances=adaface)
        ),
        "dali_mxnet": lambda: dali_mxnet(data, threads),
        "arcface": lambda: iter(
            DataLoader(
                arcface,
                _BATCH,
                sampler=RandomSampler(arcface, num_samples=_BATCH * (_WARM_UP + batches)),
                num_workers=threads,
            )
        ),
    }
    if torch.cuda.is_available():
        ways["dali_gpu"] = lambda: _endless(
            Dali(data, device="cuda", seed=0, global_batch=_BATCH, workers=threads)
        )
    if unknown := set(args.only or ()) - ways.keys():
        raise UserError(f"--only {', '.join(unknown)}: one of {', '.join(ways)}")
    ways = {name: way for name, way in ways.items() if not args.only or name in args.only}
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}  # seconds, without children
    names = list(ways)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            source = ways[name]()
            _consume(source, _WARM_UP)
            began, spent = time.perf_counter(), time.process_time()
            _consume(source, batches)
            found[name].append(batches * _BATCH / (time.perf_counter() - began))
            processor[name].append(time.process_time() - spent)
            if hasattr(source, "close"):  # a generator: ends its threads before the next begins
                source.close()
            del source
        print(f"round {i + 1}/{rounds}", file=sys.stderr, flush=True)
    ratios = {}
    for one, other, target in _RATIOS:
        if not {one, other} <= ways.keys():
            continue
        pairs = [a / b for a, b in zip(found[one], found[other], strict=True)]
        ratios[f"{one} / {other}"] = _summary(pairs) | {"target": target}
    spent_on = {}
    for one, other in [("cpu", "bare"), ("dali", "bare"), ("dali", "cpu")]:
        if not {one, other} <= ways.keys():
            continue
        pairs = [b / a for a, b in zip(processor[one], processor[other], strict=True)]
        spent_on[f"{one} / {other}"] = _summary(pairs)
    medians = {name: round(statistics.median(values)) for name, values in found.items()}
    return {
        "threads": threads,
        "rounds": rounds,
        "images_per_second": medians,
        "ratios": ratios,
        "images_per_processor_second": spent_on,
    }


def _summary(values: list[float]) -> dict[str, float | None]:
    median = statistics.median(values)
    return {"median": round(median, 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def _consume(source: Iterator, batches: int) -> None:
    for _ in range(batches):
        next(source)


def _endless(source: Loader | Dali) -> Iterator:
    with source:
        yield from source


def _normalised(source: Loader) -> Iterator[Tensor]:
    with source:
        for batch in source:
            yield normalise(batch.images, batch.flip)


def bare(data: shards.Shards, threads: int) -> Iterator[None]:
    """cv2.imdecode of one batch after the other: each thread has its part of it in memory."""
    ids = order.ids(len(data), 0, 0, 32 * _BATCH).tolist()
    images = [np.frombuffer(data[image][1], np.uint8) for image in ids]
    ready, stop = threading.Semaphore(0), threading.Event()
    part = _BATCH // threads  # images between two signs of life, so that these cost nothing

    def work(first: int) -> None:
        while not stop.is_set():
            for at in range(first * part, len(images), threads * part):
                for image in images[at : at + part]:
                    cv2.imdecode(image, _FLAGS)
                ready.release()

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(threads)]
    for worker in workers:
        worker.start()
    try:
        while True:
            for _ in range(threads):
                ready.acquire()
            yield None
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def dali_mxnet(data: shards.Shards, threads: int) -> Iterator:
    from nvidia.dali import fn, pipeline_def, types

    stem = data.files[0].path.with_suffix("")  # it takes one file

    @pipeline_def(batch_size=_BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def graph():  # type: ignore[no-untyped-def]
        encoded, labels = fn.readers.mxnet(
            path=[f"{stem}.rec"], index_path=[f"{stem}.idx"], random_shuffle=True, initial_fill=4096
        )
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB), labels

    pipe = graph()
    while True:
        yield pipe.run()


class ArcfaceTorch(Dataset):
    """arcface_torch's MXFaceDataset with our reader in place of MXNet's, its transforms on PIL."""

    def __init__(self, data: shards.Shards) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        label, encoded = self.data[index]
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        sample = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
        image = Image.fromarray(sample)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
        return pixels.sub_(mean).div_(std), torch.tensor(label, dtype=torch.long)


def opened(images: int) -> dict:
    """Memory and time that a set of so many images takes to open and to be drawn from.

    Its columns are real; its records are one sparse file of zeros, as nothing of them is read.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        classes = max(images // 21, 1)  # WebFace42M has 21 images a class
        for name, step in (("labels", None), ("offsets", 8192)):
            column = np.lib.format.open_memmap(
                root / f"{name}.npy", mode="w+", dtype=np.int64, shape=(images,)
            )
            for start in range(0, images, 1 << 22):
                block = np.arange(start, min(start + (1 << 22), images), dtype=np.int64)
                column[start : start + len(block)] = block * step if step else block % classes
            del column
        with open(root / "train.rec", "wb") as file:
            file.truncate(images * 8192)
        index = {
            "format": shards.FORMAT,
            "version": shards.VERSION,
            "images": images,
            "classes": classes,
            "image_size": [112, 112],
            "shards": [{"name": "train", "images": images, "bytes": images * 8192}],
            "labels": {"file": "labels.npy"},
            "offsets": {"file": "offsets.npy"},
        }
        (root / shards.INDEX).write_text(json.dumps(index))
        child = os.fork()
        if child == 0:  # a process of its own, so that what made the files does not count
            os._exit(_open_and_draw(root))
        _, status = os.waitpid(child, 0)
        if status:
            raise OSError(f"opening ended with status {status}")
        return {"images": images} | json.loads(text.read_text(root / "report.json"))


def _open_and_draw(root: Path) -> int:
    from data_tools.load.loader import Stream

    before = _memory()
    began = time.perf_counter()
    data = shards.open(root)
    stream = Stream(data, seed=0, global_batch=1024)
    seconds = time.perf_counter() - began
    for _ in range(50):
        batch, _ = stream.next()
        for image in batch.ids.tolist():
            data.locate(image)
    after = _memory()
    report = {
        "open_seconds": round(seconds, 2),
        "target_seconds": 10,
        # Pages of the columns are shared by all processes of a node and can be dropped.
        "resident_mib": round(after["VmRSS"] - before["VmRSS"]),
        "of_it_private_mib": round(after["RssAnon"] - before["RssAnon"]),
        "peak_mib": round(after["VmHWM"]),
        "target_mib": 1536,
    }
    (root / "report.json").write_text(json.dumps(report))
    return 0


def _memory() -> dict[str, float]:
    """MiB of this process, by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) / 1024
        for line in lines
        if line.startswith(("VmRSS", "RssAnon", "VmHWM"))
    }


if __name__ == "__main__":
    sys.exit(main())
