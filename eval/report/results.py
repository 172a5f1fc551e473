"""What an evaluation found, as files that a report can be drawn from without the network.

A result is NAME.json (model, contract, numbers) and NAME.HASH.npz beside it (what the figures need:
curves at a few thousand points, histograms, pictures of the hardest pairs), small whatever the
number of pairs was. The JSON names the .npz by its SHA-256, so the two are always of one
evaluation: a run that is killed between them leaves the result before. They may show people, so
only their owner may read them.

Letters: P pairs, U distinct scores, H hard pairs.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import read_json
from eval import roc

FORMAT = 1
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RULES = {
    "insightface": "TAR of the ROC point whose FAR is nearest the target (it may exceed it), after "
    "collinear points are dropped as scikit-learn does; of equally near ones the larger FAR",
    "strict": "the largest TAR with FAR <= target; accept where score >= threshold",
}
ALONE, FLIP_SUM = "e(image) alone", "e(image) + e(mirror image)"  # what is compared
CURVE_POINTS = 1500
BINS = 120
REJECT_FAR = 1e-3  # at whose threshold errors are counted while images of low norm are rejected

UNEVEN = 1.5  # same to different pairs, or the reverse: beyond it the accuracy misleads


class Result(NamedTuple):
    facts: dict[str, Any]  # of the JSON
    arrays: dict[str, NDArray]  # of the .npz

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def metrics(self) -> dict[str, Any]:
        return self.facts["metrics"]


def make(
    protocol: str,
    name: str,
    model: Mapping[str, object],
    contract: Mapping[str, object],
    metrics: Mapping[str, object],
    arrays: Mapping[str, NDArray],
) -> Result:
    facts = {
        "format": FORMAT,
        "protocol": protocol,
        "name": name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": dict(model),
        "contract": dict(contract),
        "metrics": dict(metrics),
    }
    return Result(facts, dict(arrays))


def pair_metrics(points: roc.Curve) -> dict[str, Any]:
    """Rates and thresholds of scored pairs; a FAR finer than one false accept is named so."""
    tar, far, threshold = roc.points_on(points, FARS)
    nearest = roc.tar_on(points, FARS)
    return {
        "same": points.num_same,
        "different": points.num_different,
        "auc": roc.area_of(points),
        "eer": roc.eer_of(points),
        "operating_points": [
            {
                "far_target": x,
                "tar_insightface": float(nearest[i]),
                "tar": float(tar[i]),
                "far": float(far[i]),
                "threshold": float(threshold[i]) if np.isfinite(threshold[i]) else None,
                "resolved": bool(x * points.num_different >= 1),
            }
            for i, x in enumerate(FARS)
        ],
    }


def alone_metrics(points: roc.Curve) -> dict[str, Any]:
    """The operating points of e(image) alone, beside those of e(image) + e(mirror image).

    A graph gives e(image) unless it was exported with the mirror image, and its scores are others.
    """
    return {"flip": ALONE, "operating_points": pair_metrics(points)["operating_points"]}


def pair_arrays(
    points: roc.Curve, scores: NDArray, issame: NDArray, quality: NDArray | None = None
) -> dict[str, NDArray]:
    """The ROC thinned out, histograms of the scores, and, with the quality [P] of each pair (the
    smaller norm of its two), the errors that stay when pairs of low quality are rejected."""
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    far, tar, threshold = thinned(points)
    arrays = {
        "far": far,
        "tar": tar,
        "threshold": threshold,
        "edges": edges,
        "same": np.histogram(scores[issame], edges)[0],
        "different": np.histogram(scores[~issame], edges)[0],
    }
    if quality is not None:
        arrays["rejected"], arrays["fnmr"], arrays["fmr"] = rejection(
            scores, issame, quality, float(roc.points_on(points, [REJECT_FAR])[2][0])
        )
    return arrays


def rejection(
    scores: NDArray, issame: NDArray, quality: NDArray, threshold: float, steps: int = 41
) -> tuple[NDArray, NDArray, NDArray]:
    """(share rejected, FNMR, FMR) [steps]: the threshold stays, the lowest quality goes first."""
    order = np.argsort(quality, kind="stable")
    same = issame[order]
    accepted = scores[order] >= threshold
    left = [np.cumsum((kind)[::-1])[::-1] for kind in (same, ~same)]
    wrong = [np.cumsum(kind[::-1])[::-1] for kind in (same & ~accepted, ~same & accepted)]
    start = np.minimum(np.linspace(0, 0.8, steps) * len(order), len(order) - 1).astype(int)
    rates = [w[start] / np.maximum(n[start], 1) for w, n in zip(wrong, left, strict=True)]
    return start / len(order), rates[0], rates[1]


def hardest(scores: NDArray, issame: NDArray, most: int = 12) -> NDArray[np.int64]:
    """[H]: the different pairs of the highest scores, then the same pairs of the lowest."""
    chosen = []
    for kind, sign in ((~issame, -1), (issame, 1)):
        of_kind = np.flatnonzero(kind)
        value = sign * scores[of_kind]
        some = np.argpartition(value, min(most, len(value)) - 1)[:most] if len(value) else value
        chosen.append(of_kind[some[np.argsort(value[some], kind="stable")].astype(int)])
    return np.concatenate(chosen)


def save(directory: str | Path, result: Result) -> Path:
    """Write the result, whole or not at all; one of the same protocol and name is replaced.

    The JSON takes its name last, and with it the result; then the arrays before are removed.
    """
    directory = Path(directory)
    files.make_private(directory)
    stem = re.sub(r"[^\w.+-]+", "_", f"{result.facts['protocol']}-{result.name}")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **result.arrays)  # type: ignore[arg-type]
    content = buffer.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    data, path = directory / f"{stem}.{sha256[:16]}.npz", directory / f"{stem}.json"
    facts = result.facts | {"arrays": {"file": data.name, "sha256": sha256}}
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    files.write_bytes(data, content, files.PRIVATE_FILE)
    files.write_text(path, text, files.PRIVATE_FILE)
    own = re.compile(re.escape(stem) + r"(\.[0-9a-f]{16})?\.npz")
    for name in files.names(directory):
        if own.fullmatch(name) and name != data.name:
            (directory / name).unlink(missing_ok=True)
    return path


def load_all(directory: str | Path) -> list[Result]:
    """The results in a directory, by name.

    Raises:
        FileNotFoundError: none there.
        ValueError: a damaged one, or of another format.
    """
    found = []
    for path in files.ending(directory, ".json"):
        facts = read_json(path, "evaluate again")
        if not isinstance(facts, dict) or "protocol" not in facts:
            continue
        if facts.get("format") != FORMAT:
            raise UserError(f"{path}: format {facts.get('format')!r}, not {FORMAT}; evaluate again")
        arrays = _arrays_of(path, facts)
        del facts["arrays"]
        found.append(Result(facts, arrays))
    if not found:
        raise FileNotFoundError(
            f"{directory}: no results; evaluate first, e.g. python -m eval lfw RUN lfw.bin"
        )
    return found


def _arrays_of(path: Path, facts: Mapping[str, Any]) -> dict[str, NDArray]:
    """Those that were written with the JSON at `path`. Raises: ValueError if they are not there."""
    try:
        data = path.parent / Path(facts["arrays"]["file"]).name
        sha256 = facts["arrays"]["sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not say which arrays are its own: evaluate again") from error
    try:
        content = files.read_bytes(data)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{data} is not what {path.name} was written with; evaluate again")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except FileNotFoundError as error:
        raise UserError(f"{data} is absent, {path.name} needs it; evaluate again") from error


def thinned(points: roc.Curve) -> tuple[NDArray, NDArray, NDArray]:
    """(FAR, TAR, threshold): points of the ROC that show its shape on linear and on log axes."""
    last = len(points.fp) - 1
    if last < CURVE_POINTS:
        chosen = np.arange(last + 1)
    else:
        counts = np.geomspace(1, points.num_different, CURVE_POINTS // 3)
        misses = points.num_same - np.geomspace(1, points.num_same, CURVE_POINTS // 3)
        chosen = np.concatenate(
            [
                np.searchsorted(points.fp, counts, side="right") - 1,
                np.searchsorted(points.tp, misses),
                np.searchsorted(points.tp, np.linspace(0, points.num_same, CURVE_POINTS // 3)),
            ]
        )
        chosen = np.unique(np.clip(chosen, 0, last))
    fp, tp, threshold = (np.asarray(part)[chosen] for part in points)
    return fp / points.num_different, tp / points.num_same, threshold.astype(np.float64)


def is_uneven(num_same: int, num_different: int) -> bool:
    return max(num_same, num_different) > UNEVEN * min(num_same, num_different)
