"""Backbones: InsightFace's names, shapes, sizes and initialisation; every precision and layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from recognition.backbones import BACKBONES
from tests import ranks

IRESNETS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
    "r200": (6, 26, 60, 6),
}
SMALL = ["mbf_tiny", "mbf", "r18"]  # cheap enough to run


def on_meta(name):
    with torch.device("meta"):
        return BACKBONES[name]()


def make(name, **arguments):
    torch.manual_seed(0)
    return BACKBONES[name](**arguments)


def faces(n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 112, 112, generator=generator, dtype=dtype) * 2 - 1


def iresnet_size(blocks):
    """Parameters by hand: convolutions, two numbers a channel for a BatchNorm, one for a PReLU."""
    total = 3 * 64 * 9 + 2 * 64 + 64  # stem
    channels = 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        for index in range(count):
            total += 2 * channels + channels * width * 9 + 2 * width + width
            total += width * width * 9 + 2 * width
            if index == 0:  # the shortcut with stride
                total += channels * width + 2 * width
            channels = width
    return total + 2 * 512 + (512 * 49 * 512 + 512) + 2 * 512  # bn2, fc, features


@pytest.mark.parametrize(
    "name, millions",
    [("r18", 24.0), ("r34", 34.1), ("r50", 43.6), ("r100", 65.2), ("r200", 118.8)],
)
def test_iresnet_has_the_published_size(name, millions):
    size = sum(p.numel() for p in on_meta(name).parameters())
    assert size == iresnet_size(IRESNETS[name])
    assert round(size / 1e6, 1) == millions


def mobilefacenet_size(width, expansion, blocks):
    def conv_block(a, b, kernel, groups=1):
        return a * b * kernel * kernel // groups + 3 * b

    def bottleneck(a, b, inner):
        return conv_block(a, inner, 1) + conv_block(inner, inner, 3, inner) + inner * b + 2 * b

    wide = 2 * width
    total = conv_block(3, width, 3)
    if blocks[0] == 1:
        total += conv_block(width, width, 3, groups=width // 2)
    else:
        total += blocks[0] * bottleneck(width, width, expansion)
    total += (1 + blocks[1]) * bottleneck(width, width, expansion)
    total += bottleneck(width, wide, 2 * expansion)
    total += blocks[2] * bottleneck(wide, wide, 2 * expansion)
    total += bottleneck(wide, wide, 4 * expansion)
    total += blocks[3] * bottleneck(wide, wide, 2 * expansion)
    total += conv_block(wide, 512, 1)
    return total + (512 * 49 + 2 * 512) + 512 * 512 + 2 * 512


@pytest.mark.parametrize(
    "name, arguments, millions",
    [("mbf", (128, 128, (1, 4, 6, 2)), 2.06), ("mbf_large", (256, 128, (2, 8, 12, 4)), 6.31)],
)
def test_mobilefacenet_has_the_published_size(name, arguments, millions):
    size = sum(p.numel() for p in on_meta(name).parameters())
    assert size == mobilefacenet_size(*arguments)
    assert round(size / 1e6, 2) == millions


def batch_norm(prefix, channels):
    shapes = {
        f"{prefix}.{name}": (channels,)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    return shapes | {f"{prefix}.num_batches_tracked": ()}


def iresnet_state(blocks):
    """Every name and shape of a published file."""
    state = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,), **batch_norm("bn1", 64)}
    channels = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        for index in range(count):
            at = f"layer{stage}.{index}"
            state |= batch_norm(f"{at}.bn1", channels)
            state |= {f"{at}.conv1.weight": (width, channels, 3, 3)}
            state |= batch_norm(f"{at}.bn2", width)
            state |= {f"{at}.prelu.weight": (width,), f"{at}.conv2.weight": (width, width, 3, 3)}
            state |= batch_norm(f"{at}.bn3", width)
            if index == 0:
                state |= {f"{at}.downsample.0.weight": (width, channels, 1, 1)}
                state |= batch_norm(f"{at}.downsample.1", width)
            channels = width
    state |= {"fc.weight": (512, 512 * 7 * 7), "fc.bias": (512,)}
    return state | batch_norm("bn2", 512) | batch_norm("features", 512)


def mobilefacenet_state():
    """Every name and shape of a published mbf file."""
    state = {}

    def conv_block(at, shape):
        state.update({f"{at}.layers.0.weight": shape, f"{at}.layers.2.weight": shape[:1]})
        state.update(batch_norm(f"{at}.layers.1", shape[0]))

    def bottleneck(at, a, b, inner):
        conv_block(f"{at}.layers.0", (inner, a, 1, 1))
        conv_block(f"{at}.layers.1", (inner, 1, 3, 3))
        state.update({f"{at}.layers.2.layers.0.weight": (b, inner, 1, 1)})
        state.update(batch_norm(f"{at}.layers.2.layers.1", b))

    conv_block("layers.0", (128, 3, 3, 3))
    conv_block("layers.1", (128, 2, 3, 3))
    bottleneck("layers.2", 128, 128, 128)
    bottleneck("layers.4", 128, 256, 256)
    bottleneck("layers.6", 256, 256, 512)
    for stage, count, width, inner in ((3, 4, 128, 128), (5, 6, 256, 256), (7, 2, 256, 256)):
        for index in range(count):
            bottleneck(f"layers.{stage}.layers.{index}", width, width, inner)
    conv_block("conv_sep", (512, 256, 1, 1))
    state["features.layers.0.layers.0.weight"] = (512, 1, 7, 7)
    state.update(batch_norm("features.layers.0.layers.1", 512))
    state["features.layers.2.weight"] = (512, 512)
    state.update(batch_norm("features.layers.3", 512))
    return state


@pytest.mark.parametrize("name", [*IRESNETS, "mbf"])
def test_state_has_the_published_names_and_shapes(name):
    state = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert state == (mobilefacenet_state() if name == "mbf" else iresnet_state(IRESNETS[name]))


def test_iresnet_starts_as_the_official_one():
    state = make("r18").state_dict()
    convolutions = [w for w in state.values() if w.ndim == 4]
    for weight in convolutions:
        error = 0.1 / (2 * weight.numel()) ** 0.5  # of the standard deviation
        assert abs(weight.std().item() - 0.1) < 5 * error
        assert abs(weight.mean().item()) < 5 * 0.1 / weight.numel() ** 0.5
    assert len(convolutions) == 1 + 8 * 2 + 4
    assert (state["prelu.weight"] == 0.25).all()
    assert state["fc.weight"].abs().max() <= (512 * 49) ** -0.5  # torch's default


def test_mobilefacenet_starts_as_the_official_one():
    for module in make("mbf").modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            weight = module.weight
            fan_out = weight.shape[0] * weight[0, 0].numel()  # kaiming, groups not counted
            std = (2 / fan_out) ** 0.5
            assert abs(weight.std().item() - std) < 6 * std / (2 * weight.numel()) ** 0.5


def test_final_gain_is_one_and_frozen_its_bias_learns():
    features = make("r18").features
    assert (features.weight == 1).all() and not features.weight.requires_grad
    assert features.bias.requires_grad
    assert [n for n, p in make("r18").named_parameters() if not p.requires_grad] == [
        "features.weight"
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_batch_norms_use_the_official_eps(name):
    norms = [
        module for module in on_meta(name).modules()
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)
    ]  # fmt: skip
    assert {module.eps for module in norms} == {2e-5 if name.startswith("vit") else 1e-5}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [512, 128])
def test_embedding_size(name, size):
    module = make(name, embedding_size=size).eval()
    with torch.no_grad():
        assert module(faces(1)).shape == (1, size)


@pytest.mark.parametrize("name", ["r34", "r50", "r100", "r200", "mbf_large"])
def test_large_networks_have_the_same_output(name):
    with torch._subclasses.FakeTensorMode():
        assert BACKBONES[name]()(torch.empty(2, 3, 112, 112)).shape == (2, 512)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "shape", [(2, 3, 128, 128), (2, 1, 112, 112), (3, 112, 112), (2, 112, 112, 3)]
)
def test_other_inputs_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"\[n, 3, 112, 112\]"):
        make(name)(torch.zeros(shape))


def test_pixels_that_nobody_normalised_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        make("mbf_tiny")(torch.zeros(2, 3, 112, 112, dtype=torch.uint8))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)]
)
def test_embedding_head_is_fp32_under_autocast(name, dtype):
    module = make(name)
    seen = {}
    head = (module.fc, module.features) if name == "r18" else module.features.layers
    for part in head:
        part.register_forward_hook(lambda part, _, y: seen.update({type(part).__name__: y.dtype}))
    trunk = []
    stage = module.layer4 if name == "r18" else module.layers
    stage.register_forward_hook(lambda *call: trunk.append(call[2].dtype))
    with torch.autocast("cpu", dtype):
        embeddings = module(faces(2))
        assert torch.is_autocast_enabled("cpu")
    assert embeddings.dtype == torch.float32
    assert trunk == [dtype]
    assert set(seen.values()) == {torch.float32} and {"Linear", "BatchNorm1d"} <= set(seen)


@pytest.mark.parametrize("name", SMALL)
def test_float64_is_kept_to_the_end(name):
    module = make(name).double()
    x = faces(2, torch.float64)
    assert module(x).dtype == torch.float64
    module.eval()
    with torch.no_grad():  # float32 on the way would leave 0 or 1e-7
        embeddings = module(x)
        change = (module(x * (1 + 1e-12)) - embeddings).abs().max() / embeddings.abs().max()
    assert 0 < change < 1e-10


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same_gradients(name):
    plain, strided = make(name), make(name).to(memory_format=torch.channels_last)
    x = faces(3)
    for module, images in ((plain, x), (strided, x.to(memory_format=torch.channels_last))):
        module(images)[:, :7].sin().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), strided.parameters(), strict=True):
        if p.requires_grad:
            # fp32 rounding that PReLU's kinks amplify; a wrong layout is an error of order one
            assert (p.grad - q.grad).norm() < 0.05 * p.grad.norm() + 1e-3, key


@pytest.mark.parametrize("name", SMALL)
def test_one_image_in_eval_is_its_row_of_the_batch(name):
    module = make(name)
    with torch.no_grad():
        module(faces(4))  # running statistics
        module.eval()
        one, batch = module(faces(4)[2:3])[0], module(faces(4))[2]
    assert (one - batch).norm() < 1e-5 * batch.norm()


def test_dropout_is_off_unless_asked_for():
    x = faces(2)
    plain = make("r18")
    assert torch.equal(plain(x), plain(x))
    dropping = make("r18", dropout=0.4)
    assert not torch.equal(dropping(x), dropping(x))


def gradients_of_two_steps(name):
    """{parameter: its gradient after two DDP steps}, None where it has none."""
    module = DistributedDataParallel(make(name))
    rank = torch.distributed.get_rank()
    for step in range(2):  # the second would fail if a parameter had waited in the first
        module.zero_grad()
        module(faces(3) * (1 - 0.1 * rank - 0.2 * step)).sin().sum().backward()
    return {n: p.grad for n, p in module.module.named_parameters()}


@pytest.mark.parametrize("name", [pytest.param("mbf_tiny", marks=pytest.mark.long), "r18"])
def test_ddp_reduces_every_parameter_but_the_frozen_gain(name):
    first, second = ranks.run(2, gradients_of_two_steps, name)
    without = [key for key, gradient in first.items() if gradient is None]
    assert without == (["features.weight"] if name == "r18" else [])
    for key, gradient in first.items():
        if gradient is not None:
            assert torch.equal(gradient, second[key]), key
