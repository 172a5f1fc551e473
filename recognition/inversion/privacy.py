"""How often a face that was made from an embedding passes for its owner: a privacy report.

Each image's embedding is inverted, and the face is tested as an attacker with a stolen template
would use it (arXiv:1703.00832): against the embedding itself ("same image", type I) and against
another image of the same person ("other image", type II).

Letters: n inverted embeddings, N real images, D embedding size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.embedders.embedder import Embedder
from recognition.inversion import metrics
from recognition.inversion.measure import InvertedImages
from recognition.inversion.plan import InversionPlan
from recognition.weights.networks import open_embedder

_MOST = 3000  # images, or embeddings, whose pairs set the thresholds


def threshold_at(impostors: np.ndarray, far: float) -> float | None:
    """The threshold that a share `far` of the impostor scores passes at most; None if they are too
    few for one of them to pass."""
    allowed = int(far * len(impostors) + 1e-9)
    if allowed < 1:
        return None
    # The score next below those that may pass: only scores above the threshold are accepted.
    place = len(impostors) - 1 - allowed
    return float(np.partition(impostors, place)[place]) if place >= 0 else -np.inf


def measure(
    plan: InversionPlan, made: InvertedImages, others: list[str], fars: list[float]
) -> dict[str, Any]:
    """The report's numbers: under the network itself, then under each of the others."""
    networks: list[tuple[str, Embedder]] = [("itself", plan.embedder)]
    networks += [("another", open_embedder(path)) for path in others]
    numbers, mates = _real_images(plan)
    found = []
    for role, network in networks:
        entry: dict[str, Any] = {"network": network.facts["path"], "role": role}
        if role == "itself":
            targets = np.concatenate(list(plan.gallery()))
        elif plan.faces is None or plan.numbers is None:
            found.append(entry | {"not_measured": "it needs the images: --data"})
            continue
        else:
            targets = plan.faces.embed(network, plan.numbers)
        synthesised = made.embed(network)
        entry |= metrics.likeness(synthesised, [targets], plan.ids)
        x, targets = metrics.unit(synthesised), metrics.unit(targets)
        real, labels = _real_embeddings(plan, network, targets, numbers)
        same_person = labels[:, None] == labels
        scores, pairs = real @ real.T, np.triu_indices(len(real), 1)
        other_image = np.zeros(0)
        if len(has := np.flatnonzero(mates >= 0)):
            rows = real[np.searchsorted(numbers, mates[has])]
            other_image = np.einsum("nd,nd->n", x[has], rows)
        impostors = scores[pairs][~same_person[pairs]]
        accepted = {
            "same_image": np.einsum("nd,nd->n", x, targets[plan.ids]),
            "other_image": other_image,
            "real_photographs": scores[pairs][same_person[pairs]],
        }
        entry |= {
            "impostor_pairs": len(impostors),
            "with_another_image": len(has),
            "points": [_at_far(far, impostors, accepted) for far in fars],
        }
        found.append(entry)
    return {"images": len(plan.ids), "under": found}


def _real_images(plan: InversionPlan) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the real images [N] that set the thresholds, another image of the person of each
    inverted embedding, or -1 [n])."""
    mates = np.full(len(plan.ids), -1)
    if plan.faces is None or plan.numbers is None:
        return np.zeros(0, np.int64), mates
    labels = plan.faces.labels
    for at, number in enumerate(plan.numbers[plan.ids]):
        images = np.flatnonzero(labels == labels[number])
        mates[at] = next((image for image in images if image != number), -1)
    chosen = np.sort(plan.faces.of_each(2))
    if len(chosen) > _MOST:
        generator = np.random.default_rng(plan.settings.seed)
        chosen = generator.choice(chosen, _MOST, replace=False)
    return np.union1d(chosen, mates[mates >= 0]), mates


def _real_embeddings(
    plan: InversionPlan, network: Embedder, targets: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(unit embeddings [N, D], labels [N]) whose pairs set the thresholds; without images, some of
    the targets."""
    assert plan.labels is not None
    if plan.faces is None:
        drawn = np.random.default_rng(plan.settings.seed).permutation(len(targets))[:_MOST]
        return targets[drawn], plan.labels[drawn]
    return metrics.unit(plan.faces.embed(network, numbers)), plan.faces.labels[numbers]


def _at_far(far: float, impostors: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """The shares of the scores that pass the threshold at this FAR."""
    threshold = threshold_at(impostors, far)
    point: dict[str, Any] = {"far": far, "threshold": threshold}
    if threshold is None:
        why = f"{len(impostors)} pairs of different people cannot show it"
        return point | {"not_measured": why}
    passed = {name: float((own > threshold).mean()) for name, own in scores.items() if len(own)}
    return point | passed


def sentences(report: dict[str, Any]) -> list[str]:
    """The report in a few lines of text."""
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
