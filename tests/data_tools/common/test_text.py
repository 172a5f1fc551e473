"""Text files as people have them."""

import pytest

from data_tools.common.errors import UserError
from data_tools.common.text import read_json, read_lines, read_text


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


def test_json_as_people_have_it(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1,\r\n 2]")
    assert read_json(tmp_path / "a.json") == [1, 2]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is empty"),
        (b"[1, 2", "line 1 column 6"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_what_is_not_json_is_named(tmp_path, content, fault):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json is damaged: not JSON: .*{fault}.*; write it anew"):
        read_json(tmp_path / "a.json", "write it anew")
