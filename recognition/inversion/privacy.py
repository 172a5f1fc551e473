"""How well embeddings give back a face that passes for their owner: a privacy report.

Each image's embedding is inverted, and the face that comes out is compared as a stolen template
would be used (arXiv:1703.00832): with the embedding itself ("same image", type I) and with
another image of the same person ("other image", type II).

Letters: n inverted embeddings, N real images, D embedding size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.embedders.embedder import Embedder
from recognition.inversion import metrics
from recognition.inversion.measure import made_of
from recognition.inversion.plan import Plan
from recognition.weights.networks import open_embedder

_MOST = 3000  # images, or embeddings, whose pairs set the thresholds


def threshold_at(impostors: np.ndarray, far: float) -> float | None:
    """The score above which a share `far` of impostor scores lies at most; None where fewer than
    one of them may: so few cannot show it."""
    allowed = int(far * len(impostors) + 1e-9)
    if allowed < 1:
        return None
    # Of those that may pass the last one's successor must not: score > it is accepted.
    place = len(impostors) - 1 - allowed
    return float(np.partition(impostors, place)[place]) if place >= 0 else -np.inf


def measure(plan: Plan, out: Path, others: list[str], fars: list[float]) -> dict[str, Any]:
    """The report's numbers: under the network itself, then under each of the others."""
    made = made_of(plan, out)
    targets = np.concatenate(list(plan.gallery()))
    networks: list[tuple[str, Embedder]] = [("itself", plan.embedder)]
    networks += [("another", open_embedder(path)) for path in others]
    numbers, mates = _crowd(plan)
    found = []
    for role, network in networks:
        entry: dict[str, Any] = {"network": network.facts["path"], "role": role}
        if role == "itself":
            same = targets
        elif plan.faces is None or plan.numbers is None:
            found.append(entry | {"not_measured": "it needs the images: --data"})
            continue
        else:
            same = plan.faces.embed(network, plan.numbers)
        entry |= metrics.likeness(made.embed(network), [same], plan.ids)
        entry |= _at_thresholds(
            plan, network, metrics.unit(made.embed(network)), metrics.unit(same), numbers, mates,
            fars,
        )  # fmt: skip
        found.append(entry)
    return {"images": len(plan.ids), "under": found}


def _crowd(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(real images [N] that set the thresholds, for each inverted one another image of the same
    person or -1 [n])."""
    assert plan.labels is not None
    if plan.faces is None or plan.numbers is None:
        return np.zeros(0, np.int64), np.full(len(plan.ids), -1)
    label_of, mates = plan.faces.labels, np.full(len(plan.ids), -1)
    for at, i in enumerate(plan.ids):
        own = plan.numbers[i]
        alike = np.flatnonzero(label_of == label_of[own])
        alike = alike[alike != own]
        if len(alike):
            mates[at] = alike[0]
    everyone = plan.faces.of_each(2)
    if len(everyone) > _MOST:
        generator = np.random.default_rng(plan.settings.seed)
        everyone = np.sort(generator.choice(everyone, _MOST, replace=False))
    return np.union1d(everyone, mates[mates >= 0]), mates


def _at_thresholds(
    plan: Plan, network: Embedder, made: np.ndarray, same: np.ndarray, numbers: np.ndarray,
    mates: np.ndarray, fars: list[float],
) -> dict[str, Any]:  # fmt: skip
    """The shares that a system with a threshold at each FAR lets pass."""
    assert plan.labels is not None
    if plan.faces is None:
        drawn = np.random.default_rng(plan.settings.seed).permutation(len(same))[:_MOST]
        crowd, labels = same[drawn], plan.labels[drawn]
    else:
        crowd = metrics.unit(plan.faces.embed(network, numbers))
        labels = plan.faces.labels[numbers]
    scores = crowd @ crowd.T
    first, second = np.triu_indices(len(crowd), 1)
    pair, alike = scores[first, second], labels[first] == labels[second]
    impostors, genuine = pair[~alike], pair[alike]
    own = np.einsum("nd,nd->n", made, same[plan.ids])
    has = mates >= 0
    other = np.einsum("nd,nd->n", made[has], crowd[np.searchsorted(numbers, mates[has])]) \
        if has.any() else np.zeros(0)  # fmt: skip
    points = []
    for far in fars:
        threshold = threshold_at(impostors, far)
        point: dict[str, Any] = {"far": far, "threshold": threshold}
        if threshold is None:
            point["not_measured"] = f"{len(impostors)} pairs of different people cannot show it"
        else:
            point["same_image"] = float((own > threshold).mean())
            if len(other):
                point["other_image"] = float((other > threshold).mean())
            if len(genuine):
                point["real_photographs"] = float((genuine > threshold).mean())
        points.append(point)
    return {
        "impostor_pairs": len(impostors),
        "with_another_image": int(has.sum()),
        "points": points,
    }


def sentences(report: dict[str, Any]) -> list[str]:
    """The report in short lines."""
    lines = [
        f"{report['images']} embeddings inverted. Share of the synthesised faces that pass for the "
        "person, where a false accept is as rare as the FAR:"
    ]
    for found in report["under"]:
        role = "the network itself" if found["role"] == "itself" else found["network"]
        if "not_measured" in found:
            lines.append(f"  {role}: not measured, {found['not_measured']}")
            continue
        lines.append(
            f"  {role}: cosine to the same image {found['cosine_mean']:.3f}, it is the nearest of "
            f"{found['gallery']} in {100 * found['identity_rate']:.1f} % "
            f"(chance {100 * found['chance']:.2g} %)"
        )
        for point in found["points"]:
            if "not_measured" in point:
                lines.append(f"    FAR {point['far']:g}: {point['not_measured']}")
                continue
            told = [f"against the same image {100 * point['same_image']:.1f} %"]
            if "other_image" in point:
                told.append(f"another image of the person {100 * point['other_image']:.1f} %")
            if "real_photographs" in point:
                told.append(f"real photographs {100 * point['real_photographs']:.1f} %")
            lines.append(f"    FAR {point['far']:g}: {', '.join(told)}")
    return lines
