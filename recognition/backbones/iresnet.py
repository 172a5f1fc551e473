"""IResNet, the residual network of ArcFace (arXiv:1801.07698 section 3.1).

A ResNet for 112x112 faces: a stride-1 stem, blocks BN-conv-BN-PReLU-conv-BN whose second
convolution carries the stride, no activation after the sum, and BN-flatten-linear-BN as the
embedding head. Parameter names, shapes and initialisation are those of InsightFace's
arcface_torch, so its published weights load with strict=True.

Letters: n images, D embedding size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recognition.backbones.input import INPUT_SIZE, check_images

WIDTHS = (64, 128, 256, 512)  # channels of layer1 .. layer4, each of which halves the resolution


class IResBlock(nn.Module):
    """x -> shortcut(x) + BN(conv(PReLU(BN(conv(BN(x)))))), stride in the second convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class IResNet(nn.Module):
    """Images [n, 3, 112, 112] in [-1, 1], RGB -> embeddings [n, D], not normalised.

    blocks: residual blocks of the four stages, (3, 4, 14, 3) for r50.
    dropout: probability on the flattened features before the linear layer.

    The embedding head computes in the parameters' precision under autocast too.

    Raises:
        ValueError: forward on anything but float [n, 3, 112, 112].
    """

    def __init__(
        self, blocks: Sequence[int], embedding_size: int = 512, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        self.layer1 = make_stage(WIDTHS[0], WIDTHS[0], blocks[0])
        self.layer2 = make_stage(WIDTHS[0], WIDTHS[1], blocks[1])
        self.layer3 = make_stage(WIDTHS[1], WIDTHS[2], blocks[2])
        self.layer4 = make_stage(WIDTHS[2], WIDTHS[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(WIDTHS[3])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(WIDTHS[3] * (INPUT_SIZE // 16) ** 2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        # A learnable gain would only rescale coordinates that the cosine head normalises again.
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        x = self.prelu(self.bn1(self.conv1(images)))  # [n, 64, 112, 112]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [n, 512, 7, 7]
        x = self.dropout(torch.flatten(self.bn2(x), 1))  # [n, 512 * 7 * 7]
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.to(self.fc.weight.dtype)))  # [n, D]


def make_stage(in_channels: int, channels: int, num_blocks: int) -> nn.Sequential:
    """Blocks of one resolution; the first halves it."""
    first = IResBlock(in_channels, channels, stride=2)
    return nn.Sequential(first, *(IResBlock(channels, channels, 1) for _ in range(num_blocks - 1)))
