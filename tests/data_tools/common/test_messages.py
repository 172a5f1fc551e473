"""Counts and sizes in messages."""

import pytest

from data_tools.common.messages import count, file_size


def test_count():
    assert [count(n, "fault") for n in (0, 1, 2)] == ["0 faults", "1 fault", "2 faults"]
    assert [count(n, "class", "classes") for n in (1, 7)] == ["1 class", "7 classes"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (51234, "51.2 kB"),
        (2_500_000, "2.5 MB"),
        (31_000_000_000, "31.0 GB"),
    ],
)
def test_file_size(num_bytes, text):
    assert file_size(num_bytes) == text
