"""Absent is told from unreadable, and a name never holds half a file."""

import errno
import os
import subprocess
import sys

import pytest

from data_tools.common import files


def test_absent_is_no_error(tmp_path):
    (tmp_path / "f").write_text("x")
    assert files.is_file(tmp_path / "f") and not files.is_dir(tmp_path / "f")
    assert files.is_dir(tmp_path) and not files.is_file(tmp_path)
    for absent in (tmp_path / "none", tmp_path / "f" / "below"):
        assert not files.exists(absent) and not files.is_dir(absent)
        assert files.names(absent) == []
    assert files.names(tmp_path) == ["f"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_an_io_error_is_not_absence(tmp_path, monkeypatch, code):
    def fail(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "stat", fail)
    monkeypatch.setattr(os, "listdir", fail)
    for look in (files.exists, files.is_file, files.is_dir, files.names):
        with pytest.raises(OSError, match="ckpt") as caught:
            look("ckpt")
        assert caught.value.errno == code


def test_a_failed_write_keeps_what_was_there(tmp_path):
    target = tmp_path / "a.json"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.replacing(target) as file:
        file.write(b"half of the ne")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    files.write_text(target, "new\r\n", permissions=0o600)
    assert target.read_bytes() == b"new\r\n" and target.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_names_the_file_that_was_asked_for():
    with pytest.raises(OSError, match="No space left on device: '/dev/full/x'|Not a directory"):
        files.write_text("/dev/full/x", "x")


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    code = (
        "import os, sys; from data_tools.common.files import replacing\n"
        "with replacing(sys.argv[1]) as file: file.write(b'x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.onnx"], check=False)
    assert len(os.listdir(tmp_path)) == 1 and not (tmp_path / "m.onnx").exists()
    files.write_bytes(tmp_path / "m.onnx", b"whole")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_what_shows_people_is_its_owners_alone(tmp_path):
    files.make_private(tmp_path / "a" / "b")
    files.make_private(tmp_path / "a" / "b")  # it is there
    files.write_private(tmp_path / "a" / "b" / "x.png", b"face")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == files.PRIVATE_DIRECTORY
    assert (tmp_path / "a" / "b" / "x.png").stat().st_mode & 0o777 == files.PRIVATE_FILE
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x.png"]
    (tmp_path / "open").mkdir(mode=0o755)
    files.make_private(tmp_path / "open")  # the user's own choice stays
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o755
