"""A directory that cannot be listed is an error, and is never an empty one."""

from __future__ import annotations

import errno
import os

import pytest

from data_tools.common import files


def test_what_is_there_is_found(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x.bin", "y.rec", "a/z.bin", "a/b/.bin"):
        (tmp_path / name).write_bytes(b"")
    assert files.ending(tmp_path, ".bin") == [tmp_path / "x.bin"]
    assert files.ending(tmp_path / "absent", ".bin") == []
    found = {str(path.relative_to(tmp_path)) for path in files.below(tmp_path)}
    assert found == {"x.bin", "y.rec", "a/z.bin", "a/b/.bin"}


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_listed_is_an_error(tmp_path, monkeypatch, error):
    (tmp_path / "a").mkdir()
    real_scan, real_list = os.scandir, os.listdir

    def refuse(real):
        def call(path):
            if os.fspath(path) == str(tmp_path / "a"):
                raise OSError(error, os.strerror(error), str(path))
            return real(path)

        return call

    monkeypatch.setattr(os, "scandir", refuse(real_scan))
    monkeypatch.setattr(os, "listdir", refuse(real_list))
    for listing in (
        lambda: files.ending(tmp_path / "a", ".bin"),
        lambda: list(files.below(tmp_path)),
    ):
        with pytest.raises(OSError, match=str(tmp_path / "a")) as caught:
            listing()
        assert caught.value.errno == error
