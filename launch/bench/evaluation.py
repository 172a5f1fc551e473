"""`python launch/bench/evaluation.py`: what an evaluation costs, against the plain algorithms.

The baseline is plain_metrics.py, the field's own scripts written plainly; both run here, one
after the other, on the same generated features, so what counts is the ratio. One JSON line, with
the targets beside the figures. Peak memory is that of a process of its own for each side.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from launch.bench import plain_metrics

FACES, TEMPLATES, PAIRS, SAME, DIM = 469_375, 23_124, 15_658_489, 19_557, 512
PROBES, GALLERIES = 19_593, (1772, 1759)
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TARGETS = {
    "ijbc_seconds": 10.0,
    "ijbc_gib": 3.0,
    "ijbc_ratio": 8.0,
    "search_seconds": 3.0,
    "ten_fold_ratio": 50.0,
    "extraction_share": 0.95,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="share of IJB-C's size, default 1"
    )
    parser.add_argument("--network", default="r18", help="of the extraction, default r18")
    parser.add_argument("--images", type=int, default=256, help="of the extraction, default 256")
    args = parser.parse_args()
    ours, plain = (_alone(side, args.scale) for side in (_ijbc_ours, _ijbc_plain))
    for key in ("tars", "strict"):
        np.testing.assert_allclose(ours[key], plain[key], rtol=0, atol=1e-6)
    figures: dict[str, Any] = {
        "scale": args.scale,
        "ijbc_seconds": ours["seconds"],
        "ijbc_parts": ours["parts"],
        "ijbc_gib": ours["gib"],
        "ijbc_plain_seconds": plain["seconds"],
        "ijbc_plain_gib": plain["gib"],
        "ijbc_ratio": plain["seconds"] / ours["seconds"],
        **_alone(_search, args.scale),
        **_alone(_ten_fold, args.scale),
        **_alone(_extraction, (args.network, args.images)),
    }
    figures["targets"] = TARGETS
    figures["met"] = {
        key: figures[key] <= limit if key.endswith(("seconds", "gib")) else figures[key] >= limit
        for key, limit in TARGETS.items()
    }
    print(json.dumps(figures))


def _alone(function: Callable, argument: Any) -> dict[str, Any]:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


def _ijbc(scale: float) -> tuple[Any, ...]:
    """Features of faces around the centres of people, ids, media, scores, pairs."""
    faces, num, pairs = (max(100, int(x * scale)) for x in (FACES, TEMPLATES, PAIRS))
    rng = np.random.default_rng(0)
    template = np.sort(np.concatenate([np.arange(num), rng.integers(0, num, faces - num)]))
    media = template * 100 + rng.integers(0, 6, faces)
    features = np.empty((faces, DIM), dtype=np.float32)
    people = max(2, num // 6)
    person = rng.integers(0, people, num)
    centre = rng.standard_normal((people, DIM), dtype=np.float32)
    for start in range(0, faces, 20_000):
        some = slice(start, min(start + 20_000, faces))
        noise = rng.standard_normal((some.stop - start, DIM), dtype=np.float32)
        features[some] = centre[person[template[some]]] + 3 * noise
    first, second = rng.integers(0, num, (2, pairs)).astype(np.int32)
    same = min(pairs // 2, max(10, int(SAME * scale)))
    order = np.argsort(person, kind="stable")
    place = rng.integers(0, num - 1, same)  # neighbours in that order: mostly one person
    first[:same], second[:same] = order[place], order[place + 1]
    labels = person[first] == person[second]
    return features, template, media, rng.random(faces), first, second, labels


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _ijbc_ours(scale: float) -> dict[str, Any]:
    from eval import roc, templates

    features, template, media, score, first, second, labels = _ijbc(scale)
    clock = [time.perf_counter()]
    ids, pooled = templates.pool(features, template, media, score)
    unit = templates.normalised(pooled)
    clock.append(time.perf_counter())
    rows = (np.searchsorted(ids, side).astype(np.int32) for side in (first, second))
    values = templates.pair_scores(unit, *rows)
    clock.append(time.perf_counter())
    points = roc.curve(values, labels)
    tars, strict = roc.tar_on(points, FARS), roc.tar_on(points, FARS, "strict")
    clock.append(time.perf_counter())
    parts = dict(zip(("pool", "scores", "rules"), np.diff(clock).tolist(), strict=True))
    return {
        "seconds": clock[-1] - clock[0],
        "parts": parts,
        "gib": _peak_gib(),
        "tars": tars,
        "strict": strict,
    }


def _ijbc_plain(scale: float) -> dict[str, Any]:
    features, template, media, score, first, second, labels = _ijbc(scale)
    began = time.perf_counter()
    ids, pooled = plain_metrics.pool(features * score[:, None], template, media)
    values = plain_metrics.scores(ids, pooled, first, second)
    tars, strict = plain_metrics.tars(labels, values, FARS)
    return {
        "seconds": time.perf_counter() - began,
        "gib": _peak_gib(),
        "tars": tars,
        "strict": strict,
    }


def _search(scale: float) -> dict[str, Any]:
    from eval import identification

    rng = np.random.default_rng(0)
    sizes = [max(10, int(x * scale)) for x in GALLERIES]
    people = sum(sizes)
    probe_ids = rng.integers(0, people, max(50, int(PROBES * scale)))
    centre = rng.normal(size=(people, DIM))

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    gallery, probes = unit(centre), unit(centre[probe_ids] + 2 * rng.normal(size=(1, DIM)))
    probes = unit(probes + 0.05 * rng.normal(size=probes.shape))
    parts = [slice(0, sizes[0]), slice(sizes[0], None)]
    ids = np.arange(people)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ours = [identification.evaluate(gallery[x], ids[x], probes, probe_ids) for x in parts]
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    theirs = [plain_metrics.search(gallery[x], ids[x], probes, probe_ids) for x in parts]
    of_plain = time.perf_counter() - began
    for one, other in zip(ours, theirs, strict=True):
        assert one["rank1"] == other["rank1"] and one["tpir_at_fpir"][0.01] == other[0.01]
    median = statistics.median(seconds)
    return {
        "search_seconds": median,
        "search_plain_seconds": of_plain,
        "search_ratio": of_plain / median,
    }


def _ten_fold(scale: float) -> dict[str, Any]:
    from eval import verification

    rng = np.random.default_rng(0)
    num = max(100, int(6000 * min(scale * 10, 1)))
    issame = np.arange(num) // (num // 20) % 2 == 0
    first = rng.normal(size=(num, DIM))
    second = np.where(issame[:, None], first, rng.normal(size=(num, DIM)))
    second = second + 2 * rng.normal(size=second.shape)
    embeddings = np.stack([first, second], axis=1).reshape(-1, DIM)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)

    def times(function: Callable, repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    mean, std, folds, _, value, far = plain_metrics.evaluate(embeddings, issame)
    ours = verification.evaluate(embeddings, issame)
    np.testing.assert_allclose(ours["fold_accuracy"], folds, rtol=0, atol=1e-12)
    found = [ours[key] for key in ("accuracy_mean", "accuracy_std", "val_mean", "val_far_mean")]
    np.testing.assert_allclose(found, [mean, std, value, far], rtol=0, atol=1e-12)
    whole = times(lambda: verification.evaluate(embeddings, issame), 9)
    folds_alone = times(lambda: verification.evaluate_distances(distance, issame), 9)
    return {
        # Embeddings in, accuracy, VAL and ROC out; then the same without VAL's loops in the
        # baseline, and from distances that are there already.
        "ten_fold_ratio": times(lambda: plain_metrics.evaluate(embeddings, issame), 3) / whole,
        "ten_fold_seconds": whole,
        "ten_fold_ratio_without_val": times(lambda: plain_metrics.ten_fold(embeddings, issame), 3)
        / whole,
        "ten_fold_ratio_of_distances": times(lambda: plain_metrics.ten_fold_of(distance, issame), 3)
        / folds_alone,
    }


def _extraction(what: tuple[str, int]) -> dict[str, Any]:
    """The rate of images through `extract`, decoding and all, over that of the bare forward."""
    import torch

    from data_tools.synthetic import generate
    from eval.embedders import extract
    from eval.embedders.images import Encoded
    from recognition.backbones import BACKBONES
    from recognition.weights.networks import TorchEmbedder

    network, num = what
    module = BACKBONES[network](embedding_size=DIM).eval()
    embedder = TorchEmbedder(module, {"path": network}, "none", 64)
    images = Encoded("bench", [generate.encode(0, k // 8, k % 8) for k in range(num)])
    x = embedder.prepare(np.stack([images[i] for i in range(64)]))
    shares, rates = [], []
    for _ in range(5):
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(2 * (num // 64)):
                embedder.module(x)
        bare = 2 * (num // 64) * 64 / (time.perf_counter() - began)
        began = time.perf_counter()
        extract.extract(embedder, images, batch_size=64, place=extract.ImagePlace())
        rates.append(2 * num / (time.perf_counter() - began))
        shares.append(rates[-1] / bare)
    return {
        "extraction_network": network,
        "extraction_share": statistics.median(shares),
        "extraction_images_per_second": statistics.median(rates),
    }


if __name__ == "__main__":
    main()
