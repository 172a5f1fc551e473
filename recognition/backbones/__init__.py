"""The networks that a recipe can name: `BACKBONES[name](embedding_size=512)` -> nn.Module.

Each takes float images [n, 3, 112, 112] (RGB, normalised to [-1, 1]) and returns embeddings
[n, embedding_size], not normalised.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from recognition.backbones.iresnet import IResNet
from recognition.backbones.mobilefacenet import MobileFaceNet

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "r18": partial(IResNet, (2, 2, 2, 2)),
    "r34": partial(IResNet, (3, 4, 6, 3)),
    "r50": partial(IResNet, (3, 4, 14, 3)),
    "r100": partial(IResNet, (3, 13, 30, 3)),
    "r200": partial(IResNet, (6, 26, 60, 6)),
    "mbf": partial(MobileFaceNet, (1, 4, 6, 2), width=128, expansion=128, head_width=512),
    "mbf_large": partial(MobileFaceNet, (2, 8, 12, 4), width=256, expansion=128, head_width=512),
    # Ours, for the demo and for tests on a CPU: a quarter of mbf's width and a third of its blocks
    # trains at some 150 images/s on one core, mbf at 12.
    "mbf_tiny": partial(MobileFaceNet, (0, 1, 2, 1), width=32, expansion=32, head_width=128),
}
