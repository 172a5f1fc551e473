"""Published weights of the field as state dicts of our backbones.

    python -m recognition.convert SOURCE OUT.safetensors [--color-order BGR]

Read: InsightFace's backbone.pth / model.pt and checkpoint_gpu_*.pt (arcface_torch, every network);
CVLface's and AdaFace's IR-18/34/50/101 (model.pt, .ckpt); MXNet's .params of InsightFace's r34,
r50, r100 (LResNet-E-IR); safetensors. `init_from=` of a run takes the same files.

Differences are folded into the weights, so that our network computes what theirs did:
- IR blocks of equal width take every second pixel as their shortcut; ours have a convolution and a
  BatchNorm there: the identity.
- MXNet's networks see (pixel - 127.5) / 128, ours / 127.5: the first convolution takes the factor.
  Their BatchNorm adds 2e-5 to the variance, ours 1e-5: the variance takes the difference.
- Weights for BGR images (AdaFace's): the first convolution's input channels are reversed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from data_tools.common import content, files
from data_tools.common.errors import USER_ERRORS, UserError
from recognition.backbones import BACKBONES, shapes_alone
from recognition.checkpoint.reading import misfit
from recognition.checkpoint.tensors import mapping
from recognition.weights import mxnet_params

WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".safetensors", ".params")

_TORCH_MAGIC = (b"PK", b"\x80\x02")  # a zip; a pickle, as torch wrote before 1.6
_OUR_EPS, _MXNET_EPS = 1e-5, 2e-5
_WIDTHS = (64, 128, 256, 512)
_WRAPPERS = ("module.", "model.", "net.", "backbone.", "network.", "student.")  # DDP, CVLface ...
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile
_INSIDE = (
    "state_dict_backbone",
    "backbone_state_dict",
    "backbone",
    "state_dict",
    "model_state_dict",
    "net_state_dict",
    "model_state",
    "net",
    "model",
    "network",
    "student",
    "module",
    "weights",
    "params",
    "ema_state_dict",
    "ema",
    "model_ema",
)
_SHOWN = 8  # keys of a file that an error lists


def read_weights(path: str, color_order: str | None = None) -> dict[str, Tensor]:
    """The backbone in the file at `path`, with our names; it takes RGB.

    color_order: of the images that the weights were trained on; None: BGR for AdaFace's own
        checkpoints (they hold its head's kernel), RGB for all others.

    Raises:
        ValueError: the file cannot be read, or holds something else than finite tensors by name.
    """
    if path.endswith(".onnx"):
        raise UserError(
            f"{path}: the BatchNorms of an ONNX graph are folded into other weights, so it cannot "
            "become a network that trains: start from the .pt or the run that it was exported "
            "from, or use it as it is: teacher=, init_head= and `python -m eval` take it"
        )
    state = _tensors(path)
    bgr = "head.kernel" in state if color_order is None else color_order == "BGR"
    state = _counted(_unwrapped(state))
    if "conv0_weight" in state:
        state = _from_mxnet(state, path)
    elif "input_layer.0.weight" in state:
        state = _from_ir(state)
    if bgr:
        first = next((n for n in state if state[n].ndim == 4 and state[n].shape[1] == 3), None)
        if first is None:
            raise UserError(f"{path}: no convolution of three channels to turn from BGR to RGB")
        state[first] = state[first].flip(1)
    wrong = [n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} tensors hold NaN or infinity, {', '.join(wrong[:4])}: the file "
            "is damaged or its training diverged; take another one"
        )
    return state


def read_torch(path: str, mapped: bool = False) -> Any:
    """The content of a file of torch.save, read without running any code in it.

    mapped: read the tensors' bytes when they are used, where the file's kind allows it.

    Raises:
        ValueError: damaged, or it holds more than tensors and plain containers.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == _TORCH_MAGIC[0]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can fail anywhere in torch's reader
        reason = "it is damaged, or torch.save did not write it"
        if files.read_bytes(path)[:2] in _TORCH_MAGIC and "eights only" in str(error):
            reason = (
                "it holds objects beside tensors and plain containers, which could run code: "
                "save the network's state_dict()"
            )
        hint = content.hint(path, "torch.save (.pt)")
        raise UserError(f"{path} cannot be read as weights: {reason}{hint}") from error


def _tensors(path: str) -> dict[str, Tensor]:
    """Tensors by name, whatever they are wrapped in."""
    if path.endswith(".params"):
        arrays = mxnet_params.read(path)
        return {n.split(":", 1)[-1]: torch.from_numpy(a).float() for n, a in arrays.items()}
    if path.endswith(".safetensors"):
        try:
            with open(path, "rb"), mapping(path):  # open()'s own error of a directory names it
                return _plain(safetensors.torch.load_file(path), path)
        except safetensors.SafetensorError as error:
            hint = content.hint(path, "a safetensors")
            raise UserError(f"{path} cannot be read as weights: {error}{hint}") from error
    found = read_torch(path)
    state = _inside(found)
    if not _is_state(state):
        raise UserError(
            f"{path} is not a state dict: expected tensors by name, found {_listed(found)}; save "
            "the network's state_dict()"
        )
    return _plain(state, path)


def _plain(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors that every operation takes; those of eight bits as float32.

    Raises: UserError naming the first of another kind.
    """
    return {name: dense(value, f"{path}: {name}") for name, value in state.items()}


def dense(tensor: Tensor, where: str) -> Tensor:
    """A tensor of real numbers in memory, float32 in place of eight-bit floats.

    Raises: UserError naming `where` for a sparse, quantised, complex or absent one.
    """
    wrong = (
        ("sparse", tensor.layout != torch.strided),
        ("quantised", tensor.is_quantized),
        ("complex", tensor.is_complex()),
        ("without content", tensor.is_meta),
    )
    if kinds := [kind for kind, applies in wrong if applies]:
        raise UserError(
            f"{where} is {' and '.join(kinds)}: weights are dense tensors of real numbers. Convert "
            "it where the file was made, and save the state_dict() anew"
        )
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # torch computes nothing in them
        return tensor.float()
    return tensor


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )


def _inside(found: Any) -> Any:
    """The state dict in a training checkpoint, as deep as it is wrapped."""
    while isinstance(found, Mapping) and not _is_state(found):
        names = [name for name in _INSIDE if isinstance(found.get(name), Mapping)]
        if not names:  # an unknown name, if it is the only state dict
            names = [name for name, value in found.items() if _is_state(value) and value]
            names = names if len(names) == 1 else []
        if not names:
            break
        found = found[names[0]]
    return found


def _listed(found: Any) -> str:
    """The keys of an object that is not a state dict, for a message."""
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    kinds = [f"{str(name)[:80]} ({type(value).__name__})" for name, value in found.items()]
    more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
    return f"the keys {', '.join(kinds[:_SHOWN])}{more}"


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors of a training checkpoint, without the prefixes of wrappers."""
    for part in _ANYWHERE:
        state = {name.replace(part, ""): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if own := {n: v for n, v in state.items() if n.startswith("backbone.")}:
        state = own  # and not the loss's rows beside it
    while prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        if not state:
            break
    return state


def _counted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the BatchNorms' counters of batches, which files of torch before 0.4.1 lack."""
    for name in [name for name in state if name.endswith(".running_mean")]:
        counter = name.removesuffix("running_mean") + "num_batches_tracked"
        state.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return state


def _stage_of(blocks: list[int]) -> list[tuple[int, int]]:
    """(stage from 1, index in it) of each block, from the blocks' widths in their order."""
    places: list[tuple[int, int]] = []
    for i, width in enumerate(blocks):
        stage = _WIDTHS.index(width) + 1
        same = i > 0 and blocks[i - 1] == width
        places.append((stage, places[-1][1] + 1 if same else 0))
    return places


def _from_ir(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdaFace's and CVLface's IR networks; names that are not theirs stay as they are."""
    numbers = sorted({int(f[1]) for n in state if (f := re.match(r"body\.(\d+)\.", n))})
    last = [state.get(f"body.{i}.res_layer.4.weight") for i in numbers]
    widths = [len(weight) for weight in last if weight is not None and weight.ndim == 4]
    if len(widths) != len(numbers) or not set(widths) <= set(_WIDTHS):
        return state  # bottlenecks or others: load_state lists what does not fit
    names = {
        "input_layer.0": "conv1",
        "input_layer.1": "bn1",
        "input_layer.2": "prelu",
        "output_layer.0": "bn2",
        "output_layer.3": "fc",
        "output_layer.4": "features",
    }
    inside = {
        "res_layer.0": "bn1",
        "res_layer.1": "conv1",
        "res_layer.2": "bn2",
        "res_layer.3": "prelu",
        "res_layer.4": "conv2",
        "res_layer.5": "bn3",
        "shortcut_layer.0": "downsample.0",
        "shortcut_layer.1": "downsample.1",
    }
    ours: dict[str, Tensor] = {}
    for i, width, (stage, index) in zip(numbers, widths, _stage_of(widths), strict=True):
        names |= {f"body.{i}.{a}": f"layer{stage}.{index}.{b}" for a, b in inside.items()}
        if index == 0 and f"body.{i}.shortcut_layer.0.weight" not in state:
            ours |= _identity(f"layer{stage}.{index}.downsample", width)
    for name, value in state.items():
        at, _, leaf = name.rpartition(".")
        ours[f"{names.get(at, at)}.{leaf}"] = value
    size = ours["features.running_mean"].numel() if "features.running_mean" in ours else 0
    if size:  # theirs has neither gain nor bias
        ours.setdefault("features.weight", torch.ones(size))
        ours.setdefault("features.bias", torch.zeros(size))
    return ours


def _identity(at: str, width: int) -> dict[str, Tensor]:
    """A 1x1 convolution and a BatchNorm that change nothing."""
    return {
        f"{at}.0.weight": torch.eye(width)[:, :, None, None],
        f"{at}.1.weight": torch.ones(width),
        f"{at}.1.bias": torch.zeros(width),
        f"{at}.1.running_mean": torch.zeros(width),
        f"{at}.1.running_var": torch.full((width,), 1 - _OUR_EPS),
        f"{at}.1.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }


_MXNET_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
    "weight": "weight",
    "bias": "bias",
}
_MXNET_NAMES = {
    "conv0": "conv1",
    "bn0": "bn1",
    "relu0": "prelu",
    "bn1": "bn2",
    "pre_fc1": "fc",
    "fc1": "features",
}
_MXNET_UNIT = {
    "bn1": "bn1",
    "conv1": "conv1",
    "bn2": "bn2",
    "relu1": "prelu",
    "conv2": "conv2",
    "bn3": "bn3",
    "conv1sc": "downsample.0",
    "sc": "downsample.1",
}


def _from_mxnet(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """InsightFace's fresnet of MXNet (version_unit 3, version_output E)."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        leaf = next((x for x in _MXNET_LEAVES if name.endswith(f"_{x}")), "")
        at = name.removesuffix(f"_{leaf}")
        unit = re.fullmatch(r"stage(\d)_unit(\d+)_(\w+)", at)
        if leaf and unit and unit[3] in _MXNET_UNIT:
            place = f"layer{unit[1]}.{int(unit[2]) - 1}.{_MXNET_UNIT[unit[3]]}"
        elif leaf and at in _MXNET_NAMES:
            place = _MXNET_NAMES[at]
        else:
            unknown.append(name)
            continue
        if leaf == "moving_var":
            value = value + (_MXNET_EPS - _OUR_EPS)
            ours[f"{place}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        ours[f"{place}.{_MXNET_LEAVES[leaf]}"] = value
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} arrays are not of InsightFace's LResNet-E-IR: "
            f"{', '.join(unknown[:8])}"
        )
    ours["conv1.weight"] = ours["conv1.weight"] * (127.5 / 128)
    if "features.weight" in ours:
        ours["features.weight"] = torch.ones_like(ours["features.weight"])  # fix_gamma
    return ours


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recognition.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help=f"one of {', '.join(WEIGHT_FILES)}")
    parser.add_argument("out", help="file to write, OUT.safetensors")
    parser.add_argument(
        "--color-order",
        choices=["RGB", "BGR"],
        help="default: BGR for AdaFace's own, else RGB",
    )
    args = parser.parse_args(arguments)
    out = Path(args.out)
    try:
        if out.suffix != ".safetensors":
            raise UserError(f"{out}: name the output *.safetensors, by which readers know it")
        state = read_weights(args.source, args.color_order)
        if not state:
            raise UserError(f"{args.source} holds no backbone, not one tensor")
        network, _ = network_of(state, args.source)
        _write(state, out, {"source": args.source, "color_order": "RGB"})
    except (*USER_ERRORS, safetensors.SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    size = sum(value.numel() for value in state.values())
    print(f"{args.out}: {network}, {len(state)} tensors, {size / 1e6:.1f} M numbers, takes RGB")
    return 0


def network_of(state: Mapping[str, Tensor], source: str) -> tuple[str, int]:
    """(name, embedding size) of the network that these weights belong to.

    Raises:
        ValueError: none of ours; it lists what does not fit the nearest.
    """
    # All networks end in a BatchNorm of the embedding.
    sizes = [len(v) for n, v in state.items() if n.startswith("feature") and v.ndim == 1]
    size = sizes[-1] if sizes else 512
    common = {}  # of each network: how many names and shapes are the same, and the network
    for name in BACKBONES:
        with shapes_alone():
            module = BACKBONES[name](embedding_size=size)
        own = {n: v.shape for n, v in module.state_dict().items()}
        same = sum(n in state and state[n].shape == shape for n, shape in own.items())
        if same == len(own) == len(state):
            return name, size
        common[name] = same, module
    nearest = max(common, key=lambda name: common[name][0])
    if not common[nearest][0]:
        shown = ", ".join([*state][:_SHOWN]) + (", ..." if len(state) > _SHOWN else "")
        raise UserError(
            f"{source}: its {len(state)} tensors ({shown}) fit none of our networks "
            f"({', '.join(BACKBONES)}): export the network to ONNX to evaluate it"
        )
    raise UserError(f"as {nearest}, the nearest: {misfit(common[nearest][1], state, source)}")


def _write(state: Mapping[str, Tensor], out: Path, facts: dict[str, str]) -> None:
    """Complete or not at all."""
    if not files.is_dir(out.parent):
        raise UserError(f"{out}: there is no directory {out.parent}, make it first")
    tensors = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()
    }
    files.write_bytes(out, safetensors.torch.save(tensors, facts))


if __name__ == "__main__":
    sys.exit(main())
