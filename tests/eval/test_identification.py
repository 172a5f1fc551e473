"""Against a loop that ranks one probe at a time, as the corrected IJB 1:N evaluation does."""

import numpy as np
import pytest

from eval import identification


def plain(gallery, gallery_ids, probes, probe_ids, fpirs=(0.01, 0.1)):
    """The rule for a gallery with one template per subject."""
    ranks, mated, rival, strangers = [], [], [], []
    for probe, subject in zip(probes, probe_ids, strict=True):
        scores = gallery @ probe
        order = np.argsort(-scores, kind="stable")
        if subject not in gallery_ids:
            strangers.append(scores.max())
            continue
        own = list(gallery_ids).index(subject)
        ranks.append(list(order).index(own))
        mated.append(scores[own])
        rival.append(max(np.delete(scores, own)))
    ranks, mated, rival = map(np.array, (ranks, mated, rival))
    strangers = sorted(strangers, reverse=True)
    result = {f"rank{k}": np.mean(ranks < k) for k in (1, 5, 10)}
    for x in fpirs:
        threshold = strangers[max(int(len(strangers) * x) - 1, 0)]
        result[x] = np.mean((mated > rival) & (mated > threshold))
    return result


def templates(seed, num_gallery=60, num_probes=400, dim=12, noise=1.0):
    """A gallery of the subjects 0 .. G - 1, and probes of 0 .. 2G - 1: about half are mated."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2 * num_gallery, dim))
    ids = rng.integers(0, 2 * num_gallery, num_probes)
    gallery = centres[:num_gallery] + noise * rng.normal(size=(num_gallery, dim))
    probes = centres[ids] + noise * rng.normal(size=(num_probes, dim))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (gallery, probes)]
    order = rng.permutation(num_gallery)
    return unit[0][order], np.arange(num_gallery)[order], unit[1], ids


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_plain_rule(seed):
    gallery, gallery_ids, probes, probe_ids = templates(seed, noise=[0.4, 0.8, 1.2][seed % 3])
    result = identification.evaluate(gallery, gallery_ids, probes, probe_ids)
    expected = plain(gallery, gallery_ids, probes, probe_ids)
    for key in ("rank1", "rank5", "rank10"):
        assert result[key] == expected[key]
    for x in (0.01, 0.1):
        assert result["tpir_at_fpir"][x] == expected[x]
    mated = int(np.isin(probe_ids, gallery_ids).sum())
    assert result["counts"] == {
        "gallery": 60,
        "probes": 400,
        "mated": mated,
        "nonmated": 400 - mated,
    }


def test_chunks_do_not_change_the_numbers(monkeypatch):
    data = templates(1)
    whole = identification.evaluate(*data)
    for budget in (1, 60 * 8 * 7, 60 * 8 * 399):
        monkeypatch.setattr(identification, "CHUNK_BYTES", budget)
        chunked = identification.evaluate(*data)
        thresholds = chunked.pop("threshold_at_fpir")
        assert thresholds == pytest.approx(whole["threshold_at_fpir"], rel=1e-12)
        assert chunked == {k: v for k, v in whole.items() if k != "threshold_at_fpir"}


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    import tracemalloc

    rng = np.random.default_rng(0)
    gallery, probes = rng.normal(size=(500, 4)), rng.normal(size=(20000, 4))
    monkeypatch.setattr(identification, "CHUNK_BYTES", 1 << 20)
    tracemalloc.start()
    identification.evaluate(gallery, np.arange(500), probes, np.arange(20000) % 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # the whole similarity matrix is 76 MiB


def test_by_hand():
    gallery = np.eye(3)
    probes = [
        [0.9, 0.0, 0.1],  # "a": right, 0.9
        [0.6, 0.5, 0.0],  # "b": second place
        [0.0, 0.0, 0.3],  # "c": right, but below the threshold at FPIR 0.1
        [0.0, 0.4, 0.0],  # a stranger at 0.4
        [0.2, 0.1, 0.0],  # a stranger at 0.2
    ]
    result = identification.evaluate(gallery, ["a", "b", "c"], probes, ["a", "b", "c", "x", "y"])
    assert result["rank1"] == pytest.approx(2 / 3)
    assert result["rank5"] == 1.0
    assert result["threshold_at_fpir"] == {0.01: 0.4, 0.1: 0.4}
    assert result["tpir_at_fpir"][0.1] == pytest.approx(1 / 3)


def test_equal_scores_count_as_failures_of_tpir_and_by_order_in_ranks():
    gallery = np.ones((4, 2))  # a network that says the same of everybody
    result = identification.evaluate(gallery, [0, 1, 2, 3], np.ones((5, 2)), [0, 1, 2, 3, 9])
    assert result["rank1"] == 0.25
    assert result["tpir_at_fpir"] == {0.01: 0.0, 0.1: 0.0}
    for subject, rank1 in ((0, 1.0), (3, 0.0)):  # the earlier template comes first
        result = identification.evaluate(gallery, [0, 1, 2, 3], np.ones((1, 2)), [subject])
        assert result["rank1"] == rank1
    # A mated score that equals the threshold is not above it.
    result = identification.evaluate(np.eye(2), [0, 1], np.eye(2), [0, 9])
    assert result["tpir_at_fpir"][0.1] == 0.0


def test_several_templates_of_a_subject_count_by_their_best():
    gallery = [[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]
    result = identification.evaluate(gallery, [7, 8, 7], [[0.0, 0.2], [1, 0]], [9, 7])
    assert result["rank1"] == 1.0
    assert result["tpir_at_fpir"][0.01] == 1.0  # the other template of 7 is no rival


def test_closed_set_has_ranks_and_no_tpir():
    result = identification.evaluate(np.eye(3), [0, 1, 2], np.eye(3), [0, 1, 2])
    assert result["rank1"] == 1.0
    assert result["tpir_at_fpir"] == {0.01: None, 0.1: None}


@pytest.mark.parametrize(
    "gallery, gallery_ids, probes, probe_ids, message",
    [
        (np.eye(3), [0, 1], np.eye(3), [0, 1, 2], "gallery must be .* with \\[2\\] ids"),
        (np.eye(3), [0, 1, 2], np.ones(3), [0], "probes must be"),
        (np.eye(3), [0, 1, 2], np.eye(2), [0, 1], "3 columns, probes have 2"),
        (np.eye(3), [0, 1, 2], np.eye(3), [3, 4, 5], "none of the 3 probes"),
        (np.zeros((0, 3)), [], np.eye(3), [3, 4, 5], "gallery must be"),
        (
            np.eye(3),
            [0, 1, 2],
            np.diag([1, np.nan, 1]),
            [0, 1, 2],
            "probes: template 1 contains NaN",
        ),
    ],
)
def test_refuses(gallery, gallery_ids, probes, probe_ids, message):
    with pytest.raises(ValueError, match=message):
        identification.evaluate(gallery, gallery_ids, probes, probe_ids)
