"""Dense fp64 truths, written from the papers' formulas. Imports nothing of the project.

Letters: B rows, D embedding, C classes, K sub-centres. Everything is one process and one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Target cosine [B] and embedding norm [B] -> what replaces the target cosine [B].
Target = Callable[[Tensor, Tensor], Tensor]


def partial_fc(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [C, D] or [C, K, D]
    labels: Tensor,  # int64 [B]
    classes: Tensor,  # int64 [S] the sampled classes, any order
    target: Target,
    scale: float = 64.0,
    threshold: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy over the sampled classes, and its gradients: (loss, dx, dweight)."""
    x = x.detach().to(dtype).clone().requires_grad_()
    weight = weight.detach().to(dtype).clone().requires_grad_()
    norm = x.pow(2).sum(1).sqrt()
    centres = weight if weight.dim() == 3 else weight[:, None]
    cos = torch.stack(
        [
            (x / norm[:, None])
            @ (centres[:, k] / centres[:, k].pow(2).sum(1, keepdim=True).sqrt()).T
            for k in range(centres.shape[1])
        ]
    )
    cos = cos.max(0).values  # [B, C]
    logits = cos
    if threshold:
        logits = torch.where(cos.detach() > threshold, torch.zeros_like(cos), cos)
    rows = torch.arange(len(x))
    is_target = torch.nn.functional.one_hot(labels, len(weight)).bool()
    logits = scale * torch.where(is_target, target(cos[rows, labels], norm)[:, None], logits)
    absent = torch.ones(len(weight), dtype=torch.bool)
    absent[classes] = False
    logits = logits.masked_fill(absent[None], -math.inf)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def softmax(cos: Tensor, norm: Tensor) -> Tensor:
    return cos


def cosface(cos: Tensor, norm: Tensor, m: float) -> Tensor:
    return cos - m


def arcface(cos: Tensor, norm: Tensor, m: float) -> Tensor:
    return torch.cos(torch.arccos(cos) + m)


def combined(cos: Tensor, norm: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    return torch.cos(m1 * torch.arccos(cos) + m2) - m3


def fallback(cos: Tensor, norm: Tensor, m: float) -> Tensor:
    """ArcFace of 2018: past t + m = pi the straight line cos t - m sin m."""
    inside = cos > math.cos(math.pi - m)
    return torch.where(inside, arcface(cos, norm, m), cos - m * math.sin(m))


def easy(cos: Tensor, norm: Tensor, m: float) -> Tensor:
    return torch.where(cos > 0, arcface(cos, norm, m), cos)


def by_norm(cos: Tensor, norm: Tensor) -> Tensor:
    """No published loss: a target that moves with the embedding's norm, as MagFace's does."""
    return cos - 0.02 * norm


def straight_through(target: Target) -> Target:
    """The value of `target` with the slope of the identity."""
    return lambda cos, norm: target(cos.detach(), norm) + cos - cos.detach()
