"""A batch of images that starts as noise, and the steps that optimise it.

Letters: b images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_tools.common import files
from data_tools.common.draws import Purpose, hash_words
from data_tools.common.errors import UserError
from recognition.backbones.input import INPUT_SIZE
from recognition.checkpoint.tensors import mapping
from recognition.inversion.identity import ClosedSet, Identity
from recognition.inversion.prior import BnPrior, length, total_variation
from recognition.inversion.settings import Settings

_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's Adam names them

Terms = dict[str, float]


@dataclass
class InversionBatch:
    """Images that are optimised, with Adam's state; a saved state holds these."""

    number: int
    ids: np.ndarray  # int64 [b], classes or rows of the targets
    images: Tensor  # [b, 3, 112, 112]
    moments: dict[str, Tensor]
    step: int = 0

    @classmethod
    def start(
        cls, settings: Settings, number: int, ids: np.ndarray, device: torch.device
    ) -> InversionBatch:
        """Images ~ N(0, 1), a function of the seed and the batch's number."""
        generator = torch.Generator()
        generator.manual_seed(hash_words(settings.seed, Purpose.INVERSION_START, number) >> 1)
        images = torch.randn(len(ids), 3, INPUT_SIZE, INPUT_SIZE, generator=generator).to(device)
        return cls(number, ids, images, {name: torch.zeros_like(images) for name in _MOMENTS})

    def save(self, path: str) -> None:
        """Complete or not at all."""
        tensors = {"images": self.images.detach(), **self.moments}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        files.write_bytes(path, safetensors.torch.save(tensors, {"step": str(self.step)}))

    def load(self, path: str, expected: int) -> None:
        """Raises: ValueError if the file is damaged or not of step `expected`; OSError if it
        cannot be read."""
        try:
            with mapping(path), safe_open(path, "pt") as file:
                step = int(file.metadata()["step"])
                tensors = {name: file.get_tensor(name) for name in ("images", *_MOMENTS)}
            if step != expected:
                raise UserError(f"it is of step {step}, not {expected}")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it and start again") from error
        if tensors["images"].shape != self.images.shape:
            raise UserError(
                f"{path} holds {list(tensors['images'].shape)}, this batch is "
                f"{list(self.images.shape)}: remove it and start again"
            )
        device = self.images.device
        self.images = tensors.pop("images").to(device)
        self.moments = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.step = step


def descend(
    network: nn.Module,
    identity: Identity,
    batch: InversionBatch,
    settings: Settings,
    rows_per_rank: Sequence[int],
) -> Iterator[dict[str, Tensor]]:
    """Take `batch` to the last step, and yield the terms of the loss of each step after it.

    network: in eval mode, its parameters without gradients, of the images' dtype.
    rows_per_rank: images of the batch of each rank, for an identity that all ranks step together.
    """
    prior = BnPrior(network, settings.bn_form, settings.bn_first, settings.bn_last)
    x = batch.images.requires_grad_(True)
    adam = torch.optim.Adam([x], settings.lr, (settings.beta1, settings.beta2))
    adam.state[x] = {"step": torch.tensor(float(batch.step)), **batch.moments}
    try:
        while batch.step < settings.steps:
            embeddings = network(_augmented(x, settings, batch))
            parts = {
                "identity": identity.loss(embeddings, batch.ids, rows_per_rank),
                "bn": prior.take().to(x),
                "tv": total_variation(x),
                "length": length(x),
            }
            loss = (
                parts["identity"]
                + settings.bn_weight * parts["bn"]
                + settings.tv_weight * parts["tv"]
                + settings.l2_weight * parts["length"]
            )
            (gradient,) = torch.autograd.grad(loss, x)
            # Of a mean over b each image has 1/b: Adam does not see the factor, its eps would.
            x.grad = gradient * len(x)
            if isinstance(identity, ClosedSet):
                identity.end_step()
            adam.param_groups[0]["lr"] = settings.lr_at(batch.step)
            adam.step()
            if settings.clip:
                with torch.no_grad():
                    x.clamp_(-1, 1)
            batch.step += 1
            yield parts
    finally:
        prior.remove()
        x.requires_grad_(False)
        x.grad = None


def finite_terms(parts: Mapping[str, Tensor], batch: InversionBatch) -> Terms:
    """The terms of the loss as numbers. Raises: ValueError naming them if one is not finite."""
    terms = {name: part.item() for name, part in parts.items()}
    if not np.isfinite(list(terms.values())).all():
        raise UserError(
            f"batch {batch.number}, step {batch.step}: the loss is not finite, {terms}; a smaller "
            "--lr or --bn-weight may help"
        )
    return terms


def _augmented(x: Tensor, settings: Settings, batch: InversionBatch) -> Tensor:
    """The images as the network sees them in this step: mirrored or rolled where asked."""
    draw = (settings.seed, batch.number, batch.step)
    if settings.flip and hash_words(Purpose.INVERSION_FLIP, *draw) & 1:
        x = x.flip(3)
    if settings.jitter:
        bits, span = hash_words(Purpose.INVERSION_JITTER, *draw), 2 * settings.jitter + 1
        down, right = bits % span - settings.jitter, (bits >> 32) % span - settings.jitter
        x = x.roll((down, right), (2, 3))
    return x
