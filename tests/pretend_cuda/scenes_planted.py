"""Bugs planted into the product, which the pretend device must see."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch

from recognition.head import async_copy, chunks, partial_fc
from recognition.head.kernels import fused
from recognition.head.partial_fc import PartialFC
from tests.pretend_cuda import scenes_head
from tests.pretend_cuda.scenes_head import Way

BUGS = {
    "synchronisation": "float(local_x.detach().sum())",
    "mix": "local_x.detach() + torch.zeros(len(local_x), local_x.shape[1])",
}
# local_x goes by another name in what forward() calls.
METHODS = {"forward": "local_x", "_loss": "x"}


def num_places(method: str) -> int:
    """How many statements of a method of PartialFC there are, each with a place before it."""
    return len(list(_blocks(_tree(method))))


def everywhere(method: str, bug: str) -> list[int]:
    """The places of a method at which the planted bug is not seen in a step."""
    missed = []
    for place in range(num_places(method)):
        with _replaced(PartialFC, method, _compiled(method, place, bug)):
            seen = scenes_head.steps([("arcface", Way())])
        said = [text for texts in seen.values() for text in texts]
        wanted = {"synchronisation": "host synchronisation", "mix": "tensors on several devices"}
        if not any(wanted[bug] in text for text in said):
            missed.append(place)
    return missed


def _tree(method: str) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(getattr(PartialFC, method)))
    node = ast.parse("from __future__ import annotations\n" + source).body[1]
    assert isinstance(node, ast.FunctionDef)
    return node


def _blocks(node: ast.AST) -> Iterator[tuple[list[ast.stmt], int]]:
    """(block, place in it) of every statement of a function that runs in a step of ArcFace, without
    those of functions in it, and of what only raises."""
    for block in (getattr(node, "body", []), getattr(node, "orelse", [])):
        if not isinstance(block, list) or any(isinstance(s, ast.Raise) for s in block):
            continue
        for place, statement in enumerate(block):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            yield block, place
            if isinstance(statement, (ast.With, ast.If)) and not _never_runs(statement):
                yield from _blocks(statement)


def _never_runs(statement: ast.stmt) -> bool:
    """A branch that ArcFace's plain step does not take."""
    if not isinstance(statement, ast.If):
        return False
    said = ast.unparse(statement.test)
    return said.split(" is ")[0] in ("local_features", "class_values", "term")


def _compiled(method: str, place: int, bug: str) -> Callable:
    tree = copy.deepcopy(_tree(method))
    block, at = list(_blocks(tree))[place]
    text = BUGS[bug].replace("local_x", METHODS[method])
    block.insert(at, ast.parse(text).body[0])
    module = ast.Module([ast.parse("from __future__ import annotations").body[0], tree], [])
    scope: dict[str, Any] = dict(vars(partial_fc))
    exec(compile(ast.fix_missing_locations(module), partial_fc.__file__, "exec"), scope)
    return scope[method]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    old = owner.__dict__[name]
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def atomic_sums(way: Way) -> list[str]:
    """What is seen where rows of one class are summed as index_add_ sums them on a GPU."""

    def add(target: Any, index: Any, source: Any) -> None:
        target.index_add_(0, index, source)

    module = fused if way.form == "fused" else chunks
    old, module.add_rows_ = module.add_rows_, add  # type: ignore[attr-defined]
    try:
        seen = scenes_head.steps([("arcface", way)])
    finally:
        module.add_rows_ = old  # type: ignore[attr-defined]
    return [text for texts in seen.values() for text in texts]


# --- Copies of rows that the host holds -----------------------------------------------------------


def _wait_for_nothing(self: Any) -> None:
    self._future.result()


def _copy_at_once(
    self: Any, copy: Callable[..., None], ready: Any, *arguments: Any
) -> torch.cuda.Event:
    with torch.no_grad(), torch.cuda.stream(self._stream):
        copy(*arguments)  # without what the step has asked of the device before
        return self._stream.record_event()


def _buffer_free_at_once(self: Any) -> None:
    self._event = None


def _stream_of_device_0(self: Any, device: torch.device, *arguments: Any) -> None:
    _init(self, device, *arguments)
    self._stream = torch.cuda.Stream(0)


def _thread_on_device_0(self: Any, device: torch.device, *arguments: Any) -> None:
    _init(self, device, *arguments)
    self._thread = async_copy.ThreadPoolExecutor(1, "class-rows")


_init = async_copy.CopyQueue.__init__

COPY_BUGS: dict[str, tuple[Any, str, Any, str]] = {
    "a chunk is read before its copy": (async_copy.PendingCopy, "wait", _wait_for_nothing, "race"),
    "rows are stored before their update": (async_copy.CopyQueue, "_work", _copy_at_once, "race"),
    "a buffer is written during its copy": (async_copy._Buffer, "wait", _buffer_free_at_once,
                                           "race"),
    "the stream is another device's": (async_copy.CopyQueue, "__init__", _stream_of_device_0,
                                       "foreign device"),
    "the thread stays on device 0": (async_copy.CopyQueue, "__init__", _thread_on_device_0,
                                     "foreign device"),
}  # fmt: skip


def copy_bug(bug: str, way: Way) -> list[str]:
    """What is seen with a bug planted into the copies between host and device."""
    owner, name, new, kind = COPY_BUGS[bug]
    with _replaced(owner, name, new), _small_buffers():
        seen = scenes_head.steps([("arcface", way)])
    return [text for texts in seen.values() for text in texts if text.startswith(kind)]


def no_bug(way: Way) -> list[str]:
    with _small_buffers():
        seen = scenes_head.steps([("arcface", way)])
    return [text for texts in seen.values() for text in texts]


@contextlib.contextmanager
def _small_buffers() -> Iterator[None]:
    """Several pieces to a copy, so that buffers are used again."""
    defaults = _init.__defaults__
    _init.__defaults__ = (16 * 4 * scenes_head.D,)  # 16 rows
    try:
        yield
    finally:
        _init.__defaults__ = defaults
