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
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from data_tools import __main__ as data_tools
from data_tools.common import files

_CONFIGS = Path(__file__).parent / "configs"
_PROCS = "processes, one for each GPU (default: the number of GPUs, or 1)"
_PROGRAMS = {
    "eval": "evaluate a network: lfw, ijb, tinyface, rfw, pairs, identify, ...",
    "export": "write a run's network as ONNX, checked against torch",
    "compare": "say whether two photographs show one person",
    "plan": "predict memory, traffic, hours and disk before a run",
    "convert": "turn published weights into a backbone file",
    "checkpoint": "inspect, verify, merge, export checkpoints",
    "losses": "list the losses, their formulas and arguments",
    "invert": "draw faces from a network; measure its privacy",
}
_LAUNCHED = {
    "train": "train a recipe, on one process or several",
    "doctor": "check machines, data and network before a run",
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
        sys.argv[0] = f"arcline {name}"  # what argparse calls a program that is not told its name
        return _program(name)(argv[1:])
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
            *lines(_LAUNCHED),
            *lines({n: _PROGRAMS[n] for n in ("plan", "losses", "checkpoint", "convert")}),
            "\nresults:",
            *lines({n: _PROGRAMS[n] for n in ("eval", "export", "compare", "invert")}),
        ]
    )


def _program(name: str) -> Callable[[list[str]], int]:
    """The main() of a program, imported only now: most of them load torch."""
    match name:
        case "eval":
            from eval import __main__ as evaluation

            return functools.partial(evaluation.main, prog="arcline eval")
        case "checkpoint":
            from recognition.checkpoint import __main__ as checkpoint

            return functools.partial(checkpoint.main, prog="arcline checkpoint")
        case "invert":
            from recognition.inversion import __main__ as inversion

            return functools.partial(inversion.main, prog="arcline invert")
        case "losses":
            from recognition.losses import __main__ as losses

            return losses.main
        case "convert":
            from recognition.convert import main as convert

            return convert
        case "plan":
            from launch.planner.predict import main as plan

            return plan
        case "export":
            from launch.export import main as export

            return export
        case "compare":
            from launch.compare_photographs import main as compare

            return compare
        case "train":
            from launch.train import main as train

            return train
        case _:
            from launch.preflight import main as doctor

            return doctor


def _launch(name: str, arguments: list[str]) -> int:
    """Run a training program on --procs processes of this machine; its exit code."""
    sys.argv[0] = f"arcline {name}"
    if {"-h", "--help"} & set(arguments):
        print(f"arcline {name} takes --procs N as well: {_PROCS}\n")
        return _program(name)(["--help"])
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--procs", type=int)
    own, rest = parser.parse_known_args(arguments)
    procs = own.procs
    if procs is None:
        import torch  # a second and a half, which only these commands pay

        procs = max(torch.cuda.device_count(), 1)
    if procs < 1:
        print(f"error: --procs {procs}: at least 1", file=sys.stderr)
        return 2
    known = _CONFIGS / f"{rest[0]}.py" if rest else None
    if known and not files.exists(rest[0]) and files.is_file(known):
        rest[0] = str(known)
    if procs == 1:
        return _program(name)(rest)
    return _torchrun(procs, ["-m", f"launch.{'train' if name == 'train' else 'preflight'}", *rest])


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
