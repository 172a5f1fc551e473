"""The interface of a network that evaluation uses. Images are aligned faces."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eval.embedders.contract import InputContract


class Embedder(Protocol):
    facts: dict[str, object]  # what a report says about the network
    digest: str  # sha256 of the weights
    contract: InputContract

    def prepare(self, images: NDArray[np.uint8]) -> Any:
        """uint8 RGB [n, 112, 112, 3] -> what `forward` takes; any thread may call it."""

    def forward(self, prepared: Any) -> NDArray[np.float32]:
        """-> embeddings [n, D], not normalised."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 RGB [n, 112, 112, 3], any n >= 1 -> embeddings [n, D], not normalised."""

    def with_contract(self, contract: InputContract) -> "Embedder":
        """The same network with another input contract."""
