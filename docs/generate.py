"""Write the generated tables into the pages of docs/, between their markers.

python docs/generate.py            write them
python docs/generate.py --check    exit 1 if a page is not current
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from data_tools.common import schema
from launch.planner import scale_table
from recognition.config import Config
from recognition.losses.__main__ import markdown as losses_table

DOCS = Path(__file__).parent
TABLES = {  # name of the marker -> (page, what makes the table)
    "keys": ("training.md", lambda: schema.markdown(Config)),
    "losses": ("losses.md", losses_table),
    "memory": ("head.md", scale_table.memory),
    "wire": ("head.md", scale_table.wire),
}


def current(name: str) -> tuple[Path, str]:
    """The page of a table, and its text with the table as the code has it now."""
    page, make = TABLES[name]
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- generated: {name} -->", "<!-- end -->"
    found = re.search(f"{re.escape(start)}.*?{re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"{path}: no marker {start}")
    return path, text[: found.start()] + f"{start}\n{make()}\n{end}" + text[found.end() :]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name in TABLES:
        path, text = current(name)
        if path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'not current' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
