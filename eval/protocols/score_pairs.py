"""Pairs of one set through a network: the result that the commands of pairs share.

Letters: P pairs, N images, D embedding size.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.messages import count
from eval import bootstrap, roc, verification
from eval.embedders.contract import InputContract
from eval.embedders.embedder import Embedder
from eval.embedders.extract import EmbeddingStore
from eval.protocols.pair_lists import ListedPairs
from eval.protocols.session import Session
from eval.report import results
from eval.report.results import Result

CHECKED = 150  # pairs of each kind on which another input contract is tried
INTERVAL_FARS = (1e-4, 1e-3)
THRESHOLD_UNIT = "squared L2 distance of unit embeddings, 0 to 4; accept where it is below"
ACCURACY = (
    "ten contiguous folds; same where the squared distance is strictly below the threshold; of "
    "0.00, 0.01 .. 3.99 the first with the highest accuracy on the other nine folds"
)


def verify(session: Session, pairs: ListedPairs, features: EmbeddingStore, protocol: str) -> Result:
    """Ten-fold accuracy, ROC, intervals and the hardest pairs of a set.

    Raises:
        ValueError: fewer than ten pairs, or only same or only different pairs.
    """
    warn_of_itself(session, pairs.name, int((pairs.first == pairs.second).sum()), "image")
    x = features.matrix(np.float64)
    distance = verification.pair_distances(x, pairs.first, pairs.second)
    norms = features.norms()  # [N, V]
    both = np.stack([pairs.first, pairs.second])
    facts = verification.evaluate_distances(distance, pairs.issame)
    right = verification.held_out_answers(facts, distance, pairs.issame)
    cosine = 1 - distance / 2
    points = roc.curve(cosine, pairs.issame)
    metrics = {
        "pairs": len(distance),
        "images": len(pairs.images),
        "missing": len(pairs.missing),
        "missing_pairs": list(pairs.missing),
        **facts,
        **results.pair_metrics(points),
        "balanced_accuracy": verification.balanced_accuracy(distance, pairs.issame),
        "xnorm": float(norms[both].mean()),
        "threshold_unit": THRESHOLD_UNIT,  # of best_thresholds and val_thresholds
        "intervals": _intervals(cosine, pairs.issame, right),
    }
    if features.flip and not session.adds_mirror():  # a client has what the image alone gives
        alone = features.alone().matrix(np.float64)
        apart = verification.pair_distances(alone, pairs.first, pairs.second)
        metrics["alone"] = results.alone_metrics(roc.curve(1 - apart / 2, pairs.issame))
    hard = results.hardest(cosine, pairs.issame)
    arrays = results.pair_arrays(points, cosine, pairs.issame, norms[both, 0].min(axis=0)) | {
        "hard_scores": cosine[hard],
        "hard_same": pairs.issame[hard],
        **session.pictures(pairs.images, both[:, hard].T),
    }
    contract = session.contract(
        pairs.images,
        score="cosine = 1 - d / 2, d the squared L2 distance of the L2-normalised embeddings",
        accuracy=ACCURACY,
        far_rules=results.RULES,
        interval=f"{bootstrap.LEVEL:.0%} percentile bootstrap over pairs, {bootstrap.RESAMPLES} "
        "resamples, same and different pairs apart",
    )
    return results.make(protocol, pairs.name, session.embedder.facts, contract, metrics, arrays)


def warn_of_itself(session: Session, name: str, pairs: int, what: str) -> None:
    """Says how many pairs compare an image or a template with itself: any network gets them."""
    if pairs:
        session.warn(
            f"{name}: {count(pairs, 'pair')} of one {what} with itself, whose score is 1 with any "
            f"network: leave such pairs out"
        )


def _intervals(
    cosine: NDArray, issame: NDArray[np.bool_], right: NDArray[np.bool_]
) -> dict[str, object] | None:
    if len(cosine) > bootstrap.MOST_PAIRS:
        return None
    found = bootstrap.intervals(cosine, issame, INTERVAL_FARS)
    return {
        "level": bootstrap.LEVEL,
        "accuracy": bootstrap.accuracy_interval(right, issame),
        "tar_at_far": {f"{x:g}": found["tar_at_far"][x] for x in INTERVAL_FARS},
        "eer": found["eer"],
        "auc": found["auc"],
    }


def set_warning(pairs: ListedPairs) -> str:
    """What makes the accuracy of this set another than it seems, in one line; empty if nothing."""
    num_same = int(pairs.issame.sum())
    num_different = len(pairs.issame) - num_same
    counts = f"{num_same} same and {num_different} different pairs"
    parts = [*pairs.notes]
    if pairs.missing:
        parts.append(
            f"{len(pairs.missing)} of {len(pairs.missing) + len(pairs.issame)} pairs left out; the "
            f"{counts} that remain make other folds than the protocol's, so the accuracy compares "
            "with no published one"
        )
    if results.is_uneven(num_same, num_different):
        about = "they are uneven" if pairs.missing else counts
        parts.append(f"{about}: the accuracy favours one answer, see the balanced accuracy")
    if pairs.missing:
        parts.append(f"the first left out: {pairs.missing[0]}")
    return f"{pairs.name}: {'; '.join(parts)}" if parts else ""


def contract_is_known(session: Session) -> bool:
    """Whether nobody can be wrong about it: a run, or our export fed as its metadata say."""
    metadata = session.embedder.facts.get("metadata")
    if not isinstance(metadata, dict):
        return files.is_dir(Path(session.args.model))
    return "mean" in metadata and InputContract.from_metadata(metadata) == session.embedder.contract


def contract_warning(session: Session, pairs: ListedPairs) -> str:
    """Whether these pairs verify better when the network is fed otherwise; empty if not.

    On CHECKED pairs of each kind, without the mirror image: RGB against BGR, and scaled pixels
    against plain ones. A difference in the separation d' of same and different pairs counts if
    99 % of resamples of the pairs have it.
    """
    from eval.embedders.images import Subset

    chosen = np.concatenate(
        [np.flatnonzero(kind)[:CHECKED] for kind in (pairs.issame, ~pairs.issame)]
    )
    numbers, place = np.unique([pairs.first[chosen], pairs.second[chosen]], return_inverse=True)
    some = Subset(pairs.images, numbers.tolist(), "input contract")
    first, second = place.reshape(2, -1)
    issame = pairs.issame[chosen]

    def score(embedder: Embedder) -> NDArray:
        found = session.features(some, False, embedder, alone=True)
        assert found is not None
        return 1 - verification.pair_distances(found.matrix(np.float64), first, second) / 2

    own = score(session.embedder)
    better = []
    for change, contract in session.embedder.contract.alternatives().items():
        other = score(session.embedder.with_contract(contract))
        if bootstrap.separates_better(own, other, issame):
            better.append((bootstrap.separation(other, issame), change))
    if not better:
        return ""
    gain, change = max(better)
    return (
        f"{pairs.name}: these pairs verify better with {change} (separation d' "
        f"{bootstrap.separation(own, issame):.2f} -> {gain:.2f} on {len(issame)} pairs); is the "
        f"input contract of the model right? Now it is {session.embedder.contract.text()}"
    )
