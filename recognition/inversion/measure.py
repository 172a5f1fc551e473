"""How good the faces of an inversion are: under the network itself, under others, as images.

All measurements are on the PNG files: 8 bits, clipped.

Letters: n synthesised faces, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recognition.inversion import faces, metrics, pictures
from recognition.inversion.plan import InversionPlan
from recognition.inversion.prior import BnPrior
from recognition.weights.networks import open_embedder

_OF_EACH = 8  # images whose mean stands for a class under another network, at most
_REFERENCE = 10000  # real images of a Frechet distance, at most
_CHUNK = 256  # images that are read at once


class InvertedImages:
    """The synthesised faces of a plan [n], read from their files on demand."""

    def __init__(self, plan: InversionPlan, out: Path) -> None:
        names = plan.names
        self.paths = [out / "images" / f"{names[int(i)]}.png" for i in plan.ids]

    def pixels(self, paths: Sequence[Path]) -> np.ndarray:
        return np.stack([pictures.read(path) for path in paths])

    def embed(self, embed: faces.Embed) -> np.ndarray:
        chunks = [self.paths[i : i + _CHUNK] for i in range(0, len(self.paths), _CHUNK)]
        rows = [embed(self.pixels(chunk)) for chunk in chunks]
        return faces.finite(np.concatenate(rows), "of {}", self.paths)


def measure(
    plan: InversionPlan, made: InvertedImages, others: Sequence[str], fid: str | None
) -> dict[str, Any]:
    """The numbers of a finished run, for report.json."""
    own = metrics.likeness(made.embed(plan.embedder), plan.gallery(), plan.ids)
    report: dict[str, Any] = {
        "under_itself": own | {"network": plan.embedder.facts["path"]},
        "under_others": [under_other_network(plan, made, path) for path in others],
        "bn_distance": bn_distances(plan, made),
    }
    if fid is not None:
        report["fid"] = fid_of(plan, made, fid)
    return report


def under_other_network(plan: InversionPlan, made: InvertedImages, path: str) -> dict[str, Any]:
    """`metrics.likeness` under a network that was not inverted.

    Its gallery is the same people: the mean embedding of some images of a class, or the image that
    a target was computed from.
    """
    embedder = open_embedder(path)
    if plan.faces is None:
        return {
            "network": path,
            "not_measured": "it needs images of the same people: --data (the shards that the run "
            "was trained on) or, with --embeddings, --images (the images of the embeddings)",
        }
    kept, ids = np.full(len(plan.ids), True), plan.ids
    if plan.numbers is None:
        num_classes = sum(len(block) for block in plan.gallery())
        gallery = faces.means(plan.faces, embedder, num_classes, _OF_EACH)
        seen = (gallery != 0).any(axis=1)  # a class may have no image
        kept = seen[ids]
        if not kept.any():
            told = f"{plan.faces.path} has no image of any of these classes"
            return {"network": path, "not_measured": told}
        gallery, ids = gallery[seen], (np.cumsum(seen) - 1)[ids[kept]]
        told = f"means of up to {_OF_EACH} images of each class of {plan.faces.path}"
    else:
        gallery = plan.faces.embed(embedder, plan.numbers)
        told = f"the images of {plan.faces.path} that the targets were computed from"
    found = metrics.likeness(made.embed(embedder)[kept], [gallery], ids)
    return found | {"network": path, "gallery_of": told, "without_images": int((~kept).sum())}


@torch.no_grad()
def bn_distances(plan: InversionPlan, made: InvertedImages) -> dict[str, Any] | None:
    """The BatchNorm term of full batches of synthesised and of real images; None if the network has
    no BatchNorm."""
    prior = BnPrior(plan.embedder.module, plan.settings.bn_form)
    try:
        if not prior.layers:
            return None

        def of(pixels: np.ndarray) -> float:
            images = plan.embedder.prepare(pixels)
            if images.dtype == torch.uint8:  # on a GPU the floats are made there
                images = plan.embedder._floats(images.to(plan.embedder.device))
            plan.embedder.module(images)
            return float(prior.take())

        size = max(map(len, plan.batches))
        whole = [batch for batch in plan.batches if len(batch) == size]
        places = {int(i): at for at, i in enumerate(plan.ids)}
        values = []
        for batch in whole:
            values.append(of(made.pixels([made.paths[places[int(i)]] for i in batch])))
        found: dict[str, Any] = {"synthesised": float(np.mean(values))}
        found |= {"batches": len(whole), "batch_size": size}
        if plan.faces is not None:
            numbers = plan.faces.of_each(1)
            drawn = np.random.default_rng(plan.settings.seed).permutation(numbers)[:size]
            found |= {"real": of(plan.faces.pixels(drawn)), "real_images": len(drawn)}
        return found
    finally:
        prior.remove()


def fid_of(plan: InversionPlan, made: InvertedImages, path: str) -> dict[str, Any]:
    """The Frechet distance of the synthesised to real images, in the features of a network."""
    if plan.faces is None:
        return {"network": path, "not_measured": "it needs real images: --data"}
    embed = open_embedder(path)
    everyone = np.sort(plan.faces.of_each(len(plan.faces)))
    if len(everyone) > _REFERENCE:
        generator = np.random.default_rng(plan.settings.seed)
        everyone = np.sort(generator.choice(everyone, _REFERENCE, replace=False))
    mine, real = made.embed(embed), plan.faces.embed(embed, everyone)
    found: dict[str, Any] = {"network": path, "features": mine.shape[1]}
    found |= {"images": len(mine), "real_images": len(real)}
    if len(mine) < 2:
        return found | {"not_measured": "one image has no covariance"}
    generator = np.random.default_rng(plan.settings.seed)
    found["distance"] = metrics.frechet_distance(mine, real)
    if len(real) >= 2 * len(mine):  # the same distance between real images
        order = generator.permutation(len(real))
        few, rest = real[order[: len(mine)]], real[order[len(mine) :]]
        found["distance_of_as_many_real_images"] = metrics.frechet_distance(few, rest)
    if len(mine) <= mine.shape[1]:
        found["note"] = (
            f"{len(mine)} images for {mine.shape[1]} features: a covariance of rank "
            f"{len(mine) - 1}, the distance is biased upwards; compare with as many images only"
        )
    return found


def sentences(report: dict[str, Any]) -> list[str]:
    """The report in a few lines of text."""
    lines = [_likeness("under the network itself", report["under_itself"])]
    lines += [_likeness(f"under {found['network']}", found) for found in report["under_others"]]
    if (bn := report["bn_distance"]) is None:
        lines.append("BatchNorm distance: the network has no BatchNorm")
    else:
        real = f", {bn['real']:.4g} for as many real images" if "real" in bn else ""
        lines.append(f"BatchNorm distance {bn['synthesised']:.4g}{real}")
    if found := report.get("fid"):
        told = found.get("not_measured") or (
            f"{found['distance']:.4g} ({found['images']} against {found['real_images']} images)"
        )
        if "distance_of_as_many_real_images" in found:
            told += f", {found['distance_of_as_many_real_images']:.4g} for as many real ones"
        lines.append(f"Frechet distance {told}" + (f"; {found['note']}" if "note" in found else ""))
    return lines


def _likeness(where: str, found: dict[str, Any]) -> str:
    if "not_measured" in found:
        return f"{where}: not measured, {found['not_measured']}"
    line = (
        f"{where}: cosine to the target {found['cosine_mean']:.3f}, nearest of "
        f"{found['gallery']} in {100 * found['identity_rate']:.1f} % "
        f"(chance {100 * found['chance']:.2g} %: {found['times_chance']:.0f} x)"
    )
    left_out = found.get("without_images")
    return line + (f"; {left_out} classes have no image and were left out" if left_out else "")
