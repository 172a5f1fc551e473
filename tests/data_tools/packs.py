"""Packs started as a user starts them, and what they leave."""

import subprocess
import sys

from tests.real import ROOT


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def by_identity(data):
    """identity name -> the set of its images."""
    found = {name: set() for name in data.identities}
    for label, image in data:
        found[data.identities[label]].add(image)
    return found


def start_pack(source, out, *arguments, before=None, images_per_shard=1000):
    program = (  # processes, for few images as well
        "import sys; from data_tools import __main__; from data_tools.common import parallel; "
        "from data_tools.pack import pack_job; "
        f"parallel.ITEMS_PER_WORKER = 1; pack_job.IMAGES_PER_SHARD = {images_per_shard}; "
        "sys.exit(__main__.main())"
    )
    command = [sys.executable, "-c", program, "pack", str(source), str(out), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=before, start_new_session=True,
    )  # fmt: skip
