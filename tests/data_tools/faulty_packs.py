"""Runs packs with one fault each, under the preloaded faults.c, and prints what came of them.

Run as a program: SOURCE WORK resume|overwrite quick|whole; a line of JSON for each fault. Each pack
runs in a forked child, as a fault may be a kill. `quick` looks at one finished and one missing
shard, with the first error of each kind and the kills.
"""

import errno
import json
import os
import re
import shutil
import sys
import traceback
from pathlib import Path

from data_tools import shards
from data_tools.pack.pack import pack
from data_tools.pack.pack_options import Options

_READ = (errno.ESTALE, errno.EIO)
_WRITE = (errno.ENOSPC, errno.EIO)
_REMOVE = (errno.EIO, 0)  # 0: killed after the call
FAULTS = {
    **dict.fromkeys(("stat", "open", "opendir", "read"), _READ),
    **dict.fromkeys(("write", "fsync", "mkdir"), _WRITE),
    "rename": (*_WRITE, 0),
    **dict.fromkeys(("unlink", "rmdir"), _REMOVE),
}
OPTIONS = Options(shards=6)
_serial = 0


def in_child(source, out, options, overwrite, fault=None, log=None):
    """What a pack in a child did: {"status": ...}, {"error": ...}, {"bug": ...} or {"killed"}."""
    global _serial
    _serial += 1
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.environ["FAULT_LOG"] = "" if log is None else str(log)
        os.environ["FAULT"] = "" if fault is None else f"{_serial}|{'|'.join(map(str, fault))}"
        try:
            said = {"status": pack(source, out, options, overwrite=overwrite)["status"]}
        except (OSError, ValueError) as error:
            said = {"error": str(error)}
        except BaseException:
            said = {"bug": traceback.format_exc()}
        os.environ["FAULT"] = os.environ["FAULT_LOG"] = ""
        os.write(send, json.dumps(said).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"killed": True}


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def calls(source, out, options, overwrite):
    """The distinct (op, path) of an undisturbed pack."""
    log = out.parent / "log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    in_child(source, out, options, overwrite, log=descriptor)
    os.close(descriptor)
    lines = log.read_text().splitlines()
    log.unlink()
    # A temporary file is named by its process, and every pack here is another one.
    lines = [re.sub(r"-[0-9]+\.partial$", "-*.partial", line) for line in lines]
    return list(dict.fromkeys(tuple(line.split(" ", 1)) for line in lines))


def main():
    source, work, scenario, extent = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    out = work / "under" / "set"
    out.parent.mkdir(parents=True)
    os.environ["FAULT_UNDER"] = str(out)
    pack(source, work / "reference", OPTIONS)
    reference = contents(work / "reference")
    overwrite = scenario == "overwrite"
    if overwrite:  # an older set stands there
        pack(source, out, Options(shards=2))
    full = ("open", f"{out}.partial/train-00003-of-00006.rec", errno.ENOSPC)
    print(json.dumps({"first": in_child(source, out, OPTIONS, overwrite, full)}))
    shutil.copytree(out.parent, work / "template")
    finished = {
        path.name: path.read_bytes()
        for path in (work / "template" / "set.partial").glob("train-0000[012]*")
    }
    old = contents(out) if overwrite else None
    for op, path in calls(source, out, OPTIONS, overwrite):
        quick = extent == "quick"
        if quick and re.search("train-0000[1245]", path):
            continue
        for number in dict.fromkeys((FAULTS[op][0], FAULTS[op][-1])) if quick else FAULTS[op]:
            if quick and number == errno.EIO and number != FAULTS[op][0]:
                continue
            shutil.rmtree(out.parent)
            shutil.copytree(work / "template", out.parent)
            said = in_child(source, out, OPTIONS, overwrite, (op, path, number))
            partial, replaced = Path(f"{out}.partial"), Path(f"{out}.replaced")
            there = contents(out) if out.exists() else None
            result = {
                "op": op,
                "path": path.removeprefix(str(out)),
                "errno": number,
                **said,
                "new": there is not None and reference.items() <= there.items(),
                "old": old is not None
                and any(
                    place.exists() and old.items() <= contents(place).items()
                    for place in (out, replaced)
                ),
                "kept": all(
                    (partial / name).exists() and (partial / name).read_bytes() == content
                    for name, content in finished.items()
                ),
            }
            result["then"] = in_child(source, out, OPTIONS, overwrite and not result["new"])
            result["same"] = contents(out) == reference
            result["left"] = sorted(path.name for path in out.parent.iterdir())
            shards.open(out)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
