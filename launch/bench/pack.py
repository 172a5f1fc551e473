"""Packing against MXNet's own im2rec, in one run on the same files with as many processes.

    python launch/bench/pack.py WORK [--images 100000] [--processes 2] [--rounds 3]

Needs the peer's environment (`make .venv-peers/.installed`). Each round packs the same folder by
im2rec (its default: decode and encode again; and --pass-through), by `pack` (every image decoded
once, its bytes kept) and `pack --pass-through`, and from the .rec by `pack --pass-through`. The
caches are warm, as the files were just written. Prints one JSON line: images and megabytes per
second (medians), and the ratios within rounds (medians) to im2rec's default, by the clock and by
processor time (which a busy machine disturbs less).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from data_tools.common import files

_ROOT = Path(__file__).resolve().parents[2]
_PEER = _ROOT / ".venv-peers" / "bin" / "python"
_PER_PERSON = 50


def make_faces(root: Path, images: int) -> int:
    """A folder of JPEGs 112x112 at quality 95 as large as photographs' (about 9 kB); its bytes."""
    total = 0
    for n in range(images):
        person = root / f"p{n // _PER_PERSON:06d}"
        if n % _PER_PERSON == 0:
            person.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(n)
        coarse = random.integers(0, 256, (28, 28, 3), np.uint8)
        image = cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC)
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        total += len(encoded)
        (person / f"{n % _PER_PERSON:03d}.jpg").write_bytes(encoded.tobytes())
    return total


def timed(command: list, work: Path) -> tuple[float, float]:
    """Seconds of a command, one thread a process: on the clock, and of processors."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(
        list(map(str, command)),
        cwd=work,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
    )
    after = os.times()
    used = after.children_user + after.children_system
    return time.perf_counter() - started, used - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="a directory for some GB, emptied at the end")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not files.exists(_PEER):
        raise SystemExit(f"no MXNet at {_PEER}: make .venv-peers/.installed")
    work = args.work.resolve()
    work.mkdir(parents=True)
    try:
        result = measure(work, args.images, args.processes, args.rounds)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result))


def measure(work: Path, images: int, processes: int, rounds: int) -> dict:
    faces = work / "faces"
    total = make_faces(faces, images)
    im2rec = [_PEER, "-W", "ignore", "-m", "mxnet.tools.im2rec"]
    timed([*im2rec, "--list", "--recursive", "im", faces], work)
    theirs = [*im2rec, "--num-thread", processes, "im", faces]
    pack = [sys.executable, "-m", "data_tools", "pack"]
    options = ["--shards", "8", "--workers", processes]
    ways = {
        "im2rec": theirs,
        "pack": [*pack, faces, "ours", *options],
        "im2rec --pass-through": [*theirs, "--pass-through"],
        "pack --pass-through": [*pack, faces, "kept", *options, "--pass-through"],
        "pack --pass-through of a .rec": [*pack, "im.rec", "again", *options, "--pass-through"],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, command in ways.items():
            for out in ("ours", "kept", "again"):
                shutil.rmtree(work / out, ignore_errors=True)
            clock, used = timed(command, work)
            seconds[way].append(clock)
            processor[way].append(used)
    return {
        "images": images,
        "megabytes": round(total / 1e6, 1),
        "processes": processes,
        "images_per_second": {
            way: round(images / statistics.median(own)) for way, own in seconds.items()
        },
        "megabytes_per_second": {
            way: round(total / 1e6 / statistics.median(own), 1) for way, own in seconds.items()
        },
        "times_im2rec": _ratios(seconds),
        "times_im2rec_by_processor_time": _ratios(processor),
    }


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times faster than im2rec each way is, median over the rounds."""
    return {
        way: round(statistics.median(a / b for a, b in zip(seconds["im2rec"], own, strict=True)), 2)
        for way, own in seconds.items()
    }


if __name__ == "__main__":
    main()
