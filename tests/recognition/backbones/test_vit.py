"""Vision transformers: InsightFace's names and sizes, attention by its formula, the stated mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from recognition.backbones import BACKBONES, make_backbone
from recognition.backbones.vit import NUM_TOKENS, VisionTransformer
from tests import ranks
from tests.recognition.backbones.test_backbones import faces

SIZES = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}


def small(depth=2, dim=32, **arguments):
    torch.manual_seed(0)
    return VisionTransformer(dim, depth, num_heads=4, embedding_size=16, **arguments)


def published(dim, depth):
    """Every name and shape of arcface_torch's file."""
    state = {
        "pos_embed": (1, 144, dim), "mask_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, 3, 9, 9), "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,),
        "feature.0.weight": (dim, 144 * dim), "feature.2.weight": (512, dim),
    }  # fmt: skip
    for at, width in (("feature.1", dim), ("feature.3", 512)):
        state |= {f"{at}.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")}
        state[f"{at}.num_batches_tracked"] = ()
    for i in range(depth):
        at = f"blocks.{i}"
        state |= {f"{at}.norm{k}.{n}": (dim,) for k in (1, 2) for n in ("weight", "bias")}
        state |= {
            f"{at}.attn.qkv.weight": (3 * dim, dim),
            f"{at}.attn.proj.weight": (dim, dim), f"{at}.attn.proj.bias": (dim,),
            f"{at}.mlp.fc1.weight": (4 * dim, dim), f"{at}.mlp.fc1.bias": (4 * dim,),
            f"{at}.mlp.fc2.weight": (dim, 4 * dim), f"{at}.mlp.fc2.bias": (dim,),
        }  # fmt: skip
    return state


@pytest.mark.parametrize(
    "name, millions", [("vit_t", 19.1), ("vit_s", 76.0), ("vit_b", 113.8), ("vit_l", 255.7)]
)
def test_names_shapes_and_size_are_the_published_ones(name, millions):
    with torch.device("meta"):
        module = BACKBONES[name]()
    state = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert state == published(*SIZES[name])
    assert abs(sum(p.numel() for p in module.parameters()) / 1e6 - millions) < 0.1


def test_the_smallest_gives_embeddings_of_any_size():
    with torch.no_grad():
        assert BACKBONES["vit_t"](embedding_size=128).eval()(faces(2)).shape == (2, 128)


def by_formula(module, images, num_heads=4):
    """The network from its weights in fp64, softmax(q k' / sqrt(d)) v written out."""
    w = {key: value.double() for key, value in module.state_dict().items()}
    x = functional.conv2d(
        images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=9
    )
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    d = x.shape[2]

    def norm(x, at):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]

    for i in range(len(module.blocks)):
        at = f"blocks.{i}"
        y = norm(x, f"{at}.norm1") @ w[f"{at}.attn.qkv.weight"].T
        q, k, v = (part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in y.chunk(3, -1))
        attention = (q @ k.transpose(2, 3) / math.sqrt(d / num_heads)).softmax(-1)
        y = (attention @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"{at}.attn.proj.weight"].T + w[f"{at}.attn.proj.bias"]
        y = norm(x, f"{at}.norm2") @ w[f"{at}.mlp.fc1.weight"].T + w[f"{at}.mlp.fc1.bias"]
        x = x + y.clamp(0, 6) @ w[f"{at}.mlp.fc2.weight"].T + w[f"{at}.mlp.fc2.bias"]
    x = norm(x, "norm").flatten(1)
    for linear, bn in ((0, 1), (2, 3)):
        x = x @ w[f"feature.{linear}.weight"].T
        mean, var = w[f"feature.{bn}.running_mean"], w[f"feature.{bn}.running_var"]
        x = (x - mean) / (var + 2e-5).sqrt() * w[f"feature.{bn}.weight"] + w[f"feature.{bn}.bias"]
    return x


def test_computes_its_formula():
    module, images = small(depth=3).double(), faces(4, torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))  # attention far from uniform, ReLU6 saturated
        module(images)
        module.eval()
        expected = by_formula(module, images)
        assert (module(images) - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("ratio, kept", [(0.05, 137), (0.1, 130), (0.5, 72), (0.0, 144)])
def test_masks_the_stated_share(ratio, kept):
    module = small(mask_ratio=ratio)
    seen, whole = [], []
    module.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.feature.register_forward_pre_hook(lambda _, args: whole.append(args[0]))
    with torch.no_grad():
        module(faces(3))
        module.eval()(faces(3))
    assert seen[0].shape == (3, kept, 32) and seen[1].shape == (3, 144, 32)
    tokens = whole[0].unflatten(1, (NUM_TOKENS, 32))
    masked = (tokens == module.mask_token).all(-1)  # [n, L]
    assert (masked.sum(1) == NUM_TOKENS - kept).all()
    if ratio:
        assert not torch.equal(masked[0], masked[1])  # each image its own
        assert not (whole[1].unflatten(1, (NUM_TOKENS, 32)) == module.mask_token).all(-1).any()


def test_every_token_returns_to_its_place():
    """Blocks that change nothing: the head must see LN(token) where it was, whatever was drawn."""
    module = small(mask_ratio=0.4)
    whole = []
    module.feature.register_forward_pre_hook(lambda _, args: whole.append(args[0]))
    for block in module.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        module(faces(2))
        expected = module.norm(module.patch_embed(faces(2)) + module.pos_embed)
    tokens = whole[0].unflatten(1, (NUM_TOKENS, 32))
    masked = (tokens == module.mask_token).all(-1)
    assert torch.allclose(tokens[~masked], expected[~masked], atol=1e-6)


def test_same_seed_same_mask_and_dropped_paths():
    module = small(mask_ratio=0.3, drop_path=0.5)

    def forward(seed):
        torch.manual_seed(seed)
        return module(faces(4))

    assert torch.equal(forward(1), forward(1)) and not torch.equal(forward(1), forward(2))


def test_dropped_paths_leave_the_mean():
    block = small(drop_path=0.25).blocks[1]
    x = torch.ones(4000, 1, 32, dtype=torch.float64)
    dropped = block._dropped(x)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.75}
    share = (dropped[:, 0, 0] == 0).double().mean()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    block.eval()
    assert torch.equal(block._dropped(x), x)


def test_checkpointing_changes_memory_and_no_number():
    gradients, held = [], []
    for checkpointing in (False, True):
        module = small(depth=4, mask_ratio=0.2, drop_path=0.3, checkpointing=checkpointing)
        torch.manual_seed(5)
        sizes: dict[int, int] = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(faces(3)).sin().sum()
        held.append(sum(sizes.values()))
        loss.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert held[1] < 0.6 * held[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_is_fp32_under_autocast(dtype):
    module, seen = small(mask_ratio=0.1), []
    module.blocks[1].mlp.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    module.feature[0].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", dtype):
        assert module(faces(3)).dtype == torch.float32
    assert seen == [dtype, torch.float32]


def gradients_of_two_steps(mask_ratio):
    module = torch.nn.parallel.DistributedDataParallel(small(mask_ratio=mask_ratio))
    rank = torch.distributed.get_rank()
    for step in range(2):
        module.zero_grad()
        module(faces(3) * (1 - 0.1 * rank - 0.2 * step)).sin().sum().backward()
    return {name: p.grad for name, p in module.module.named_parameters()}


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25])
def test_ddp_reduces_every_parameter(mask_ratio):
    first, second = ranks.run(2, gradients_of_two_steps, mask_ratio)
    without = [name for name, gradient in first.items() if gradient is None]
    assert without == ([] if mask_ratio else ["mask_token"])
    assert all(torch.equal(g, second[name]) for name, g in first.items() if g is not None)


def test_arguments_of_a_recipe():
    with torch.device("meta"):
        module = make_backbone("vit_b", 512, {"drop_path": 0.05, "mask_ratio": 0.05})
        assert module.blocks[23].drop_path == 0.05 and module.num_kept == 137
        assert make_backbone("r18", 512, {"dropout": 0.4}).dropout.p == 0.4
    for name, arguments, words in [
        ("vit_t", {"mask": 0.1}, "takes no 'mask'; it takes num_heads, drop_path, mask_ratio"),
        ("mbf", {"dropout": 0.1}, "takes nothing else"),
        ("vit_t", {"checkpointing": "yes"}, "expected bool"),
        ("vit_t", {"mask_ratio": True}, "expected float"),
    ]:
        with pytest.raises(TypeError, match=words):
            make_backbone(name, 512, arguments)
    with pytest.raises(ValueError, match="mask_ratio=1.0"):
        make_backbone("vit_t", 512, {"mask_ratio": 1.0})
    with pytest.raises(KeyError, match="one of r18"):
        make_backbone("vit_x", 512, {})
