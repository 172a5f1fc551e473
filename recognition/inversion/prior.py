"""What makes an image plausible: the BatchNorms' statistics, its smoothness and its length.

Letters: b images of a batch, c channels of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BnPrior:
    """sum over BatchNorms of |mean - stored mean|^2 + |std - stored std|^2, of their inputs.

    arXiv:1801.07698 section 3.3, over the layers that DeepInversion (arXiv:1912.08795) looks at;
    DeepInversion itself takes norms without the square, and variances. Mean and variance (over b
    and the places of the image, biased) are those of the last forward; std = sqrt(var + eps) on
    both sides, so that the slope at a constant channel is finite. The network is in eval mode.

    form: "std" | "var". first: the weight of the first layer. last: the BatchNorm1d of the
    embedding counts too. A network without BatchNorm has no layers, and take() gives 0.
    """

    def __init__(
        self, network: nn.Module, form: str = "std", first: float = 1.0, last: bool = False
    ) -> None:
        kinds = (nn.BatchNorm2d, nn.BatchNorm1d) if last else (nn.BatchNorm2d,)
        self.form, self.first = form, first
        self.layers = [layer for layer in network.modules() if isinstance(layer, kinds)]
        self._terms: list[Tensor] = []
        self._handles = [layer.register_forward_pre_hook(self._look) for layer in self.layers]

    def _look(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1)  # [c, all else]
        var, mean = torch.var_mean(x, 1, correction=0)  # [c]
        stored = layer.running_var
        if self.form == "std":
            var, stored = (var + layer.eps).sqrt(), (stored + layer.eps).sqrt()
        term = (mean - layer.running_mean).square().sum() + (var - stored).square().sum()
        self._terms.append(term * self.first if layer is self.layers[0] else term)

    def take(self) -> Tensor:
        """[] The term of the last forward, which is then forgotten."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def total_variation(images: Tensor) -> Tensor:  # [b, 3, h, w] -> []
    """Mean over images of |difference| to the neighbour, summed over four directions.

    The paper says total variation and no more; the four directions are DeepInversion's, whose norm
    is over the whole batch: here no image's share depends on the others.
    """
    differences = [
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:] - images[..., :-1],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    ]
    return torch.stack([d.flatten(1).norm(dim=1).mean() for d in differences]).sum()


def length(images: Tensor) -> Tensor:  # [b, 3, h, w] -> []
    """Mean over images of |I|."""
    return images.flatten(1).norm(dim=1).mean()
