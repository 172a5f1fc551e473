"""MobileFaceNet (arXiv:1804.07573) as InsightFace builds it: depth-wise separable bottlenecks.

Parameter names, shapes and initialisation are those of arcface_torch (nested `layers`), so its
published `mbf` weights load with strict=True. Against the paper: twice the width, a grouped (two
channels a group) instead of depth-wise second convolution, expansions given by the stage.

Letters: n images, D embedding size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recognition.backbones.input import check_images


class Layers(nn.Module):
    """The modules in turn, held as `layers`: the level of nesting that the weights' names carry."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(Layers):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class MobileFaceNet(nn.Module):
    """Images [n, 3, 112, 112] in [-1, 1], RGB -> embeddings [n, D], not normalised.

    blocks: bottlenecks with a shortcut at 56, 28, 14 and 7 pixels; blocks[0] = 1 means the plain
        grouped convolution of `mbf` instead of a bottleneck, 0 nothing.
    width: channels at 56 and 28 pixels, twice that at 14 and 7.
    expansion: channels inside the bottlenecks of 56 and 28 pixels; 2x at 14 and 7, 4x on the
        way from 14 to 7.
    head_width: channels of the global depth-wise convolution, the input of the linear layer.

    From the last 1x1 convolution on everything computes in the parameters' precision under
    autocast too.

    Raises:
        ValueError: forward on anything but float [n, 3, 112, 112].
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        expansion: int,
        head_width: int,
        embedding_size: int = 512,
    ) -> None:
        super().__init__()
        wide = 2 * width
        if blocks[0] == 1:
            at_56: nn.Module = conv_block(width, width, 3, groups=width // 2)
        else:
            at_56 = residuals(width, expansion, blocks[0])
        self.layers = nn.Sequential(
            conv_block(3, width, 3, stride=2),
            at_56,
            Layers(*bottleneck(width, width, expansion, stride=2)),
            residuals(width, expansion, blocks[1]),
            Layers(*bottleneck(width, wide, 2 * expansion, stride=2)),
            residuals(wide, 2 * expansion, blocks[2]),
            Layers(*bottleneck(wide, wide, 4 * expansion, stride=2)),
            residuals(wide, 2 * expansion, blocks[3]),
        )
        self.conv_sep = conv_block(wide, head_width, 1)
        self.features = Layers(
            Layers(
                nn.Conv2d(head_width, head_width, 7, groups=head_width, bias=False),
                nn.BatchNorm2d(head_width),
            ),
            nn.Flatten(),
            nn.Linear(head_width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        x = self.layers(images)  # [n, 2 * width, 7, 7]
        with torch.autocast(x.device.type, enabled=False):
            x = self.conv_sep(x.to(self.features.layers[2].weight.dtype))
            return self.features(x)  # [n, D]


def conv_block(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> Layers:
    """Convolution, BatchNorm, PReLU."""
    return Layers(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.PReLU(channels),
    )


def bottleneck(
    in_channels: int, channels: int, expansion: int, stride: int
) -> tuple[Layers, Layers, Layers]:
    """1x1 to `expansion` channels, depth-wise 3x3, linear 1x1 to `channels`."""
    return (
        conv_block(in_channels, expansion, 1),
        conv_block(expansion, expansion, 3, stride=stride, groups=expansion),
        Layers(nn.Conv2d(expansion, channels, 1, bias=False), nn.BatchNorm2d(channels)),
    )


def residuals(channels: int, expansion: int, num_blocks: int) -> Layers:
    """`num_blocks` bottlenecks with a shortcut each."""
    return Layers(
        *(Residual(*bottleneck(channels, channels, expansion, 1)) for _ in range(num_blocks))
    )
