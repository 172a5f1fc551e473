"""What the tests of the evaluation share."""

import pickle

import pytest

from tests.eval.made import tinted


@pytest.fixture(scope="module")
def bin_file(tmp_path_factory):
    images, labels = [], []
    for i in range(60):
        other = i if i % 2 == 0 else i + 2
        images += [tinted(i, 0), tinted(other, 1)]
        labels.append(i % 2 == 0)
    path = tmp_path_factory.mktemp("sets") / "colors.bin"
    path.write_bytes(pickle.dumps((images, labels)))
    return path
