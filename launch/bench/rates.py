"""The rates of some runs, from their metrics.jsonl: one JSON line.

    python launch/bench/rates.py RUN...

The median over the log steps but the first, in which libraries choose and compile.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

_KEYS = ("images_per_second", "data_wait")


def main(runs: list[str]) -> int:
    if not runs or runs[0].startswith("-"):
        print(__doc__)
        return 0 if runs else 2
    rates = {}
    for run in runs:
        path = Path(run) / "metrics.jsonl"
        if not path.exists():
            print(f"error: {path}: no such file; name the output of a run", file=sys.stderr)
            return 1
        records = [json.loads(line) for line in path.read_text().splitlines()]
        logged = [record for record in records if "images_per_second" in record]
        if not logged:
            print(f"error: {path} has no log step yet", file=sys.stderr)
            return 1
        rates[Path(run).name] = {
            key: statistics.median(record[key] for record in logged[1:] or logged)
            for key in _KEYS
            if key in logged[0]
        }
    print(json.dumps(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
