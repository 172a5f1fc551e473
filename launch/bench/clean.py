"""What purify finds in a set whose labels were spoiled on purpose, and what cleaning is worth.

    python launch/bench/clean.py WORK [--identities 500] [--steps 400]

Generated people; of the labels trained on, 20 % of the images get another person's and 10 % of the
people are put under a second one's label. Trains with three sub-centres, purifies, then trains with
one centre on the spoiled, the purified and the clean labels. Prints one JSON line: precision and
recall of what purify drops (wrong: the flipped images, and of two merged people the one with fewer
images left), and each accuracy on people held out.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from data_tools import relabel, shards
from data_tools.decisions import write_decision

_ROOT = Path(__file__).resolve().parents[2]
_FLIPPED, _MERGED = 0.2, 0.1  # share of the images, of the people
_IMAGES = 20  # of a person


def spoil(labels: np.ndarray, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Spoiled labels int64 [N], and which images are wrong under them, bool [N]."""
    random = np.random.default_rng(seed)
    chosen = random.permutation(num_classes)[: 2 * round(num_classes * _MERGED / 2)]
    label_of = np.arange(num_classes)
    label_of[chosen[1::2]] = chosen[::2]  # whose label each person bears
    spoiled = label_of[labels]
    flipped = random.random(len(labels)) < _FLIPPED
    others = random.integers(1, num_classes, len(labels))
    spoiled[flipped] = label_of[(labels[flipped] + others[flipped]) % num_classes]
    wrong = spoiled != label_of[labels]  # a flip may end with the one who shares the label
    for one, other in zip(chosen[::2], chosen[1::2], strict=True):
        both = [np.flatnonzero((labels == who) & ~wrong) for who in (one, other)]
        wrong[min(both, key=len)] = True
    return spoiled, wrong


def run(*words: object, env: dict[str, str] | None = None) -> dict:
    """Run a command of ours; what it prints as its last line, if that is JSON."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=_ROOT, check=True, stdout=subprocess.PIPE,
        text=True, env={"OMP_NUM_THREADS": "1", **os.environ, **(env or {})},
    )  # fmt: skip
    last = (done.stdout.splitlines() or [""])[-1]
    return json.loads(last) if last.startswith("{") else {}


def train(data: Path, out: Path, steps: int, num_subcenters: int) -> float:
    """Train the demo's recipe; the accuracy on the people held out, in percent."""
    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "launch/train.py",
        "launch/configs/demo.py", f"rec={data}", "val_targets=heldout", f"output={out}",
        f"max_steps={steps}", f"num_subcenters={num_subcenters}", f"verify_every={steps}",
        f"checkpoint_every={steps}",
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (
        100
        * [x["verification"]["heldout"]["accuracy_mean"] for x in lines if "verification" in x][-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="a new directory for everything")
    parser.add_argument("--identities", type=int, default=500, help="a fifth is held out (500)")
    parser.add_argument("--steps", type=int, default=400, help="of each training (400)")
    parser.add_argument("--threshold", type=float, default=75.0, help="degrees (75)")
    args = parser.parse_args()
    work = args.work.resolve()
    faces, data, features = work / "faces", work / "shards", work / "features"
    command = ("-m", "data_tools")
    run(*command, "synthesize", faces, "--identities", args.identities, "--images", _IMAGES)
    held = args.identities // 5
    run(*command, "pack", faces, data, "--shards", 4, "--hold-out", held, "--pairs", 1000)
    whole = shards.open(data)
    spoiled, wrong = spoil(whole.labels, whole.num_classes, seed=0)
    write_decision(work / "spoiled.txt", whole, spoiled)
    accuracy = {"clean": train(data, work / "clean", args.steps, 1)}
    run(*command, "relabel", data, work / "spoiled.txt")
    accuracy["spoiled"] = train(data, work / "spoiled", args.steps, 1)
    accuracy["spoiled, 3 sub-centres"] = train(data, work / "subcenter", args.steps, 3)
    run(*command, "embed", data, work / "subcenter", features)
    purify = (*command, "purify", data, work / "subcenter", features, work / "purified.txt")
    done = run(*purify, "--threshold", args.threshold, "--report", work / "report", "--json")
    dropped = np.zeros(len(whole), bool)
    found = relabel.read(work / "purified.txt")
    dropped[found.images[found.classes == relabel.DROP]] = True
    run(*command, "relabel", data, work / "purified.txt")
    accuracy["purified"] = train(data, work / "purified", args.steps, 1)
    result = {
        "images": len(whole),
        "wrong": int(wrong.sum()),
        "dropped": int(dropped.sum()),
        "precision": float(wrong[dropped].mean()),
        "recall": float(dropped[wrong].mean()),
        "accuracy": accuracy,
        "angle_histogram_5_degrees": done["angle_histogram_5_degrees"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
