"""The only way commands reach trained networks; recognition provides them.

data_tools and eval stand below recognition and import nothing from it. Some of their commands need
a network all the same: `embed`, `purify` and every evaluation. They call networks(), and nothing
else in the two packages names recognition; tests/test_structure.py checks both.
"""

import importlib
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Network(Protocol):
    """What data_tools needs of a network; eval.embedders.embedder.Embedder has more."""

    facts: dict[str, object]  # what a report says of the network

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 RGB [n, 112, 112, 3], any n >= 1 -> embeddings [n, D], not normalised."""


class Centres(Protocol):
    """The class centres of a trained head; processes receive it by pickle."""

    path: object  # of the checkpoint, for messages
    num_classes: int
    num_subcenters: int  # K
    size: int  # D

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The normalised centres of the classes [start, stop): float32 [stop - start, K, D]."""


def networks() -> ModuleType:
    """The module recognition.weights.networks: open_embedder() and Centres.

    It is imported at the call, because it imports torch and ONNX Runtime, which takes seconds.
    """
    return importlib.import_module("recognition.weights.networks")
