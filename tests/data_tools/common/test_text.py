"""Text files as people have them."""

import pytest

from data_tools.common.errors import UserError
from data_tools.common.text import read_lines, read_text


@pytest.mark.parametrize(
    "content", [b"a\tb\nc\n", b"\xef\xbb\xbfa\tb\r\nc\r\n", b"a\tb  \rc\r\r\n \n"]
)
def test_lines(tmp_path, content):
    (tmp_path / "l.txt").write_bytes(content)
    assert read_lines(tmp_path / "l.txt") == ["a\tb", "c"]


def test_an_empty_file_and_one_of_a_mark_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf\n")
    assert read_lines(tmp_path / "a") == read_lines(tmp_path / "b") == []


@pytest.mark.parametrize("mark", ["utf-16", "utf-16-be"])
def test_utf16_is_named(tmp_path, mark):
    text = "\ufeffa b" if mark == "utf-16-be" else "a b"
    (tmp_path / "l").write_bytes(text.encode(mark))
    with pytest.raises(UserError, match="l is UTF-16 text: save it as UTF-8"):
        read_text(tmp_path / "l")


def test_other_bytes_are_named_with_their_line(tmp_path):
    (tmp_path / "l").write_bytes(b"a\nb\nM\xfcller")
    with pytest.raises(UserError, match="line 3: byte 0xfc"):
        read_text(tmp_path / "l")
