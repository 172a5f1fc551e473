"""Opens trained networks as eval's Embedder: runs, weight files and any ONNX.

Commands of data_tools and eval reach this module through data_tools.common.networks.

Letters: n images of a call, D embedding size.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_tools.common import files
from data_tools.common.errors import UserError
from eval.embedders.contract import InputContract, read_json, sidecar
from eval.embedders.embedder import Embedder
from recognition import checkpoint
from recognition.backbones import BACKBONES
from recognition.weights.centres import Centres
from recognition.weights.foreign import WEIGHT_FILES, network_of, read_weights

__all__ = ["Centres", "TorchEmbedder", "open_embedder"]


def open_embedder(
    path: str | Path,
    batch_size: int = 64,
    changes: Mapping[str, Any] | None = None,
    contract_file: str | Path | None = None,
) -> Embedder:
    """The network at `path`: a run or checkpoint directory, published weights, or an .onnx.

    batch_size: how many images the network processes at once. The input contract of a weight file
    or a foreign ONNX comes from the first of these that states it: `changes` (flags),
    contract_file, NAME.contract.json beside the model, the metadata that our export writes,
    InsightFace's convention.

    Raises:
        FileNotFoundError: nothing is at `path`, or it is a directory without a checkpoint.
        UserError: the network does not take faces of 112 x 112 or 112 x 96, or the stated contract
            is impossible.
    """
    path = Path(path)
    stated: dict[str, Any] = {}
    source = "the flags"
    beside = Path(contract_file) if contract_file else sidecar(path)
    if contract_file or files.is_file(beside):
        stated, source = read_json(beside), str(beside)
    if changes:
        stated, source = stated | dict(changes), f"{source} and the flags" if stated else source
    if files.is_dir(path):
        if stated:
            raise UserError(
                f"{path}: a run's input contract is fixed (RGB, (pixel - 127.5) / 127.5); remove "
                f"what {source} states"
            )
        return TorchEmbedder(*_from_run(path), batch_size)
    if not files.is_file(path):
        raise FileNotFoundError(f"no run directory, backbone file or .onnx file at {path}")
    if path.suffix in WEIGHT_FILES:
        contract = InputContract().changed(stated, source)
        return TorchEmbedder(*_from_weights(path), batch_size, contract)
    from eval.embedders.embed_onnx import OnnxEmbedder  # onnx takes half a second to load

    return OnnxEmbedder(path, batch_size, stated, source)


def _from_run(path: Path) -> tuple[nn.Module, dict[str, object], str]:
    found = checkpoint.find(str(path))  # once: another may be the newest a moment later
    module, config = checkpoint.load_backbone(found)
    manifest = checkpoint.read_manifest(found)
    facts = {
        "path": str(path),
        "network": config["network"],
        "embedding_size": config["embedding_size"],
        "step": manifest["step"],
    }
    return module, facts, manifest["files"]["model.safetensors"]["sha256"]


def _from_weights(path: Path) -> tuple[nn.Module, dict[str, object], str]:
    try:
        state = read_weights(str(path))
    except UserError as error:
        raise UserError(f"{path} is not a backbone: {error}") from error
    name, size = network_of(state, str(path))
    module = BACKBONES[name](embedding_size=size)
    checkpoint.load_state(module, state, str(path))
    facts: dict[str, object] = {"path": str(path), "network": name, "embedding_size": size}
    return module.float().eval(), facts, files.sha256(path)


class TorchEmbedder:
    """A backbone in fp32, on this process's GPU where there is one."""

    def __init__(
        self,
        module: nn.Module,
        facts: dict[str, object],
        digest: str,
        batch_size: int = 64,
        contract: InputContract | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
        self.module = module.to(self.device)
        self.digest, self.batch_size = digest, batch_size
        self.contract = contract or InputContract()
        if (self.contract.height, self.contract.width) != (112, 112):
            raise UserError(f"{facts['path']}: our backbones take 112 x 112 images")
        self.facts = facts | {
            "sha256": digest,
            "input": self.contract._asdict(),
            "runtime": f"torch {torch.__version__} on {self.device.type}",
        }

    def with_contract(self, contract: InputContract) -> "TorchEmbedder":
        return TorchEmbedder(self.module, self.facts, self.digest, self.batch_size, contract)

    def prepare(self, images: NDArray[np.uint8]) -> torch.Tensor:
        if self.contract.color_order == "BGR":
            images = images[..., ::-1]
        x = torch.from_numpy(np.ascontiguousarray(images))
        return self._floats(x) if self.device.type == "cpu" else x.pin_memory()

    def _floats(self, x: torch.Tensor) -> torch.Tensor:
        # As the training loader and InsightFace's torch scripts: ((x / 255) - 0.5) / 0.5.
        x = x.permute(0, 3, 1, 2).float()  # [n, 3, 112, 112]
        return x.div_(255).sub_(self.contract.mean / 255).div_(self.contract.std / 255)

    @torch.inference_mode()
    def forward(self, prepared: torch.Tensor) -> NDArray[np.float32]:
        parts = []
        for x in prepared.split(self.batch_size):
            if self.device.type != "cpu":
                x = self._floats(x.to(self.device, non_blocking=True))
            parts.append(self.module(x).float().cpu())
        return torch.cat(parts).numpy()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.forward(self.prepare(images))
