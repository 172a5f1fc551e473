"""Checkpoints by global class id: complete or absent, loadable at any number of ranks.

    checkpoints/step-N/
        model.safetensors                the backbone's state
        optimizer.safetensors            its optimiser: "<state>/<parameter>", the loss scale
        rows-<start>-<stop>.safetensors  class rows, their optimiser and loss state; one per rank
        margin.safetensors               the loss's state for the whole model, if any
        encoder.safetensors              the slow copy of the backbone, if the loss needs one
        manifest.json                    step, samples seen, config, sha256 of each file; last

With several heads, the files of head i are named head<i>-rows-... and head<i>-margin....

There is no pickle in it. Every rank writes its rows, rank 0 the rest, and each rank a report when
it is done. Then rank 0 writes the manifest and renames the directory from step-N.partial; a
directory with a manifest that was not renamed is complete too. A damaged checkpoint is renamed to
step-N.damaged.
"""

from recognition.checkpoint.directory import (
    Damaged,
    copies,
    directory_of,
    final_name,
    find,
    give_final_name,
    mark_damaged,
    named_damaged,
    naming_predecessor,
    newest,
)
from recognition.checkpoint.manifest import PENDING, all_rows, read_manifest, row_files
from recognition.checkpoint.parts import HeadParts, Parts, optimizer_tensors
from recognition.checkpoint.reading import load, load_backbone, load_state, verify
from recognition.checkpoint.saver import Saver
from recognition.checkpoint.writing import Keep

__all__ = [
    "PENDING",
    "Damaged",
    "HeadParts",
    "Keep",
    "Parts",
    "Saver",
    "all_rows",
    "copies",
    "directory_of",
    "final_name",
    "find",
    "give_final_name",
    "load",
    "load_backbone",
    "load_state",
    "mark_damaged",
    "named_damaged",
    "naming_predecessor",
    "newest",
    "optimizer_tensors",
    "read_manifest",
    "row_files",
    "verify",
]
