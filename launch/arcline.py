"""`arcline COMMAND ...`: everything that this project does, behind one name.

    arcline train launch/configs/ms1mv2_r50_arcface.py rec=DIR output=runs/a --procs 8
    arcline pack FACES data/mine --shards 16
    arcline eval lfw runs/a data/mine
    arcline compare model.onnx a.jpg b.jpg --detector yunet.onnx

`arcline train` starts torchrun's own agent on this machine; on a cluster, start launch/train.py
with torchrun or sbatch instead (docs/distributed.md). The other commands are those of
`python -m data_tools`, `python -m eval` and the scripts in launch/, with the same arguments.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from data_tools import __main__ as data_tools

_CONFIGS = Path(__file__).parent / "configs"
_PROCS = "processes, one for each GPU (default: the number of GPUs, or 1)"
# name -> (module with a main(arguments) -> int, one line on it)
_PROGRAMS = {
    "eval": ("eval.__main__", "evaluate a network: lfw, ijb, tinyface, rfw, pairs, identify, ..."),
    "export": ("launch.export", "write a run's network as ONNX, checked against torch"),
    "compare": ("launch.compare_photographs", "say whether two photographs show one person"),
    "plan": ("launch.planner.predict", "predict memory, traffic and time before a run"),
    "convert": ("recognition.convert", "turn published weights into a backbone file"),
    "checkpoint": ("recognition.checkpoint.__main__", "inspect, verify, merge, export checkpoints"),
    "losses": ("recognition.losses.__main__", "list the losses, their formulas and arguments"),
    "invert": ("recognition.inversion.__main__", "draw faces from a network; measure its privacy"),
}
_LAUNCHED = {
    "train": ("launch.train", "train a recipe, on one process or several"),
    "doctor": ("launch.preflight", "check machines, data and network before a run"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names and return its exit code.

    Without arguments it prints the overview, and the exit code is 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if name in _LAUNCHED:
        return _launch(name, argv[1:])
    if name in _PROGRAMS:
        program: Callable[..., int] = importlib.import_module(_PROGRAMS[name][0]).main
        sys.argv[0] = f"arcline {name}"  # what argparse calls a program that is not told its name
        named = {"prog": sys.argv[0]} if "prog" in inspect.signature(program).parameters else {}
        return program(argv[1:], **named)
    if name in data_tools.COMMANDS:
        return data_tools.main(argv, prog="arcline")
    if name in ("", "-h", "--help"):
        print(_overview())
        return 0 if name else 2
    print(f"error: arcline has no command {name!r}; `arcline` lists them", file=sys.stderr)
    return 2


def _overview() -> str:
    def lines(commands: dict[str, str]) -> list[str]:
        return [f"  {name:<12}{text}" for name, text in commands.items()]

    return "\n".join(
        [
            "usage: arcline COMMAND ...        arcline COMMAND --help",
            "\ndata:",
            *lines({name: text for name, (_, text) in data_tools.COMMANDS.items()}),
            "\ntraining:",
            *lines({name: text for name, (_, text) in _LAUNCHED.items()}),
            *lines({n: _PROGRAMS[n][1] for n in ("plan", "losses", "checkpoint", "convert")}),
            "\nresults:",
            *lines({n: _PROGRAMS[n][1] for n in ("eval", "export", "compare", "invert")}),
        ]
    )


def _launch(name: str, arguments: list[str]) -> int:
    """Run a training program on --procs processes of this machine; its exit code."""
    import torch  # a second and a half that only these commands pay

    module = importlib.import_module(_LAUNCHED[name][0])
    sys.argv[0] = f"arcline {name}"
    if {"-h", "--help"} & set(arguments):
        print(f"arcline {name} takes --procs N as well: {_PROCS}\n")
        module.main(["--help"])
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--procs", type=int, default=max(torch.cuda.device_count(), 1))
    own, rest = parser.parse_known_args(arguments)
    if own.procs < 1:
        print(f"error: --procs {own.procs}: at least 1", file=sys.stderr)
        return 2
    if rest and not Path(rest[0]).exists() and (known := _CONFIGS / f"{rest[0]}.py").is_file():
        rest[0] = str(known)
    if own.procs == 1:
        found: int = module.main(rest)
        return found
    return _torchrun(own.procs, ["-m", _LAUNCHED[name][0], *rest])


def _torchrun(procs: int, arguments: list[str]) -> int:
    """Run torchrun's agent in this process: the exit code of the first process that failed.

    The processes name their errors themselves, so the agent's report of some 25 lines is left out.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.main(["--standalone", "--nproc-per-node", str(procs), *arguments])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code  # a signal's number is negative there
    except SignalException as signalled:
        return 128 + signalled.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
