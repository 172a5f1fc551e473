"""The vision transformers of arcface_torch: 12 x 12 patches, no class token, all tokens embedded.

Blocks LN-attention-LN-MLP (ReLU6) with stochastic depth (arXiv:1603.09382); the embedding head is
linear-BN-linear-BN on the concatenated tokens. Parameter names, shapes and initialisation are
those of InsightFace's arcface_torch, so its published weights load with strict=True; attention is
torch's scaled_dot_product_attention. In training a share of the tokens may be masked: the blocks
see the others alone, and a learned token stands in their place before the head. arcface_torch's
code masks a tenth whatever share was asked for; here it is the share asked for.

Letters: n images, L tokens, d width, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data_tools.common.errors import UserError
from recognition.backbones.input import INPUT_SIZE, check_images

PATCH = 9  # pixels; the last 4 rows and columns of 112 belong to none
NUM_TOKENS = (INPUT_SIZE // PATCH) ** 2  # 144


class Attention(nn.Module):
    """Multi-head self-attention [n, L, d] -> [n, L, d]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [n, L, 3, heads, d / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [n, heads, L, d / heads]
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """linear-ReLU6-linear, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.relu6(self.fc1(x)))


class TransformerBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)); in training each branch is left out at times.

    drop_path: probability that an image goes without a branch.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept.to(branch.dtype) / (1 - self.drop_path))


class PatchEmbed(nn.Module):
    """Images [n, 3, 112, 112] -> tokens [n, L, d]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images [n, 3, 112, 112] in [-1, 1], RGB -> embeddings [n, D], not normalised.

    dim, depth: width of the tokens and number of blocks, (256, 12) for vit_t.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    mask_ratio: share of the tokens that each training image loses, rounded to whole tokens.
    checkpointing: keep only the input of each block for the backward and compute the rest again.

    The draws are torch's default generator's: seed it before the forward and they repeat. The
    embedding head computes in the parameters' precision under autocast too.

    Raises:
        ValueError: a share outside [0, 1); forward on anything but float [n, 3, 112, 112].
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int = 8,
        embedding_size: int = 512,
        drop_path: float = 0.0,
        mask_ratio: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, share in (("drop_path", drop_path), ("mask_ratio", mask_ratio)):
            if not 0 <= share < 1:
                raise UserError(f"{name}={share}: a share, at least 0 and below 1")
        self.num_kept = NUM_TOKENS - round(mask_ratio * NUM_TOKENS)
        if not self.num_kept:
            raise UserError(f"mask_ratio={mask_ratio} leaves none of {NUM_TOKENS} tokens")
        self.checkpointing = checkpointing
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, NUM_TOKENS, dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)
        self.feature = nn.Sequential(
            nn.Linear(dim * NUM_TOKENS, dim, bias=False),
            nn.BatchNorm1d(dim, eps=2e-5),
            nn.Linear(dim, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        if self.num_kept == NUM_TOKENS:  # nothing would ever reach it
            self.mask_token.requires_grad_(False)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        x = self.patch_embed(images) + self.pos_embed  # [n, L, d]
        kept = None
        if self.training and self.num_kept < NUM_TOKENS:
            kept = torch.rand(len(x), NUM_TOKENS, device=x.device).argsort(1)[:, : self.num_kept]
            kept = kept[..., None].expand(-1, -1, x.shape[2])  # [n, L kept, d]
            x = x.gather(1, kept)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.to(self.norm.weight.dtype))
            if kept is not None:
                absent = self.mask_token.expand(len(x), NUM_TOKENS, -1)
                x = absent.scatter(1, kept, x)  # [n, L, d]
            return self.feature(x.flatten(1))  # [n, D]
