"""Builds guard.cpp, and loads it into a process that has not imported torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).with_name("guard.cpp")
ROOT = pathlib.Path(__file__).parents[2]
_COMPILERS = ("g++", "c++", "clang++")
_STANDARD = "-std=c++20"  # of torch's headers


def why_unavailable() -> str | None:
    """Why the pretend device cannot be built here; None: it can."""
    if sys.platform != "linux":
        return "the pretend CUDA device is a library for Linux"
    if compiler() is None:
        return f"the pretend CUDA device needs a C++ compiler ({', '.join(_COMPILERS)})"
    if "+cu" in importlib.metadata.version("torch"):
        return "this torch has a real CUDA device in it: the pretend one is for its CPU build"
    return None


def compiler() -> str | None:
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def build() -> pathlib.Path:
    """The library for this torch and this compiler, in build/; compiled where it is not there.

    Raises:
        RuntimeError: the compiler rejects it, with what it printed.
    """
    found = compiler()
    assert found is not None
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version} {found}".encode()).hexdigest()[:16]
    library = ROOT / "build" / "pretend_cuda" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    torch = _torch_folder()
    include, lib = torch / "include", torch / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = pathlib.Path(scratch) / library.name  # renamed: two test processes may build at once
        done = subprocess.run(
            [
                found, "-O1", "-shared", "-fPIC", _STANDARD, "-w", f"-I{include}",
                f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", str(SOURCE), "-o", str(made),
                f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr[-4000:]}")
        os.replace(made, library)
    return library


def load(library: str) -> ctypes.CDLL:
    """Load the library; torch must not have been imported yet."""
    assert "torch" not in sys.modules, "the pretend device must be loaded before torch"
    return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> pathlib.Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return pathlib.Path(spec.submodule_search_locations[0])
