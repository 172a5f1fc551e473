"""The input that a network expects: where this contract is read from, and how to check it.

A result without its contract cannot be reproduced: channel order and scaling vary between
published networks, and a wrong one costs a few points of accuracy without raising an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import text
from data_tools.common.errors import UserError
from data_tools.common.schema import nearest

SIZES = {(112, 112): slice(0, 112), (112, 96): slice(8, 104)}  # (height, width): kept columns
ORDERS = ("RGB", "BGR")


class InputContract(NamedTuple):
    """Pixels 0..255 become (pixel - mean) / std, in this channel order.

    A 112 x 96 image is a 112 x 112 face without eight columns on either side. This is SphereFace's
    template: its x coordinates are those of the ArcFace template minus 8.
    """

    height: int = 112  # pixels
    width: int = 112
    color_order: str = "RGB"
    mean: float = 127.5
    std: float = 127.5

    @classmethod
    def from_metadata(cls, entries: Mapping[str, str]) -> "InputContract":
        """The contract from the metadata of an ONNX file that recognition.export.to_onnx wrote.

        Raises:
            ValueError: an entry is missing or invalid.
        """
        try:
            height, width = (int(side) for side in entries["input_size"].split(","))
            order, mean, std = entries["color_order"], float(entries["mean"]), float(entries["std"])
        except (KeyError, ValueError) as error:
            raise UserError(f"input metadata: {error!r} in {dict(entries)}") from error
        return cls(height, width, order, mean, std).checked(f"input metadata {entries}")

    def changed(self, changes: Mapping[str, Any], source: str) -> "InputContract":
        """This contract with some entries replaced.

        Raises:
            ValueError: an entry is unknown or its value is invalid; the message names `source`.
        """
        for name in changes:
            if name not in self._fields:
                hint = nearest(name, self._fields, "the entries are")
                raise UserError(f"{source}: unknown entry {name!r}; {hint}")
        for name, value in changes.items():
            wanted = str if name == "color_order" else int | float
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise UserError(f"{source}: {name} is {value!r}")
        return self._replace(**changes).checked(source)

    def checked(self, source: str) -> "InputContract":
        numbers = np.isfinite([self.mean, self.std]).all() and self.std > 0
        if self.color_order not in ORDERS or not numbers:
            raise UserError(f"{source} is not a valid input contract: {self.text()}")
        if (self.height, self.width) not in SIZES:
            raise UserError(
                f"{source}: {self.height} x {self.width} images are not supported; use "
                "112 x 112 or 112 x 96"
            )
        return self

    def text(self) -> str:
        return (
            f"{self.color_order}, {self.height} x {self.width}, "
            f"(pixel - {self.mean:g}) / {self.std:g}"
        )

    def prepare(self, images: NDArray[np.uint8], dtype: Any = np.float32) -> NDArray:
        """uint8 RGB [n, 112, 112, 3] -> contiguous floats [n, 3, height, width] for the network."""
        x = images[:, :, SIZES[self.height, self.width]]
        if self.color_order == "BGR":
            x = x[..., ::-1]
        floats = np.empty((len(x), 3, self.height, self.width), dtype=np.float32)
        np.subtract(x.transpose(0, 3, 1, 2), np.float32(self.mean), out=floats)
        floats /= np.float32(self.std)
        return floats.astype(dtype, copy=False)

    def alternatives(self) -> dict[str, "InputContract"]:
        """Contracts that are often confused with this one, keyed by the flags that set them."""
        order = ORDERS[1 - ORDERS.index(self.color_order)]
        scaled = self.std > 1
        other = self._replace(mean=0.0, std=1.0) if scaled else self._replace(mean=127.5, std=127.5)
        return {
            f"--color-order {order}": self._replace(color_order=order),
            f"--mean {other.mean:g} --std {other.std:g}": other,
        }


def sidecar(model: Path) -> Path:
    """The path of a foreign model's contract: NAME.contract.json beside NAME.onnx."""
    return model.with_suffix(".contract.json")


def read_json(path: Path) -> dict[str, Any]:
    """The entries of a contract file, for `InputContract.changed`.

    Raises:
        ValueError: the file is not a JSON object.
        OSError: the file cannot be read.
    """
    content = text.read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: must be a JSON object, such as "
            '{"color_order": "BGR", "mean": 127.5, "std": 128}'
        )
    return content
