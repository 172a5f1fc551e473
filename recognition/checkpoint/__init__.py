"""Checkpoints by global class id: complete or absent, loaded at any number of ranks.

    checkpoints/step-N/
        model.safetensors                the backbone's state
        optimizer.safetensors            its optimiser: "<state>/<parameter>", the loss scale
        rows-<start>-<stop>.safetensors  class rows, their optimiser and loss state, a file a rank
        margin.safetensors               what the loss keeps for the whole model, if anything
        encoder.safetensors              the slow copy of the backbone, if the loss wants one
        manifest.json                    step, samples seen, config, sha256 of each file; last

Of several heads, head i's files are named head<i>-rows-... and head<i>-margin....

Nothing in it is a pickle. Every rank writes its rows, rank 0 the rest; when all have reported,
rank 0 writes the manifest and renames the directory from step-N.partial.
"""

from recognition.checkpoint.backbone import load_backbone, load_state
from recognition.checkpoint.directory import newest, read_manifest, row_files
from recognition.checkpoint.optimizer import optimizer_tensors
from recognition.checkpoint.parts import HeadParts, Parts
from recognition.checkpoint.reading import load
from recognition.checkpoint.writing import save

__all__ = [
    "HeadParts", "Parts", "load", "load_backbone", "load_state", "newest", "optimizer_tensors",
    "read_manifest", "row_files", "save",
]  # fmt: skip
