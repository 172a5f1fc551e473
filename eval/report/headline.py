"""What a report says first: one sentence and three numbers, of the first set that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.report import tables
from eval.report.results import Result


class Headline(NamedTuple):
    sentence: str
    numbers: list[tuple[str, str]]  # three of (value, what it is)


def headline(models: Mapping[str, Sequence[Result]]) -> Headline | None:
    """Of the model with the best first number; None where no result has a sentence."""
    found = []
    for model, results in models.items():
        of_model = next((made for r in results if (made := _of(model, r)) is not None), None)
        if of_model is not None:
            found.append(of_model)
    if not found:
        return None
    _, best = max(found, key=lambda entry: entry[0])
    return best


def _of(model: str, result: Result) -> tuple[float, Headline] | None:
    metrics = result.metrics
    if "operating_points" in metrics:
        return _of_pairs(model, result, metrics)
    if "galleries" in metrics and "all" in metrics:
        return _of_search(model, result, metrics["all"])
    return None


def _of_pairs(model: str, result: Result, metrics: Mapping[str, Any]) -> tuple[float, Headline]:
    point = operating_point(metrics)
    tar, far = tables.percent(point["tar"]), f"{point['far_target']:g}"
    at_far = (tar, f"TAR at FAR {far}")
    threshold = "none" if point["threshold"] is None else f"{point['threshold']:.4f}"
    decision = (threshold, f"threshold of FAR {far}")
    pairs = metrics["same"] + metrics["different"]
    if "accuracy_mean" in metrics:
        accuracy = f"{100 * metrics['accuracy_mean']:.2f} ± {100 * metrics['accuracy_std']:.2f} %"
        sentence = (
            f"{model} is right on {accuracy} of the {pairs} pairs of {result.name} (mean and "
            f"standard deviation of ten folds) and accepts {tar} of the pairs of one person at a "
            f"FAR of {far}."
        )
        return metrics["accuracy_mean"], Headline(
            sentence, [(accuracy, "accuracy"), at_far, decision]
        )
    sentence = (
        f"On {result.name}, {model} accepts {tar} of the {metrics['same']} pairs of one person at "
        f"a FAR of {far}, measured on {metrics['different']} pairs of different people."
    )
    eer = (tables.percent(metrics["eer"]), "equal error rate")
    return point["tar"], Headline(sentence, [at_far, eer, decision])


def _of_search(
    model: str, result: Result, found: Mapping[str, Any]
) -> tuple[float, Headline] | None:
    ranks = [key for key in found if key.startswith("rank")]
    rates = [(fpir, rate) for fpir, rate in found["tpir_at_fpir"].items() if rate is not None]
    if len(ranks) < 2 or not rates or found[ranks[0]] is None:
        return None
    first = tables.percent(found[ranks[0]])
    fpir, rate = rates[0]
    sentence = (
        f"On {result.name}, {model} finds the right person first for {first} of the probes, and "
        f"identifies {tables.percent(rate)} of them at an FPIR of {fpir}."
    )
    numbers = [
        *((tables.percent(found[key]), f"rank {key[4:]}") for key in ranks[:2]),
        (tables.percent(rate), f"TPIR at FPIR {fpir}"),
    ]
    return float(found[ranks[0]]), Headline(sentence, numbers)


def operating_point(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The point of FAR 1e-4, or of the finest FAR above it that the different pairs can show."""
    points = sorted(metrics["operating_points"], key=lambda point: point["far_target"])
    fine = [p for p in points if p["far_target"] >= 1e-4 and p["resolved"]]
    return fine[0] if fine else points[-1]
