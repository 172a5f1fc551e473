"""What the tests of packing share."""

import pytest

from tests.data_tools.samples import folder


@pytest.fixture
def source(tmp_path):
    """Seven identities, 31 images."""
    return folder(tmp_path / "faces", [5, 2, 7, 1, 4, 9, 3])
