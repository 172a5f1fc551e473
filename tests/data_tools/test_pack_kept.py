"""A pack keeps finished shards, and touches nothing that it did not make."""

import os
import re
import shutil
import signal

import pytest

from data_tools import shards
from data_tools.__main__ import main
from data_tools.common.partial_directory import MARKER
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import PackOptions
from data_tools.recordio import Header, Writer
from tests.data_tools.pack.test_pack_killed import (
    kill_after,
    make_slow_source,
    slow_source,
    wait_for,
)
from tests.data_tools.packs import contents, start_pack
from tests.data_tools.samples import encoded

__all__ = ["slow_source"]  # a fixture


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.long), "2"])
def test_ctrl_c_keeps_the_finished_shards(slow_source, tmp_path, workers):
    out, partial = tmp_path / "set", tmp_path / "set.partial"
    process = start_pack(slow_source, out, "--resize", "--shards", "6", "--workers", workers)
    wait_for(lambda: len(list(partial.glob("journal/*-of-*.npz"))) >= 2, "two whole shards")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    last = error.splitlines()[-1]
    done = re.search(r"interrupted; (\d) of 6 shards that are finished are kept in (\S+):", last)
    assert done and int(done[1]) >= 2 and done[2] == str(partial), last
    assert "the same command goes on from there" in last and "remove that directory" in last
    kept = {path.name: path.stat().st_ino for path in partial.glob("train-*.rec")}
    assert pack(slow_source, out, PackOptions(shards=6, resize=True))["status"] == "resumed"
    now = {path.name: path.stat().st_ino for path in out.glob("train-*.rec")}
    assert sum(now[name] == inode for name, inode in kept.items()) >= int(done[1])
    pack(slow_source, tmp_path / "unbroken", PackOptions(shards=6, resize=True))
    assert contents(out) == contents(tmp_path / "unbroken")
    assert not partial.exists()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(images, what their killed pack left) to be copied."""
    root = tmp_path_factory.mktemp("killed")
    source = make_slow_source(root)
    kill_after(2, source, root / "set", "--resize", "--shards", "6", "--workers", "1")
    return source, root / "set.partial"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--overwrite", "--shards", "9999"], "cannot fill 9999 shards"),
        (["--overwrite", "--hold-out", "7"], "--hold-out can be at most 6"),
        (["--overwrite", "--quality", "200"], "at most 100"),
        (["--overwrite", "--workers", "0"], "must be 1 or more"),
        (["--overwrite", "--detector", "x"], "need --align: give it too"),
        (["--overwrite", "--min-images", "31"], "0 of 8 identities"),
        (["--overwrite", "--align"], "--align needs five points"),
    ],
)
def test_options_that_are_refused_cost_no_finished_shard(
    killed, tmp_path, capsys, arguments, fault
):
    source, left = killed
    out = tmp_path / "set"
    shutil.copytree(left, tmp_path / "set.partial")
    before = contents(tmp_path / "set.partial" / "journal")
    assert len(before) >= 3
    assert main(["pack", str(source), str(out), *arguments]) == 1
    assert fault in capsys.readouterr().err
    assert contents(tmp_path / "set.partial" / "journal") == before


# --- what is not ours ---


def foreign(directory):
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")


def commands_of(source, tmp_path):
    """Each command that writes OUT aside, as a function of OUT."""
    packed = tmp_path / "packed"
    pack(source, packed, PackOptions(shards=1))
    return [
        lambda out: ["pack", str(source), str(out), "--shards", "2"],
        lambda out: ["unpack", str(packed), str(out)],
        lambda out: ["synthesize", str(out), "--identities", "2", "--images", "2"],
    ]


@pytest.mark.parametrize("command", [0, 1, 2], ids=["pack", "unpack", "synthesize"])
def test_a_partial_directory_of_the_user_is_refused(source, tmp_path, capsys, command):
    arguments = commands_of(source, tmp_path)[command]
    foreign(tmp_path / "set.partial")
    assert main(arguments(tmp_path / "set")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "set.partial holds thesis.tex and was not made by this program" in error
    assert contents(tmp_path / "set.partial") == {"thesis.tex": b"years of work"}
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("command", [0, 1, 2], ids=["pack", "unpack", "synthesize"])
@pytest.mark.parametrize("name", ["set.partial", "set"])
def test_links_are_refused(source, tmp_path, capsys, command, name):
    arguments = commands_of(source, tmp_path)[command]
    target = tmp_path / "elsewhere"
    target.mkdir()
    if name == "set.partial":
        (target / "thesis.tex").write_text("years of work")
    (tmp_path / name).symlink_to(target)
    before = contents(target)
    assert main(arguments(tmp_path / "set")) == 1
    assert f"{tmp_path / name} is a link" in capsys.readouterr().err
    assert contents(target) == before and (tmp_path / name).is_symlink()


def test_a_replaced_directory_of_the_user_is_left_alone(source, tmp_path, capsys):
    out = tmp_path / "set"
    foreign(tmp_path / "set.replaced")
    words = ["pack", str(source), str(out), "--shards", "2"]
    assert main(words) == 0  # that name is not needed
    assert main([*words, "--seed", "1", "--overwrite"]) == 1
    assert "set.replaced holds thesis.tex" in capsys.readouterr().err
    assert contents(tmp_path / "set.replaced") == {"thesis.tex": b"years of work"}
    assert shards.open(out).index["options"]["seed"] == 0
    assert not (tmp_path / "set.partial").exists()


def test_overwrite_keeps_what_the_user_put_into_a_set(source, tmp_path, capsys):
    out = tmp_path / "set"
    words = ["pack", str(source), str(out), "--shards", "2"]
    assert main(words) == 0
    (out / "lfw.bin").write_bytes(b"pairs of lfw")
    (out / "notes.txt").write_text("mine")
    assert main([*words, "--seed", "1", "--overwrite"]) == 1
    assert "set holds notes.txt, which pack did not write" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    assert main([*words, "--seed", "1", "--overwrite"]) == 0
    assert (out / "lfw.bin").read_bytes() == b"pairs of lfw"
    assert [bin.name for bin in shards.open(out).bin_paths()] == ["lfw.bin"]
    assert MARKER not in contents(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "set"]


def test_finished_shards_of_other_options_are_not_removed_in_silence(slow_source, tmp_path, capsys):
    out = tmp_path / "set"
    kill_after(1, slow_source, out, "--resize", "--shards", "4", "--workers", "1")
    pack(slow_source, out, PackOptions(shards=2, resize=True))
    assert re.search(r"warning: \d shards? that a pack .* had finished", capsys.readouterr().err)


# --- a full disk ---


def test_a_writer_names_the_file_that_a_full_disk_refuses(tmp_path):
    (tmp_path / "x.rec").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*x\.rec'"),
        Writer(tmp_path / "x.idx", tmp_path / "x.rec") as writer,
    ):
        for key in range(100):
            writer.write(key, Header(0, 0, key, 0), encoded(key))
    (tmp_path / "y.idx").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*y\.idx'"),
        Writer(tmp_path / "y.idx", tmp_path / "y.rec") as writer,
    ):
        writer.write(0, Header(0, 0, 0, 0), b"image")
