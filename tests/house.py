"""The measures of the house: lines, files a folder, import circles, longest functions, README.

    python tests/house.py           for a person
    python tests/house.py --json    one JSON line

A room is a folder of a package; the files at a package's top level are the room named after the
package. Imports inside functions count.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_tools", "eval", "recognition", "launch")
# The one import against the order: a file, and the module that it imports by name.
DOOR = ("data_tools/common/networks.py", "recognition.weights.networks")
# Files at recognition's top level that stand above its rooms, and are a room of their own.
FACES = ("recognition.convert", "recognition.optim")


def files(root: Path = ROOT) -> list[Path]:
    """The Python files of the packages that git knows or would add, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    found = {Path(line) for line in listed.splitlines() if (root / line).is_file()}
    return sorted(path for path in found if path.parts[0] in (*PACKAGES, "tests"))


def room(module: str) -> str:
    """The room of a module or of a file's dotted name: at most its first two parts."""
    if module in FACES:
        return module
    parts = module.split(".")
    place = ROOT.joinpath(*parts[:2])
    return ".".join(parts[:2]) if len(parts) > 1 and place.is_dir() else parts[0]


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, by import_module() too."""
    found = set()
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                place = root.joinpath(*name.split("."))
                is_module = place.is_dir() or place.with_suffix(".py").is_file()
                found.add(name if is_module else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """The rooms that each room imports, the named door apart.

    Entry points (`__main__`) belong to no room.
    """
    graph: dict[str, set[str]] = defaultdict(set)
    for path in files(root):
        if path.parts[0] in PACKAGES and path.name != "__main__.py":
            own = room(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
            names = {name for name in imports(path, root) if (str(path), name) != DOOR}
            graph[own] |= {room(name) for name in names} - {own}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of rooms that reach one another."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in graph.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        tuple(sorted({name} | {other for other in reach[name] if name in reach.get(other, ())}))
        for name in graph
        if name in reach[name]
    }
    return sorted(map(list, groups))


def functions(path: Path) -> list[tuple[int, str]]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def measure() -> dict[str, Any]:
    lines = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in files()}
    ours = {path: count for path, count in lines.items() if path.parts[0] != "tests"}
    by_package: Counter[str] = Counter()
    by_folder: Counter[str] = Counter()
    for path, count in lines.items():
        by_package[path.parts[0]] += count
    for path in ours:
        by_folder[str(path.parent)] += path.name not in ("__init__.py", "__main__.py")
    names = Counter((path.parts[0], path.name) for path in ours if path.name[:2] != "__")
    graph = arrows()
    return {
        "lines": dict(sorted(by_package.items())),
        "lines_outside_tests": sum(ours.values()),
        "files": len(ours),
        "median_file": statistics.median(ours.values()),
        "files_by_folder": dict(by_folder.most_common()),
        "names_twice": sorted(f"{a}: {b}" for (a, b), count in names.items() if count > 1),
        "arrows": {name: sorted(to) for name, to in sorted(graph.items())},
        "circles": circles(graph),
        "longest_functions": sorted((f for path in ours for f in functions(path)), reverse=True)[
            :8
        ],
        "format_skips": sum((ROOT / path).read_text().count("# fmt: skip") for path in ours),
        "readme_bytes": (ROOT / "README.md").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    found = measure()
    if parser.parse_args().json:
        print(json.dumps(found))
        return
    print("lines by package      ", ", ".join(f"{k} {v}" for k, v in found["lines"].items()))
    print("lines outside tests   ", found["lines_outside_tests"])
    print("files, median length  ", found["files"], found["median_file"])
    print("README bytes          ", found["readme_bytes"])
    print("# fmt: skip           ", found["format_skips"])
    print("names twice           ", ", ".join(found["names_twice"]) or "none")
    print("arrows between rooms  ", sum(map(len, found["arrows"].values())))
    print("circles between rooms ", "; ".join(map(" <-> ".join, found["circles"])) or "none")
    print("the named door        ", " -> ".join(DOOR))
    print("files a folder:")
    for folder, count in found["files_by_folder"].items():
        print(f"  {count:3}  {folder}")
    print("longest functions:")
    for count, name in found["longest_functions"]:
        print(f"  {count:3}  {name}")


if __name__ == "__main__":
    main()
