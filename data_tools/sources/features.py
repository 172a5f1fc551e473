"""The names of the classes, as the features of a Hugging Face data set state them.

`datasets` writes them as JSON into the schema of every parquet file, and as YAML into README.md.
"""

import json
import re
from pathlib import Path
from typing import Any

from data_tools.common import files, text
from data_tools.common.errors import UserError

_README = "README.md"
_KEY = b"huggingface"
_LINE = re.compile(r"^( *)(- )?(?:'([^']*)'|\"([^\"]*)\"|([^\s:#][^:#]*?))\s*:\s*(.*?)\s*$")


def class_names(schema: Any, label: str, path: Path) -> list[str] | None:
    """The name of each class; None if nothing states them.

    schema: the Arrow schema of a file. path: of the set, whose README.md is read.

    Raises: UserError: the features are damaged, or a name cannot stand on a line.
    """
    stated = (schema.metadata or {}).get(_KEY)
    names: list[str] | None = None
    if stated is not None:
        try:
            names = json.loads(stated)["info"]["features"][label].get("names")
        except (ValueError, KeyError, TypeError, AttributeError):
            names = None
    if names is None and files.is_file(path / _README):
        names = _of_readme(text.read_text(path / _README), label)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: the names of the classes in its features are not texts")
    if broken := [name for name in names if "\n" in name or "\r" in name]:
        raise UserError(f"{path}: a line break in the name of a class: {broken[0]!r}")
    return names


def _of_readme(readme: str, label: str) -> list[str] | None:
    """The names under features, `- name: LABEL`, class_label, names in the header of README.md.

    `'0': anna` states a number and a name. The part of YAML that `datasets` writes is read.
    """
    head = re.match(r"---\n(.*?)\n---", readme, re.S)
    if head is None:
        return None
    inside = False  # the feature of the label
    names: dict[int, str] | None = None
    depth = 0  # of the line `names:`
    for line in head[1].split("\n"):
        found = _LINE.match(line)
        if found is None:
            continue
        indent = len(found[1])
        key = next(part for part in found.groups()[2:5] if part is not None)
        value = _unquoted(found[6])
        if names is not None:
            if indent <= depth or not key.isdigit():
                break
            names[int(key)] = value
        elif found[2] and key == "name":
            inside = value == label
        elif inside and key == "names":
            names, depth = {}, indent
    if not names or sorted(names) != list(range(len(names))):
        return None
    return [names[k] for k in range(len(names))]


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == "'":
        return value[1:-1].replace("''", "'")
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value
