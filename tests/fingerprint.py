"""A fingerprint of what the product computes, to show that a refactor changed nothing.

    python tests/fingerprint.py before.json               record (some minutes on two cores)
    python tests/fingerprint.py after.json --only resume  record the cases whose name this finds
    python tests/fingerprint.py --compare before.json after.json

It packs a small set, trains about sixty tiny runs on 1, 2 and 4 processes, exports, evaluates and
runs the other commands, and writes numbers and hashes as one sorted JSON. `--compare` prints what
differs and exits 1. Only commands and the names of DESIGN section 7 are used, so the same script
runs before and after files move. Times, hosts, paths, commits and dates are left out.

The processes are started once. Each runs the commands in itself, as `python -m` would.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TRAIN, DEMO = str(ROOT / "launch" / "train.py"), str(ROOT / "launch" / "configs" / "demo.py")
EXPORT = str(ROOT / "launch" / "export.py")
_SECONDS = 600  # until a command counts as hung
# Keys of JSON output that hold times, places or versions.
_VARYING = {
    "sha256",
    "of",
    "network",
    "bytes",
    "fingerprint",
    "training_index_sha256",
    "images_per_second",
    "seconds",
    "time",
    "date",
    "commit",
    "host",
    "path",
    "memory",
    "created",
    "output",
    "rec",
    "cache",
    "version",
    "versions",
    "model",
    "dir",
    "file",
    "saved_at",
    "elapsed",
    "data_wait",
    "peak_memory",
    "gpu",
    "device",
    "torch",
    "source",
    "sources",
    "hash",
    "from",
}

BASE = {
    "rec": "set",
    "val_targets": "heldout",
    "network": "mbf_tiny",
    "embedding_size": 32,
    "margin": "arcface",
    "sample_rate": 0.5,
    "global_batch_size": 12,
    "lr": 0.05,
    "max_steps": 4,
    "checkpoint_every": 2,
    "verify_every": 4,
    "keep_checkpoints": 9,
    "log_every": 1,
    "num_workers": 1,
    "seed": 3,
    "precision": "fp32",
    "preflight_seconds": 0,
}
MARGINS = (
    "softmax",
    "arcface",
    "cosface",
    "sphereface",
    "spherefacer",
    "combined",
    "adaface",
    "magface",
    "elasticface",
    "adacos",
    "kappaface",
    "jamsface",
    "adam",
    "dynamicarcface",
    "interface",
    "curricularface",
    "mvsoftmax",
    "circle",
    "uniface",
    "sphereface2",
)


def runs() -> dict[str, tuple[int, dict[str, Any]]]:
    """Every training run by name: (number of processes, keys beside BASE), in order."""
    cases: dict[str, tuple[int, dict[str, Any]]] = {}
    for name in MARGINS:
        cases[f"margin {name}"] = (2, {"margin": name})
    for world in (1, 2, 4):
        for rate in (1.0, 0.5):
            for storage in ("device", "host"):
                keys = {"sample_rate": rate, "head_storage": storage}
                cases[f"world {world} rate {rate} {storage}"] = (world, keys)
    for name, keys in {
        "accumulation": {"accumulation": 2},
        "accumulation host": {
            "accumulation": 2,
            "head_storage": "host",
            "global_batch_size": 16,
        },
        "accumulation kappaface": {"accumulation": 2, "margin": "kappaface"},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
        "fp64": {"precision": "fp64"},
        "adamw": {"optimizer": "adamw", "lr": 0.001},
        "adamw host": {"optimizer": "adamw", "lr": 0.001, "head_storage": "host"},
        "adamw accumulation": {"optimizer": "adamw", "lr": 0.001, "accumulation": 2},
        "update_in_backward": {"update_in_backward": True},
        "plain": {"head_kernel": "plain"},
        "native": {"head_kernel": "native"},
        "stored 0": {"head_stored_mib": 0},
        "head bf16": {"head_precision": "bf16"},
        "sync_bn": {"sync_bn": True},
        "filtering": {"interclass_filtering_threshold": 0.2},
        "subcenters": {"num_subcenters": 3},
        "subcenters host": {"num_subcenters": 3, "head_storage": "host", "sample_rate": 1.0},
        "compression": {"gradient_compression": "bf16"},
        "cosine": {"schedule": "cosine", "warmup_epochs": 0.1, "clip_norm": "none"},
        "steps": {"schedule": "step", "lr_milestones": [0.1, 0.2], "clip_norm": 0.5},
        "augmented": {
            "crop_augmentation_prob": 0.5,
            "low_res_augmentation_prob": 0.5,
            "photometric_augmentation_prob": 0.5,
        },
        "two sets": {"rec": ["set", "other"], "rec_shares": [1, 1]},
        "two heads": {
            "rec": ["set", "other"],
            "rec_shares": [1, 1],
            "rec_heads": [{}, {"margin": "cosface", "sample_rate": 1.0}],
        },
        "rollback": {"on_spike": "rollback", "loss_spike_factor": 1000.0},
        "frozen": {"freeze": ["layers.0.*"], "init_from": "runs/world 1 rate 1.0 device"},
        "teacher": {"teacher": "runs/world 1 rate 1.0 device", "teacher_weight": 2.0},
        "classic": {"rec": "classic", "val_targets": []},
    }.items():
        cases[name] = (2, keys)
    for world in (1, 2, 4):
        for of in ("adamw", "margin kappaface", "accumulation host", "margin curricularface"):
            keys = cases[of][1] | {"resume": f"runs/{of}/checkpoints/step-2"}
            cases[f"resume {of} at {world}"] = (world, keys)
    return cases


# --- Commands, run in processes that stay ---------------------------------------------------------


class Workers:
    """Processes that run commands as `python FILE` and `python -m MODULE` would, started once."""

    def __init__(self, count: int, directory: str) -> None:
        self._count, self._directory, self._world = count, directory, 1
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._directory), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world: int, *command: str) -> tuple[int, str, str]:
        """The exit code of the first rank that failed, rank 0's stdout, and that rank's stderr."""
        if world > self._world > 1:  # ranks number their exchanges from the start of their process
            self.close()
            self._start()
        self._world = world if world > 1 else self._world
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world):
            self._pipes[rank].send((rank, world, port, command))
        answers = []
        for rank in range(world):
            if not self._pipes[rank].poll(_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} hangs in {' '.join(command)}")
            answers.append(self._pipes[rank].recv())
        failed = next((answer for answer in answers if answer[0]), answers[0])
        return failed[0], answers[0][1], failed[2]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(pipe: Any, directory: str) -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    os.chdir(directory)
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(file.fileno(), descriptor)
        os.set_inheritable(descriptor, True)
    while True:
        try:
            rank, world, port, command = pipe.recv()
        except EOFError:
            return
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if command[0] == TRAIN:
            os.environ.update({key: str(value) for key, value in own.items()})
        else:
            for key in own:
                os.environ.pop(key, None)
        code = 0
        try:
            _execute(command)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            code = 1
            traceback.print_exc()
        if torch.distributed.is_initialized():  # a run that failed leaves its group
            torch.distributed.destroy_process_group()
        pipe.send((code, _written(sys.stdout, out), _written(sys.stderr, err)))


def _written(stream: Any, file: Any) -> str:
    """What went to `stream` since the last call."""
    stream.flush()
    file.seek(0)
    text = file.read().decode(errors="replace")
    file.truncate(0)
    file.seek(0)  # the stream shares this position
    return text


def _execute(command: tuple[str, ...]) -> None:
    argv = sys.argv
    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.argv = argv


# --- What is recorded -----------------------------------------------------------------------------


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


def tensors(path: Path) -> str:
    """The hash of a safetensors file's names, types, shapes and numbers; not of its header."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        for name in names:
            value = file.get_tensor(name)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            import torch

            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{len(names)} tensors {digest.hexdigest()[:20]}"


def files(directory: Path, root: Path) -> dict[str, str]:
    """The hash of every file below `directory` by relative path; JSON without what varies."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        if path.name == ".lock" or path.name.startswith("events.out"):
            continue
        if path.suffix == ".safetensors":
            found[name] = tensors(path)
        elif path.suffix == ".json":
            text = json.dumps(steady(json.loads(path.read_text())), sort_keys=True)
            found[name] = _short(text.replace(str(root), "").encode())
        else:
            found[name] = _short(path.read_bytes().replace(str(root).encode(), b""))
    return found


def steady(value: Any) -> Any:
    """`value` with null at every key that varies from run to run: the key itself is kept."""
    if isinstance(value, dict):
        return {
            key: None if key in _VARYING or key.startswith("seconds") else steady(x)
            for key, x in value.items()
        }
    if isinstance(value, list):
        return [steady(x) for x in value]
    return value


def graph(path: Path) -> dict[str, Any]:
    """An ONNX file: the hash of what it computes, and the keys of its metadata."""
    import onnx

    model = onnx.load(path)
    keys = sorted(entry.key for entry in model.metadata_props)
    model.producer_version = ""
    for part in (model, model.graph, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    for part in (
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    text = model.SerializeToString(deterministic=True)
    return {"sha256": _short(text), "nodes": len(model.graph.node), "metadata": keys}


def outcome(root: Path, name: str) -> dict[str, Any]:
    """What a training run left: its metrics, and the tensors of every checkpoint."""
    directory = root / "runs" / name
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"metrics": steady(records)}
    found["config keys"] = sorted(json.loads((directory / "config.json").read_text()))
    for checkpoint in sorted((directory / "checkpoints").iterdir()):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        found[checkpoint.name] = {
            path.name: tensors(path) for path in sorted(checkpoint.glob("*.safetensors"))
        } | {"manifest": sorted(manifest)}
    return found


# --- The cases ------------------------------------------------------------------------------------


def write_images(directory: Path, seed: int, people: int, images: int) -> None:
    """PNG files of coarse noise, a pattern a person: the same bytes on every processor."""
    import cv2
    import numpy as np

    draw = np.random.Generator(np.random.Philox(seed))
    for person in range(people):
        folder = directory / f"p{person:02d}"
        folder.mkdir(parents=True)
        pattern = draw.integers(0, 200, (14, 14, 3))
        for image in range(images):
            coarse = (pattern + draw.integers(0, 56, (14, 14, 3))).astype(np.uint8)
            pixels = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
            assert cv2.imwrite(str(folder / f"{image}.png"), pixels)


class Recorder:
    def __init__(self, root: Path, workers: Workers, only: str) -> None:
        self.root, self.workers, self.only = root, workers, only
        self.found: dict[str, Any] = {}

    def wanted(self, name: str) -> bool:
        return re.search(self.only, name) is not None

    def call(self, name: str, *command: str, reads: Callable[[], Any] | None = None) -> None:
        """Run a command; record its exit code, its last JSON line and what `reads` returns."""
        if not self.wanted(name):
            return
        code, out, err = self.workers.run(1, *command)
        entry: dict[str, Any] = {"exit": code}
        if code:
            print(f"{name}: exit {code}: {err.strip()[-300:]}", file=sys.stderr)
        else:
            last = out.strip().splitlines()[-1:] or [""]
            if last[0].startswith(("{", "[")):
                entry["json"] = steady(json.loads(last[0].replace(str(self.root), "")))
            if reads is not None:
                entry["files"] = reads()
        self.found[name] = entry

    def need(self, *command: str) -> None:
        """Run a command that other cases build on."""
        code, _, err = self.workers.run(1, *command)
        if code:
            raise RuntimeError(f"{' '.join(command)}: {err}")

    def train(self, name: str, world: int, keys: dict[str, Any]) -> None:
        target = self.root / "runs" / name
        if target.exists():
            return
        typed = BASE | keys | {"output": f"runs/{name}"}
        if isinstance(typed["rec"], list) or typed["rec"] == "classic":
            typed.pop("val_targets")
        began = time.monotonic()
        code, _, err = self.workers.run(
            world, TRAIN, DEMO, *[f"{key}={value}" for key, value in typed.items()]
        )
        if code:  # a precision that this CPU lacks, for one
            print(f"train {name}: exit {code}: {err.strip()[-600:]}", file=sys.stderr)
        entry = {"exit": code} if code else outcome(self.root, name)
        if self.wanted(f"train {name}"):
            self.found[f"train {name}"] = entry
        print(f"train {name}: {time.monotonic() - began:.1f} s", flush=True)


def record(root: Path, workers: Workers, only: str) -> dict[str, Any]:
    to = Recorder(root, workers, only)
    found = to.found
    if to.wanted("names"):
        found["names"] = names()
    if to.wanted("functions"):
        found["functions"] = functions(root)
    write_images(root / "faces", 7, 20, 8)
    write_images(root / "faces2", 8, 9, 6)
    shards = ("--shards", "2", "--workers", "1", "--seed", "5")
    held_out = ("--hold-out", "5", "--pairs", "40")
    to.need("-m", "data_tools", "pack", "faces", "set", *shards, *held_out)
    to.need("-m", "data_tools", "pack", "faces2", "other", *shards)
    _classic(root)
    if to.wanted("pack"):
        found["pack set"] = files(root / "set", root)
        found["pack other"] = files(root / "other", root)
    shutil.make_archive(str(root / "faces"), "zip", root / "faces")

    def left(name: str) -> Callable[[], dict[str, str]]:
        return lambda: files(root / name, root)

    for name, words in {
        "zip": ("faces.zip",),
        "again": ("set",),
        "classic": ("classic",),
        "two": ("--join", "offset", "faces", "faces2"),
        "most": ("--max-images", "3", "faces"),
        "split": ("--split", "identities=0.3", "faces"),
        "small": ("--size", "64", "faces"),
    }.items():
        to.call(
            f"pack {name}",
            "-m",
            "data_tools",
            "pack",
            *shards,
            "--json",
            *words,
            f"packed-{name}",
            reads=left(f"packed-{name}"),
        )
    data = ("-m", "data_tools")
    to.call("data inspect", *data, "inspect", "set", "--json")
    to.call("data verify", *data, "verify", "set", "--deep", "--json")
    to.call("data unpack", *data, "unpack", "set", "unpacked", "--json", reads=left("unpacked"))
    to.call("data pairs", *data, "pairs", "faces", "pairs.bin", "--pairs", "40", "--json")
    to.call(
        "data synthesize",
        *data,
        "synthesize",
        "drawn",
        "--identities",
        "3",
        "--images",
        "2",
        "--seed",
        "1",
        reads=left("drawn"),
    )

    cases = runs()
    for name, (world, keys) in cases.items():
        if to.wanted(f"train {name}"):
            for part in (str(keys.get(key, "")) for key in ("resume", "init_from", "teacher")):
                if part.startswith("runs/"):
                    source = part.split("/")[1]
                    to.train(source, *cases[source])
            to.train(name, world, keys)
    model = "runs/world 1 rate 1.0 device"
    to.train(model.split("/")[1], *cases[model.split("/")[1]])
    _commands(to, model)
    return found


def _classic(root: Path) -> None:
    """A classic InsightFace directory, written by the record writer of DESIGN section 7."""
    from data_tools.recordio import Header, Writer

    (root / "classic").mkdir()
    with Writer(root / "classic" / "train.idx", root / "classic" / "train.rec") as writer:
        images = sorted((root / "faces2").rglob("*.png"))
        for key, path in enumerate(images):
            writer.write(key, Header(0, float(path.parent.name[1:]), key, 0), path.read_bytes())
    (root / "classic" / "property").write_text("9,112,112\n")


def _commands(to: Recorder, model: str) -> None:
    root = to.root
    for name, words in {
        "fp32": (),
        "fp16": ("--precision", "fp16"),
        "int8": ("--precision", "int8"),
        "baked": ("--normalise", "--flip-sum", "--l2"),
    }.items():
        drop = ("--max-drop", "100")
        command = (EXPORT, model, f"{name}.onnx", "--data", "set", *words, *drop, "--json")
        to.call(f"export {name}", *command, reads=lambda n=name: graph(root / f"{n}.onnx"))
    keep = ("--cache", "none", "--results", "none", "--no-pictures", "--json")
    to.call("eval lfw run", "-m", "eval", "lfw", model, "set/heldout.bin", *keep)
    if to.wanted("eval lfw onnx"):
        if not (root / "fp32.onnx").exists():
            to.need(EXPORT, model, "fp32.onnx", "--data", "set")
        to.call("eval lfw onnx", "-m", "eval", "lfw", "fp32.onnx", "set/heldout.bin", *keep)
    images = sorted(str(p.relative_to(root / "faces")) for p in (root / "faces").rglob("*.png"))
    pairs = [f"{a} {b} {int(a[:3] == b[:3])}" for a in images[::7] for b in images[1::11]]
    (root / "pairs.txt").write_text("\n".join(pairs) + "\n")
    (root / "gallery.csv").write_text(
        "image,subject\n" + "".join(f"{x},{x[:3]}\n" for x in images if x.endswith("0.png"))
    )
    (root / "probes.csv").write_text(
        "image,subject\n" + "".join(f"{x},{x[:3]}\n" for x in images if x[-5] in "34")
    )
    at = ("--images", "faces")
    to.call("eval pairs", "-m", "eval", "pairs", model, "pairs.txt", *at, *keep)
    to.call(
        "eval identify",
        "-m",
        "eval",
        "identify",
        model,
        "--gallery",
        "gallery.csv",
        "--probes",
        "probes.csv",
        *at,
        *keep,
    )
    to.call("losses", "-m", "recognition.losses", "--json")
    checkpoint = ("-m", "recognition.checkpoint")
    to.call("checkpoint inspect", *checkpoint, "inspect", model, "--json")
    to.call("checkpoint verify", *checkpoint, "verify", model, "--json")
    merged = lambda: files(root / "merged", root)  # noqa: E731
    to.call("checkpoint merge", *checkpoint, "merge", model, "merged", "--json", reads=merged)
    exported = lambda: files(root / "network", root)  # noqa: E731
    to.call("checkpoint export", *checkpoint, "export", model, "network", "--json", reads=exported)
    weights = f"{model}/checkpoints/step-4/model.safetensors"
    converted = lambda: tensors(root / "converted.safetensors")  # noqa: E731
    to.call(
        "convert",
        "-m",
        "recognition.convert",
        weights,
        "converted.safetensors",
        "--color-order",
        "BGR",
        reads=converted,
    )
    plan = ("--gpus", "8", "--classes", "100000", "--memory", "40")
    recipe = str(ROOT / "launch" / "configs" / "wf42m_r100_cosface_pfc02.py")
    to.call("plan", "-m", "launch.plan", recipe, *plan, "--json")
    embedded = lambda: files(root / "embedded", root)  # noqa: E731
    to.call(
        "data embed",
        "-m",
        "data_tools",
        "embed",
        "set",
        model,
        "embedded",
        "--json",
        reads=embedded,
    )
    to.call(
        "inversion",
        "-m",
        "recognition.inversion",
        model,
        "--out",
        "inverted",
        "--ids",
        "0,1",
        "--steps",
        "3",
        "--json",
        reads=lambda: files(root / "inverted", root),
    )


NAMES = (
    "recognition.head.PartialFC",
    "recognition.optim.RowSGD",
    "recognition.optim.RowAdamW",
    "recognition.losses.MARGINS",
    "recognition.losses.margin.Margin",
    "recognition.backbones.make_backbone",
    "recognition.convert.main",
    "launch.plan.main",
    "data_tools.recordio.IndexedReader",
    "data_tools.recordio.Writer",
    "data_tools.shards.open",
    "eval.verification.evaluate",
    "eval.verification.tar_at_far",
    "eval.identification.evaluate",
    "eval.align.similarity",
)


def _signature(value: Any) -> str:
    """Parameters and defaults; no annotations, which name modules."""
    kept = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(value).parameters.values()
    ]
    return re.sub(r"<class '[\w.]*?(\w+)'>", r"<class \1>", str(inspect.Signature(kept)))


def names() -> dict[str, str]:
    """The names of DESIGN section 7 with their signatures."""
    found = {}
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        found[name] = _signature(value) if callable(value) else ", ".join(sorted(value))
    from recognition.head import PartialFC
    from recognition.losses import MARGINS as ours
    from recognition.optim import RowAdamW, RowSGD

    found |= {f"MARGINS {name}": _signature(margin) for name, margin in ours.items()}
    for kind in (PartialFC, RowSGD, RowAdamW):
        for method in ("forward", "step", "state_dict"):
            if hasattr(kind, method) and kind is not PartialFC or method == "forward":
                if hasattr(kind, method):
                    found[f"{kind.__name__}.{method}"] = _signature(getattr(kind, method))
    for command in ("train.py", "preflight.py", "export.py", "bench/gpu.sh"):
        found[f"launch/{command}"] = str((ROOT / "launch" / command).is_file())
    return found


def functions(root: Path) -> dict[str, Any]:
    """Numbers of the functions of DESIGN section 7, on seeded input."""
    import numpy as np
    import torch

    from data_tools import recordio
    from eval import align, identification, verification
    from recognition.backbones import make_backbone

    draw = np.random.Generator(np.random.Philox(11))
    points = draw.normal(56, 20, (5, 2))
    rows = draw.normal(size=(400, 16))
    same = np.arange(200) % 2 == 0
    rows[1::2][same] = rows[::2][same] + 0.7 * rows[1::2][same]
    scores, labels = draw.normal(size=5000), draw.random(5000) < 0.3
    gallery, probes = draw.normal(size=(30, 16)), draw.normal(size=(50, 16))
    ids = draw.integers(0, 35, 50)
    found: dict[str, Any] = {
        "similarity": align.similarity(points),
        "evaluate": verification.evaluate(rows, same),
        "identify": identification.evaluate(gallery, np.arange(30), probes, ids),
    }
    for rule in ("insightface", "strict"):
        fars = [1e-3, 1e-2, 0.1]
        found[f"tar {rule}"] = verification.tar_at_far(scores, labels == 1, fars, rule=rule)
    with recordio.Writer(root / "w.idx", root / "w.rec") as writer:
        for key in range(5):
            writer.write(key, recordio.Header(0, float(key), key, 0), bytes(range(key * 7)))
    found["recordio"] = _short((root / "w.rec").read_bytes() + (root / "w.idx").read_bytes())
    for name in ("r18", "vit_t", "mbf", "mbf_tiny"):
        torch.manual_seed(1)
        network = make_backbone(name, 32, {}).eval()
        out = network(torch.linspace(-1, 1, 3 * 112 * 112).reshape(1, 3, 112, 112))
        keys = _short("\n".join(network.state_dict()).encode())
        found[f"network {name}"] = [keys, *out.flatten()[:4].tolist()]
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


# --- Comparison -----------------------------------------------------------------------------------


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, x in value.items():
            yield from leaves(x, f"{place} > {key}" if place else str(key))
    elif isinstance(value, list) and value:
        for i, x in enumerate(value):
            yield from leaves(x, f"{place}[{i}]")
    else:
        yield place, value


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A line for each value that the two fingerprints do not share."""
    left, right = dict(leaves(a)), dict(leaves(b))
    lines = []
    for place in sorted(left.keys() | right.keys()):
        x, y = left.get(place, "absent"), right.get(place, "absent")
        if x != y and not (x != x and y != y):  # NaN is equal to NaN here
            relative = ""
            if isinstance(x, float) and isinstance(y, float) and x:
                relative = f"  (relative {abs(y - x) / abs(x):.1e})"
            lines.append(f"{place}: {x} -> {y}{relative}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name it finds")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"))
    args = parser.parse_args()
    if args.compare:
        a, b = (json.loads(path.read_text()) for path in args.compare)
        lines = differences(a, b)
        print("\n".join(lines) or f"equal: {len(a)} cases")
        return int(bool(lines))
    if args.out is None:
        parser.error("say where to write: OUT.json")
    os.environ["OMP_NUM_THREADS"] = "1"
    # Always the same directory: an index of shards holds the path that it was packed from.
    directory = Path(tempfile.gettempdir()).resolve() / f"arcline-fingerprint-{os.getuid()}"
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second fingerprint waits for the first
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        workers = Workers(4, str(directory))
        try:
            found = record(directory, workers, args.only)
        finally:
            workers.close()
            shutil.rmtree(directory, ignore_errors=True)
    args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{args.out}: {len(found)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
