"""What must hold after any fault, whatever the command was."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.faults import positions
from tests.faults.shim import Call, Outcome, Position, Worker

Files = dict[str, bytes]  # path below a directory -> content


class Fault(NamedTuple):
    """A run with a fault, between two looks at the files."""

    position: Position
    outcome: Outcome
    before: Files
    after: Files
    known: bool  # whether the next run is one that was judged: it starts from the same files


class Scene(NamedTuple):
    """A command on a prepared directory, and the judgement of what a fault left."""

    command: str
    arguments: list[object]
    template: pathlib.Path  # copied to the worker's root before each run
    judge: Callable[[Fault], Iterable[str]]  # what is wrong; it may run commands again


def prepare(worker: Worker, scene: Scene) -> Files:
    """The root as the template is; its files."""
    shutil.rmtree(worker.root)
    shutil.copytree(scene.template, worker.root, symlinks=True)
    return files(worker.root)


def record(worker: Worker, scene: Scene) -> Outcome:
    prepare(worker, scene)
    outcome = worker.run(scene.command, *scene.arguments, record=True)
    assert outcome.code == 0, outcome.said
    return outcome


def recorded(worker: Worker, scene: Scene) -> list[Call]:
    """The calls that every run of the scene makes."""
    return positions.calls(*(record(worker, scene).calls for _ in range(2)))


def assert_survived(worker: Worker, scene: Scene, chosen: list[Position]) -> None:
    """Run the scene with a fault at each position, one at a time, and judge what it left."""
    wrong = failures(worker, scene, chosen)
    assert not wrong, f"{len(wrong)} of {len(chosen)} positions:\n" + "\n".join(wrong)


def assert_each_kind_survived(
    worker: Worker, scene: Scene, seen: set[tuple[str, str]] | None = None
) -> None:
    """As assert_survived(), at one position of each kind that is not in `seen`, which grows."""
    kinds = set() if seen is None else seen
    assert_survived(worker, scene, positions.one_of_a_kind(recorded(worker, scene), kinds))


def failures(worker: Worker, scene: Scene, chosen: list[Position]) -> list[str]:
    """Run the scene with a fault at each position; what is wrong afterwards, a line each."""
    found, judged = [], set()
    for position in chosen:
        before = prepare(worker, scene)
        outcome = worker.run(scene.command, *scene.arguments, position=position)
        if not outcome.reached:
            found.append(f"{position}: not reached, exit code {outcome.code}: {_short(outcome)}")
            continue
        judged.add(_state(before))  # of which the next run is the undisturbed one
        after = files(worker.root)
        fault = Fault(position, outcome, before, after, _state(after) in judged)
        wrong = [*_wrong_words(fault, worker.root), *scene.judge(fault)]
        if wrong:
            found.append(f"{position}: {'; '.join(wrong)} | {_short(outcome)}")
        else:
            judged.add(_state(after))
    return found


def _state(found: Files) -> str:
    """A hash of the files. What a lock file says of its last holder has no effect."""
    state = hashlib.sha256()
    for path, content in found.items():
        if not path.endswith(".lock"):
            state.update(f"{path}\0{len(content)}\0".encode() + content)
    return state.hexdigest()


def _wrong_words(fault: Fault, root: pathlib.Path) -> list[str]:
    """The exit code and what was said: an error is one line that names the path."""
    position, (code, said, *_) = fault.position, fault.outcome
    if code is None:
        return ["it hangs"]
    if position.action == "k":
        return [] if code == -9 else [f"exit code {code} of a killed process"]
    wrong = []
    if "Traceback" in said:
        wrong.append("a traceback")
    if code < 0:
        wrong.append(f"died of signal {-code}")
    if code > 0:
        if not re.search(r"^error", said, re.MULTILINE):
            wrong.append("no line begins with error")
        if not names(said, root / position.call.path):
            wrong.append("the error does not name the path")
    return wrong


def names(said: str, path: pathlib.Path) -> bool:
    """Whether a text names a path: itself, or, of a file that is written under another name first,
    its final name or directory."""
    final = pathlib.Path(*(_final(part) for part in path.parts))
    accepted = [path, path.with_name(final.name), final]
    if final != path or path.name == "journal":
        accepted.append(final.parent)
    return any(
        re.search(re.escape(str(each)).replace(re.escape("#"), r"\d+") + r"(?![\w.-]*\w)", said)
        for each in accepted
    )


def _final(part: str) -> str:
    """The name that a partial file or directory will have."""
    part = re.sub(r"^\.(.+?)\.[^.]+-#\.partial$", r"\1", part)
    return re.sub(r"(\.former|\.removed)?\.(partial|new|tmp)$|\.#(-#)?\.partial$", "", part)


def files(directory: pathlib.Path) -> Files:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def below(found: Files, directory: str) -> Files:
    """Those in a directory, by their paths below it."""
    return {
        path.removeprefix(directory + "/"): content
        for path, content in found.items()
        if path.startswith(directory + "/")
    }


def differences(one: Files, other: Files) -> list[str]:
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def complete_checkpoints(found: Files, run: str) -> dict[str, int]:
    """Directory name -> step, of those whose files are all what their manifests say."""
    steps = {}
    for path, content in below(found, f"{run}/checkpoints").items():
        name, _, file = path.partition("/")
        if file != "manifest.json":
            continue
        try:
            manifest = json.loads(content)
            entries, step = manifest["files"], manifest["step"]
        except (ValueError, KeyError):
            continue
        own = below(found, f"{run}/checkpoints/{name}")
        if all(
            hashlib.sha256(own.get(each, b"")).hexdigest() == entry["sha256"]
            for each, entry in entries.items()
        ):
            steps[name] = step
    return steps


def _short(outcome: Outcome) -> str:
    lines = [line for line in outcome.said.splitlines() if line.strip() and "━" not in line]
    return " / ".join(line[:220] for line in lines[-3:])
