"""The networks that a recipe can name: `BACKBONES[name](embedding_size=512)` -> nn.Module.

Each takes float images [n, 3, 112, 112] (RGB, normalised to [-1, 1]) and returns embeddings
[n, embedding_size], not normalised. What else a network takes is a recipe's `network_args`.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data_tools.common.errors import UserKeyError, UserTypeError
from recognition.backbones.iresnet import IResNet
from recognition.backbones.mobilefacenet import MobileFaceNet
from recognition.backbones.vit import VisionTransformer

BACKBONES: dict[str, partial[Any]] = {
    "r18": partial(IResNet, (2, 2, 2, 2)),
    "r34": partial(IResNet, (3, 4, 6, 3)),
    "r50": partial(IResNet, (3, 4, 14, 3)),
    "r100": partial(IResNet, (3, 13, 30, 3)),
    "r200": partial(IResNet, (6, 26, 60, 6)),
    "mbf": partial(MobileFaceNet, (1, 4, 6, 2), width=128, expansion=128, head_width=512),
    "mbf_large": partial(MobileFaceNet, (2, 8, 12, 4), width=256, expansion=128, head_width=512),
    "vit_t": partial(VisionTransformer, 256, 12),
    "vit_s": partial(VisionTransformer, 512, 12),
    "vit_b": partial(VisionTransformer, 512, 24),
    "vit_l": partial(VisionTransformer, 768, 24),
    # Ours, for the demo and for tests on a CPU: a quarter of mbf's width and a third of its blocks
    # trains at some 150 images/s on one core, mbf at 12.
    "mbf_tiny": partial(MobileFaceNet, (0, 1, 2, 1), width=32, expansion=32, head_width=128),
}


def make_backbone(name: str, embedding_size: int, arguments: Mapping[str, Any]) -> nn.Module:
    """BACKBONES[name] with the `network_args` of a recipe.

    Raises:
        KeyError: no such network.
        TypeError, ValueError: it does not take the arguments.
    """
    if name not in BACKBONES:
        raise UserKeyError(f"network={name!r}: one of {', '.join(BACKBONES)}")
    known = inspect.signature(BACKBONES[name]).parameters
    fixed = {"embedding_size", *BACKBONES[name].keywords}
    taken = {
        key: type(parameter.default)
        for key, parameter in known.items()
        if parameter.default is not parameter.empty and key not in fixed
    }
    for key, value in arguments.items():
        if key not in taken:
            listed = ", ".join(taken) or "nothing else"
            raise UserTypeError(f"network_args: {name} takes no {key!r}; it takes {listed}")
        number = taken[key] is float and isinstance(value, int) and not isinstance(value, bool)
        if not (number or type(value) is taken[key]):
            raise UserTypeError(f"network_args.{key}={value!r}: expected {taken[key].__name__}")
    return BACKBONES[name](embedding_size=embedding_size, **arguments)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Networks made inside have shapes and no values: their parameters are on the meta device.

    What draws initial values is left out: on that device torch would do it through its compiler,
    whose import alone takes seconds.
    """
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (
            func in (Tensor.normal_, Tensor.uniform_)
            or getattr(func, "__module__", "") == nn.init.__name__
        ):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
