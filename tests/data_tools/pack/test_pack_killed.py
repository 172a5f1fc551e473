"""A pack that is stopped or fails leaves nothing half-made; a killed one goes on."""

import os
import re
import resource
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.common import parallel
from data_tools.pack import pack_job
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.sources import folders
from tests.data_tools.packs import contents, start_pack


@pytest.fixture
def slow_source(tmp_path):
    return make_slow_source(tmp_path)


def make_slow_source(tmp_path):
    """240 images that take some 10 ms each."""
    source = tmp_path / "slow"
    big = tmp_path / "big.png"
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    big.write_bytes(cv2.imencode(".png", noise)[1].tobytes())
    for k in range(8):
        (source / f"p{k}").mkdir(parents=True)
        for j in range(30):
            os.link(big, source / f"p{k}" / f"{j}.png")
    return source


def descendants(pid):
    """Process ids below `pid`, from /proc."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def wait_for(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in 60 s"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_in_the_middle(slow_source, tmp_path, workers):
    out, partial = tmp_path / "set", tmp_path / "set.partial"
    process = start_pack(slow_source, out, "--resize", "--shards", "2", "--workers", workers)
    wait_for(lambda: list(partial.glob("*.rec")), "the first shard")
    below = descendants(process.pid)
    assert (len(below) >= 2) == (workers == "2")
    process.kill()
    process.communicate()
    assert not out.exists() and partial.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the workers' end")
    done = pack(slow_source, out, PackOptions(shards=2, size=16, resize=True))
    assert (done["status"], done["images"]) == ("packed", 240)
    assert not partial.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_interrupted(slow_source, tmp_path, workers):
    out, partial = tmp_path / "set", tmp_path / "set.partial"
    process = start_pack(slow_source, out, "--resize", "--shards", "2", "--workers", workers)
    wait_for(lambda: list(partial.glob("*.rec")), "the first shard")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in error
    assert not out.exists() and not partial.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_disk_full(source, tmp_path, workers):
    """The kernel refuses to let any file grow beyond 8 KiB, as a full disk would."""
    out = tmp_path / "set"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    process = start_pack(source, out, "--shards", "2", "--workers", workers, before=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    last = error.splitlines()[-1]
    assert last.startswith(f"error: {out}: ") and "File too large" in last
    assert "what was written is removed" in last and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]


def test_a_worker_that_is_killed_ends_the_pack(slow_source, tmp_path):
    """As when memory runs out: what is finished is kept, and the same command goes on from it."""
    out, partial = tmp_path / "set", tmp_path / "set.partial"
    process = start_pack(slow_source, out, "--resize", "--shards", "6", "--workers", "2")
    wait_for(lambda: list(partial.glob("journal/*-of-*[0-9].npz")), "the first whole shard")
    workers = [
        pid for pid in descendants(process.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    last = error.splitlines()[-1]
    assert "a worker process was killed" in last and "the same command goes on" in last
    assert not out.exists() and partial.exists()
    assert pack(slow_source, out, PackOptions(shards=6, resize=True))["status"] == "resumed"
    pack(slow_source, tmp_path / "unbroken", PackOptions(shards=6, resize=True))
    assert contents(out) == contents(tmp_path / "unbroken")
    assert not partial.exists()


def test_a_failing_source_disk_stops_the_pack(source, tmp_path, monkeypatch):
    """An unreadable image is the image's fault; EIO is not, and nobody should train without it."""

    def broken(path, *args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(folders, "open", broken, raising=False)
    with pytest.raises(OSError, match=r"Input/output error: .*p0\d/\d\.jpg"):
        pack(source, tmp_path / "set", PackOptions(shards=2))
    assert not (tmp_path / "set").exists() and not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize(("total", "started"), [(300, 0), (1499, 2), (10**6, 3)])
def test_no_more_processes_than_the_work_is_worth(monkeypatch, total, started):
    asked = []

    class Pool:
        def __init__(self, workers, *_, **__):
            asked.append(workers)
            raise InterruptedError

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    arguments = (lambda task, advance: task, [1, 2, 3], 8, total, "title")
    if started:
        with pytest.raises(InterruptedError):
            parallel.run_tasks(*arguments)
        assert asked == [started]
    else:
        assert parallel.run_tasks(*arguments) == [1, 2, 3]


# --- going on after a kill ---


def kill_after(shards_done, source, out, *arguments):
    process = start_pack(source, out, *arguments)
    journal = Path(f"{out}.partial") / "journal"
    wait_for(lambda: len(list(journal.glob("*-of-*[0-9].npz"))) >= shards_done, "those shards")
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the workers' end")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_killed_pack_goes_on_to_the_same_bytes(slow_source, tmp_path, workers):
    (slow_source / "p3" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    options = PackOptions(shards=6, hold_out=2, pairs=20, resize=True)
    words = ["--shards", "6", "--hold-out", "2", "--pairs", "20", "--workers", str(workers)]
    out = tmp_path / "set"
    kill_after(2, slow_source, out, "--resize", *words)
    done = sorted((tmp_path / "set.partial" / "journal").glob("*.npz"))
    kept = {path.stem: (tmp_path / "set.partial" / f"{path.stem}.rec").stat() for path in done[:2]}
    assert pack(slow_source, out, options, workers)["status"] == "resumed"
    for name, was in kept.items():
        now = (out / f"{name}.rec").stat()
        assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns), "written again"
    assert pack(slow_source, tmp_path / "unbroken", options)["status"] == "packed"
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.long, id="kill"),
        pytest.param(signal.SIGINT, id="ctrl-c"),
    ],
)
def test_the_shards_of_a_split_are_kept(slow_source, tmp_path, stop, monkeypatch):
    monkeypatch.setattr(pack_job, "IMAGES_PER_SHARD", 20)
    out, partial = tmp_path / "set", tmp_path / "set.partial"
    words = ["--resize", "--split", "images=0.5", "--shards", "4", "--workers", "1"]
    process = start_pack(slow_source, out, *words, images_per_shard=20)
    journal = partial / "journal"
    wait_for(lambda: len(list(journal.glob("split-*-of-*[0-9].npz"))) >= 2, "two shards of split")
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert re.search(r"[23] of 8 shards that are finished are kept in", error)
    done = sorted(journal.glob("*.npz"))
    was = {path.stem: (partial / "split" / f"{path.stem}.rec").stat() for path in done}
    options = PackOptions(shards=4, resize=True, split="images=0.5")
    assert pack(slow_source, out, options)["status"] == "resumed"
    for name, one in was.items():
        now = (out / "split" / f"{name}.rec").stat()
        assert (now.st_ino, now.st_mtime_ns) == (one.st_ino, one.st_mtime_ns), "written again"
    assert pack(slow_source, tmp_path / "unbroken", options)["status"] == "packed"
    for part in (".", "split"):
        assert contents(out / part) == contents(tmp_path / "unbroken" / part)
    assert not partial.exists()


def test_what_a_kill_left_is_not_trusted_blindly(slow_source, tmp_path):
    out = tmp_path / "set"
    kill_after(2, slow_source, out, "--resize", "--shards", "4", "--workers", "1")
    partial = tmp_path / "set.partial"
    (partial / "train-00000-of-00004.rec").write_bytes(b"damaged since")
    next((partial / "journal").glob("train-00001*.npz")).write_bytes(b"PK")
    assert pack(slow_source, out, PackOptions(shards=4, resize=True))["images"] == 240
    assert main(["verify", str(out)]) == 0
    pack(slow_source, tmp_path / "unbroken", PackOptions(shards=4, resize=True))
    assert contents(out) == contents(tmp_path / "unbroken")


def test_other_options_do_not_take_over_what_a_kill_left(slow_source, tmp_path):
    out = tmp_path / "set"
    kill_after(1, slow_source, out, "--resize", "--shards", "2", "--workers", "1")
    assert pack(slow_source, out, PackOptions(shards=2, seed=1, resize=True))["status"] == "packed"
