"""Weights of the field: state dicts built from their own code's names, computed as they compute."""

from __future__ import annotations

import struct
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from data_tools.common.errors import UserError
from recognition.backbones import BACKBONES
from recognition.checkpoint import load_state
from recognition.run.run_dir import initial_weights
from recognition.weights import foreign, mxnet_params
from recognition.weights.networks import open_embedder
from tests.real import ROOT
from tests.recognition.backbones.test_backbones import faces

BLOCKS = {"r18": (2, 2, 2, 2), "r34": (3, 4, 6, 3), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3)}
WIDTHS = (64, 128, 256, 512)
MXNET = ROOT / ".venv-peers" / "bin" / "python"
PEER = ROOT / "tests" / "recognition" / "mxnet_peer.py"


class TheirBlock(nn.Module):
    """BasicBlockIR of AdaFace and CVLface."""

    def __init__(self, a, b, stride):
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride) if a == b
            else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        )  # fmt: skip
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b),
            nn.PReLU(b), nn.Conv2d(b, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b),
        )  # fmt: skip

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Theirs(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        layers, channels = [], 64
        for width, count in zip(WIDTHS, blocks, strict=True):
            for i in range(count):
                layers.append(TheirBlock(channels, width, 2 if i == 0 else 1))
                channels = width
        self.body = nn.Sequential(*layers)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(), nn.Linear(512 * 49, 512),
            nn.BatchNorm1d(512, affine=False),
        )  # fmt: skip

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


def unlike_the_start(module):
    """Every number another one, so that a wrong place shows."""
    torch.manual_seed(1)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return module.eval()


@pytest.fixture(scope="module")
def theirs():
    return unlike_the_start(Theirs(BLOCKS["r18"]))


def ours(name, state):
    module = BACKBONES[name]()
    load_state(module, state, "x")
    return module.eval()


def near(a, b):
    return (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("wrapper", ["adaface", "cvlface", "cvlface wrapped", "bare"])
def test_ir_networks_of_adaface_and_cvlface(theirs, wrapper, tmp_path):
    state = theirs.state_dict()
    if wrapper == "adaface":
        state = {f"model.{k}": v for k, v in state.items()} | {"head.kernel": torch.zeros(512, 9)}
        state = {"state_dict": state, "epoch": 3}
    elif wrapper != "bare":
        prefix = "model.net." if "wrapped" in wrapper else "net."
        state = {prefix + k: v for k, v in state.items()}
    path = tmp_path / ("x.ckpt" if wrapper == "adaface" else "x.pt")
    torch.save(state, path)
    module = ours("r18", foreign.read_weights(str(path)))
    rgb = faces(2)
    with torch.no_grad():
        expected = theirs(rgb.flip(1) if wrapper == "adaface" else rgb)
        assert near(module(rgb), expected)
        turned = ours("r18", initial_weights(str(path), "BGR"))(rgb)
        assert near(turned, theirs(rgb.flip(1)))


@pytest.mark.parametrize("name", ["r50", "r100"])
def test_every_name_of_the_published_ir_networks_is_placed(name, tmp_path):
    with torch.device("meta"):
        shapes = Theirs(BLOCKS[name]).state_dict()
        own = BACKBONES[name]().state_dict()
    state = {k: torch.empty(v.shape).expand(v.shape) for k, v in shapes.items()}
    placed = foreign._from_ir(state)
    assert {k: v.shape for k, v in placed.items()} == {k: v.shape for k, v in own.items()}


@pytest.mark.parametrize("name", ["mbf_tiny", "r18", "vit_t"])
def test_arcface_torch_files_as_they_are(name, tmp_path):
    module = unlike_the_start(BACKBONES[name](embedding_size=64))
    whole = {
        "x.pt": module.state_dict(),
        "x.pth": {f"module.{k}": v for k, v in module.state_dict().items()},
        "checkpoint_gpu_0.pt": {
            "epoch": 2,
            "state_dict_backbone": {f"module.{k}": v for k, v in module.state_dict().items()},
            "state_dict_softmax_fc": {"weight": torch.zeros(10, 64)},
        },
    }
    for file, state in whole.items():
        torch.save(state, tmp_path / file)
        found = foreign.read_weights(str(tmp_path / file))
        assert all(torch.equal(found[k], v) for k, v in module.state_dict().items())
        assert len(found) == len(module.state_dict())
        assert open_embedder(tmp_path / file).facts["network"] == name


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


WRAPPED = {
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled ddp": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "ddp compiled": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "compiled blocks": lambda s: {k.replace(".", "._orig_mod.", 1): v for k, v in s.items()},
    "no counters": without_counters,
    "net_state_dict": lambda s: {"iters": 5, "net_state_dict": s},
    "backbone and optimiser": lambda s: {"backbone": s, "optimizer": {"state": {}}, "epoch": 1},
    "deep": lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}},
    "unknown name": lambda s: {"my_weights": s, "step": 3, "args": {"lr": 0.1}},
    "beside the loss": lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()}
                                  | {"margin.weight": torch.zeros(9, 64)}},
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_the_usual_wrappings(wrapping, tmp_path):
    module = unlike_the_start(BACKBONES["mbf_tiny"](embedding_size=64))
    torch.save(WRAPPED[wrapping](module.state_dict()), tmp_path / "x.pt")
    found = foreign.read_weights(str(tmp_path / "x.pt"))
    expected = module.state_dict()
    assert found.keys() == expected.keys()
    for name in without_counters(expected):
        assert torch.equal(found[name], expected[name])
    assert open_embedder(tmp_path / "x.pt").facts["network"] == "mbf_tiny"


def test_an_ir_network_without_counters(theirs, tmp_path):
    torch.save({"net_state_dict": without_counters(theirs.state_dict())}, tmp_path / "x.ckpt")
    module = ours("r18", foreign.read_weights(str(tmp_path / "x.ckpt")))
    with torch.no_grad():
        assert near(module(faces(1)), theirs(faces(1)))


def test_a_refusal_names_the_keys_that_are_there(tmp_path):
    state = {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}, "epoch": 3}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"found the keys a \(dict\), b \(dict\), epoch \(int\)"):
        foreign.read_weights(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".params"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<html><body>Sign in", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0\0", "compressed by gzip"),
        (b"", "an empty file"),
    ],
)
def test_another_file_under_this_name_is_named(content, what, suffix, tmp_path):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"; it is {what}"):
        foreign.read_weights(str(tmp_path / f"x{suffix}"))


def test_torchscript_is_named_with_the_remedy(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="it is a TorchScript archive.*state_dict"):
        foreign.read_weights(str(tmp_path / "x.pt"))


def test_what_does_not_fit_is_listed(theirs, tmp_path):
    state = dict(theirs.state_dict())
    state["body.0.res_layer.1.weight"] = torch.zeros(64, 64, 5, 5)
    del state["output_layer.3.bias"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError) as error:
        ours("r18", foreign.read_weights(str(tmp_path / "x.pt")))
    text = str(error.value)
    for words in ("missing fc.bias", "unexpected extra.weight", "layer1.0.conv1.weight is"):
        assert words in text


class Planted:
    def __reduce__(self):
        return (print, ("a command that ran",))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys):
    torch.save({"x": Planted()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        foreign.read_weights(str(tmp_path / "x.pt"))
    assert "ran" not in capsys.readouterr().out


# MXNet


def mxnet_names(blocks):
    """{name: shape} of InsightFace's fresnet, version_unit 3, version_output E."""
    names = {"arg:conv0_weight": (64, 3, 3, 3), "arg:relu0_gamma": (64,)}

    def norm(at, width):
        names.update({f"arg:{at}_gamma": (width,), f"arg:{at}_beta": (width,)})
        names.update({f"aux:{at}_moving_mean": (width,), f"aux:{at}_moving_var": (width,)})

    norm("bn0", 64)
    channels = 64
    for stage, (width, count) in enumerate(zip(WIDTHS, blocks, strict=True), 1):
        for unit in range(1, count + 1):
            at = f"stage{stage}_unit{unit}"
            norm(f"{at}_bn1", channels)
            names[f"arg:{at}_conv1_weight"] = (width, channels, 3, 3)
            norm(f"{at}_bn2", width)
            names[f"arg:{at}_relu1_gamma"] = (width,)
            names[f"arg:{at}_conv2_weight"] = (width, width, 3, 3)
            norm(f"{at}_bn3", width)
            if unit == 1:
                names[f"arg:{at}_conv1sc_weight"] = (width, channels, 1, 1)
                norm(f"{at}_sc", width)
            channels = width
    norm("bn1", 512)
    names |= {"arg:pre_fc1_weight": (512, 512 * 49), "arg:pre_fc1_bias": (512,)}
    norm("fc1", 512)
    return names


def mxnet_arrays(blocks):
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in mxnet_names(blocks).items():
        std = 0.1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:]))
        arrays[name] = random.normal(0, std, shape).astype(np.float32)
        if name.endswith(("_gamma", "_moving_var")) and "relu" not in name:
            arrays[name] = np.abs(arrays[name]) + 0.5
    return arrays


def written(arrays, path, magic=0xF993FAC9):
    """By the format's description, apart from the reader."""
    out = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for array in arrays.values():
        out += struct.pack("<I", magic) + (struct.pack("<i", 0) if magic == 0xF993FAC9 else b"")
        out += struct.pack(f"<I{array.ndim}q", array.ndim, *array.shape)
        out += struct.pack("<iii", 1, 0, {"f4": 0, "i8": 6}[array.dtype.str[1:]]) + array.tobytes()
    out += struct.pack("<Q", len(arrays))
    for name in arrays:
        out += struct.pack("<Q", len(name)) + name.encode()
    path.write_bytes(out)


def by_mxnet_rules(arrays, pixels, blocks):
    """The symbol's computation: pixels 0..255 -> embeddings, BatchNorm eps 2e-5, fc1 fix_gamma."""
    w = {n.split(":")[1]: torch.from_numpy(a).double() for n, a in arrays.items()}

    def norm(x, at, fixed=False):
        shape = (1, -1) + (1,) * (x.ndim - 2)
        y = (x - w[f"{at}_moving_mean"].view(shape)) / (
            w[f"{at}_moving_var"].view(shape) + 2e-5
        ).sqrt()
        gamma = torch.ones(1, dtype=x.dtype) if fixed else w[f"{at}_gamma"]
        return y * gamma.view(shape) + w[f"{at}_beta"].view(shape)

    def prelu(x, at):
        return functional.prelu(x, w[f"{at}_gamma"])

    x = (pixels - 127.5) * 0.0078125
    x = prelu(norm(functional.conv2d(x, w["conv0_weight"], padding=1), "bn0"), "relu0")
    for stage, count in enumerate(blocks, 1):
        for unit in range(1, count + 1):
            at, stride = f"stage{stage}_unit{unit}", 2 if unit == 1 else 1
            y = functional.conv2d(norm(x, f"{at}_bn1"), w[f"{at}_conv1_weight"], padding=1)
            y = prelu(norm(y, f"{at}_bn2"), f"{at}_relu1")
            y = functional.conv2d(y, w[f"{at}_conv2_weight"], stride=stride, padding=1)
            if unit == 1:
                x = functional.conv2d(x, w[f"{at}_conv1sc_weight"], stride=stride)
                x = norm(x, f"{at}_sc")
            x = norm(y, f"{at}_bn3") + x
    x = norm(x, "bn1").flatten(1) @ w["pre_fc1_weight"].T + w["pre_fc1_bias"]
    return norm(x, "fc1", fixed=True)


@pytest.mark.long
def test_mxnet_params_without_mxnet(tmp_path):
    arrays = mxnet_arrays(BLOCKS["r18"])
    path = tmp_path / "model-0000.params"
    written(arrays, path)
    module = ours("r18", foreign.read_weights(str(path)))
    pixels = (faces(1, torch.float64) + 1) * 127.5
    with torch.no_grad():
        expected = by_mxnet_rules(arrays, pixels, BLOCKS["r18"])
        assert near(module(((pixels - 127.5) / 127.5).float()).double(), expected)
    arrays["arg:stage1_unit1_se_conv1_weight"] = np.zeros((4, 64, 1, 1), np.float32)
    written(arrays, path)
    with pytest.raises(ValueError, match="1 arrays are not .* stage1_unit1_se_conv1_weight"):
        foreign.read_weights(str(path))


@pytest.mark.parametrize("magic", [0xF993FAC9, 0xF993FAC8])
def test_params_of_each_version_and_damaged_ones(magic, tmp_path):
    arrays = {"arg:a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([2**40])}
    written(arrays, tmp_path / "x.params", magic)
    found = mxnet_params.read(tmp_path / "x.params")
    assert all(np.array_equal(found[k], v) for k, v in arrays.items())
    whole = (tmp_path / "x.params").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "y.params").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is no MXNet parameter file"):
            mxnet_params.read(tmp_path / "y.params")


@pytest.mark.peers
@pytest.mark.skipif(not MXNET.exists(), reason=f"no MXNet at {MXNET}: run `make test-peers`")
def test_real_mxnet_writes_what_we_read(tmp_path):
    script = (
        "import numpy as np, mxnet as mx, sys\n"
        "r = np.random.RandomState(0)\n"
        "a = {f'arg:{t}': mx.nd.array(r.randn(*s), dtype=t) for t, s in "
        "[('float32', (2, 3)), ('float64', (5,)), ('float16', (1, 2, 3, 4)), ('int32', (4,)),"
        " ('uint8', (3,)), ('int8', (2, 2)), ('int64', (7,))]}\n"
        "mx.nd.save(sys.argv[1], a)\n"
        "np.savez(sys.argv[2], **{k: v.asnumpy() for k, v in a.items()})\n"
    )
    stem = tmp_path / "x"
    done = subprocess.run(
        [MXNET, "-c", script, f"{stem}.params", f"{stem}.npz"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, expected = mxnet_params.read(f"{stem}.params"), np.load(f"{stem}.npz")
    assert set(found) == set(expected.files)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and np.array_equal(array, expected[name])


@pytest.mark.peers
@pytest.mark.skipif(not MXNET.exists(), reason=f"no MXNet at {MXNET}: run `make test-peers`")
def test_a_network_that_real_mxnet_saved_gives_its_embeddings(tmp_path):
    """A symbol of LResNet-E-IR, computed and saved by MXNet itself."""
    pixels = ((faces(1) + 1) * 127.5).numpy()
    np.save(tmp_path / "pixels.npy", pixels)
    done = subprocess.run(
        [MXNET, PEER, tmp_path / "model", tmp_path / "pixels.npy", tmp_path / "out.npy",
         *map(str, BLOCKS["r18"])],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    module = ours("r18", foreign.read_weights(str(tmp_path / "model-0000.params")))
    with torch.no_grad():
        found = module(torch.from_numpy((pixels - 127.5) / 127.5)).double()
    assert near(found, torch.from_numpy(np.load(tmp_path / "out.npy")).double())


def test_command(theirs, tmp_path, capsys):
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    out = tmp_path / "out.safetensors"
    assert foreign.main([str(tmp_path / "x.pt"), str(out), "--color-order", "BGR"]) == 0
    assert "takes RGB" in capsys.readouterr().out
    with torch.no_grad():
        found = ours("r18", initial_weights(str(out)))(faces(1))
        assert near(found, theirs(faces(1).flip(1)))
    assert foreign.main([str(tmp_path / "none.params"), str(out)]) == 1
    assert "error:" in capsys.readouterr().err


def test_damaged_files_are_told_by_name(tmp_path):
    """Wherever the bytes are wrong: an error that names the file, or the tensors that are left."""
    path = tmp_path / "x.pt"
    torch.save({"a.weight": torch.arange(3.0)}, path)
    whole, drawn = path.read_bytes(), np.random.default_rng(0)
    wrong = [b"", b"hello world", b"\x80\x02}q\x00."]
    wrong += [whole[:200] + b"\xff\xfe\x00" + whole[203:], *(whole[:n] for n in (1, 99, 600))]
    for _ in range(60):
        changed = bytearray(whole)
        changed[drawn.integers(len(whole))] ^= 1 + int(drawn.integers(255))
        wrong.append(bytes(changed))
    refused = 0
    for content in wrong:
        path.write_bytes(content)
        try:
            foreign.read_weights(str(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({1: torch.ones(2)}, "not a state dict"),
        ({}, "not one tensor"),
        ({"a": torch.tensor([1.0, np.nan])}, "hold NaN or infinity, a"),
        ({"a": torch.ones(2)}, "fit none of our networks (r18, "),
        ({"conv1.weight": torch.ones(64, 3, 3, 3)}, "as r18, the nearest: "),
        (nn.Linear(2, 2), "save the network's state_dict()"),
    ],
)
def test_the_command_refuses_what_is_no_network(state, told, tmp_path, capsys):
    torch.save(state, tmp_path / "x.pt")
    assert foreign.main([str(tmp_path / "x.pt"), str(tmp_path / "y.safetensors")]) == 1
    assert told in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_tensors_of_one_storage_are_written_each(tmp_path, capsys):
    state = BACKBONES["mbf_tiny"](embedding_size=16).state_dict()
    norms = [name for name in state if name.endswith("1.weight") and len(state[name]) == 32][:3]
    one = torch.arange(34.0)
    parts = one[:32], one[:32], one[2:]
    torch.save({**state, **dict(zip(norms, parts, strict=True))}, tmp_path / "x.pt")
    out = tmp_path / "y.safetensors"
    assert foreign.main([str(tmp_path / "x.pt"), str(out)]) == 0
    assert "mbf_tiny" in capsys.readouterr().out
    written = foreign.read_weights(str(out))
    for name, part in zip(norms, parts, strict=True):
        assert torch.equal(written[name], part)
    for name, told in (("y.pt", "*.safetensors"), ("none/y.safetensors", "make it first")):
        assert foreign.main([str(tmp_path / "x.pt"), str(tmp_path / name)]) == 1
        assert told in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.pt", "y.safetensors"]


def test_a_bug_in_a_reader_is_no_mistake_of_the_users(tmp_path, monkeypatch):
    """It keeps its type, and so its traceback, through the command and through init_from=."""

    def unwrapped(state):
        raise ValueError("not enough values to unpack")

    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    monkeypatch.setattr(foreign, "_unwrapped", unwrapped)
    for call in (
        lambda: foreign.main([str(tmp_path / "x.pt"), str(tmp_path / "y.safetensors")]),
        lambda: initial_weights(str(tmp_path / "x.pt")),
    ):
        with pytest.raises(ValueError, match="not enough values") as raised:
            call()
        assert type(raised.value) is ValueError


def test_an_ir_network_of_odd_tensors_is_listed(tmp_path):
    odd = {"input_layer.0.weight": torch.ones(1), "body.0.res_layer.4.weight": torch.tensor(1.0)}
    torch.save(odd, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="unexpected body.0"):
        ours("r18", foreign.read_weights(str(tmp_path / "x.pt")))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, dtype=torch.complex64), "complex"),
        (torch.ones(3, device="meta"), "without content"),
    ],
)
def test_tensors_that_cannot_be_weights_are_named(tensor, kind, tmp_path):
    torch.save({"good": torch.ones(2), "fc.weight": tensor}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt: fc.weight is {kind}: weights are dense"):
        foreign.read_weights(str(tmp_path / "a.pt"))


def test_weights_of_eight_bits_are_read(tmp_path):
    weight = torch.randn(4, 3).to(torch.float8_e4m3fn)
    save_file({"fc.weight": weight}, tmp_path / "a.safetensors")
    found = foreign.read_weights(str(tmp_path / "a.safetensors"))["fc.weight"]
    assert found.dtype == torch.float32 and found.equal(weight.float())


def test_a_directory_under_the_name_of_weights_is_named(tmp_path):
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match=name):
            foreign.read_weights(str(tmp_path / name))


def test_an_ir_network_that_lacks_a_block_is_listed(theirs, tmp_path):
    state = {n: v for n, v in theirs.state_dict().items() if not n.startswith("body.1.")}
    with pytest.raises(UserError, match="does not fit this network"):
        foreign.network_of(foreign.read_weights(saved(state, tmp_path)), "a.pt")


def saved(state, directory):
    torch.save(state, directory / "a.pt")
    return str(directory / "a.pt")
