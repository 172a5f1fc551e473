"""Write a checkpoint anew with the class rows of all ranks in one file: rows-0-<classes>.

Runs do not need it: they load at any number of processes. It is for scripts that read the rows. It
takes the memory of all rows and their optimiser's state.
"""

import argparse
import os
import shutil
from typing import Any

from data_tools.common.messages import count
from recognition.checkpoint import tensors
from recognition.checkpoint.directory import FORMAT, all_rows, sync, write_manifest
from recognition.checkpoint.making import add_paths, checked, joined, making


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_paths(parser, "checkpoint directory")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUT, complete or not at all.

    Raises:
        FileExistsError: OUT is there.
        Damaged: a file of the checkpoint is not what was written.
    """
    with making(args) as (path, partial):
        manifest = checked(path)
        files = {}
        by_head = [all_rows(path, manifest, k) for k in range(len(manifest["heads"]))]
        merged = sum(by_head, [])
        for name in sorted(set(manifest["files"]) - {file.name for file in merged}):
            shutil.copyfile(os.path.join(path, name), partial / name)
            files[name] = manifest["files"][name]
        for k, head in enumerate(manifest["heads"]):
            prefix = f"head{k}-" if len(manifest["heads"]) > 1 else ""
            name = f"{prefix}rows-0-{head['num_classes']}.safetensors"
            rows = joined(path, by_head[k], head["num_classes"])
            files[name] = tensors.write(str(partial / name), rows)
        manifest |= {"format": FORMAT, "files": files, "world": 1}
        write_manifest(str(partial), manifest)
        sync(str(partial))
    print(f"{args.out}: {count(len(merged), 'file')} of rows as {len(manifest['heads'])}")
    return {"path": str(args.out), "from": path, "files": files}
