"""Checkpoints by global class id: complete or absent, loaded at any number of ranks.

    checkpoints/step-N/
        model.safetensors                the backbone's state
        optimizer.safetensors            its optimiser: "<state>/<parameter>", the loss scale
        rows-<start>-<stop>.safetensors  class rows, their optimiser and loss state, a file a rank
        margin.safetensors               what the loss keeps for the whole model, if anything
        encoder.safetensors              the slow copy of the backbone, if the loss wants one
        manifest.json                    step, samples seen, config, sha256 of each file; last

Of several heads, head i's files are named head<i>-rows-... and head<i>-margin....

Nothing in it is a pickle. Every rank writes its rows, rank 0 the rest, and each a report when it
has; then rank 0 writes the manifest and renames the directory from step-N.partial. One that was
not renamed any more is complete too. One that is found damaged is renamed to step-N.damaged.
"""

from recognition.checkpoint.backbone import load_backbone, load_state
from recognition.checkpoint.directory import (
    PENDING,
    Damaged,
    all_rows,
    copies,
    final_name,
    find,
    named_damaged,
    newest,
    older,
    read_manifest,
    read_manifest_of_run,
    row_files,
    set_aside,
    take,
)
from recognition.checkpoint.optimizer import optimizer_tensors
from recognition.checkpoint.parts import HeadParts, Parts
from recognition.checkpoint.reading import load, verify
from recognition.checkpoint.retention import Keep
from recognition.checkpoint.saver import Saver

__all__ = [
    "PENDING", "Damaged", "HeadParts", "Keep", "Parts", "Saver", "all_rows", "copies",
    "final_name", "find", "load", "load_backbone", "load_state", "named_damaged", "newest",
    "older", "optimizer_tensors", "read_manifest", "read_manifest_of_run", "row_files",
    "set_aside", "take", "verify",
]  # fmt: skip
