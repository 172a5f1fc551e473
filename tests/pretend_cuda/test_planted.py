"""Bugs that the pretend device must see: a test of the tests beside it."""

from __future__ import annotations

import pytest

from tests.pretend_cuda import pool, scenes_planted
from tests.pretend_cuda.scenes_head import Way

STREAMED = Way(storage="host", sample_rate=1.0, in_backward=True)
STAGED = Way(storage="host")


@pytest.mark.parametrize("bug", scenes_planted.BUGS)
@pytest.mark.parametrize("method", scenes_planted.METHODS)
def test_a_bug_anywhere_in_a_forward_is_seen(method, bug):
    (places,) = pool.run(1, scenes_planted.num_places, method)
    assert places >= {"forward": 7, "_loss": 20}[method]
    assert pool.run(1, scenes_planted.everywhere, method, bug) == [[]]


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_sums_in_any_order_are_seen(form):
    (seen,) = pool.run(1, scenes_planted.atomic_sums, Way(form=form))
    assert any(text.startswith("non-deterministic operator: aten::index_add_") for text in seen)


@pytest.mark.parametrize("way", [STREAMED, STAGED], ids=["streamed", "staged"])
def test_copies_of_the_hosts_rows_are_clean(way):
    assert pool.run(2, scenes_planted.no_bug, way) == [[], []]


@pytest.mark.parametrize("bug", scenes_planted.COPY_BUGS)
def test_a_bug_in_the_copies_is_seen(bug):
    """By the second rank, whose device is not that on which a thread begins."""
    seen = [pool.run(2, scenes_planted.copy_bug, bug, way)[1] for way in (STREAMED, STAGED)]
    assert all(seen), seen
