"""Train a face-recognition network: one command for one process, many, and many machines.

    python launch/train.py RECIPE key=value ...
    torchrun --nproc-per-node 8 launch/train.py launch/configs/ms1mv2_r50_arcface.py rec=DIR
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        launch/train.py RECIPE key=value ...        (the same line on every machine)

It uses GPUs (nccl) where there are any and the CPU (gloo) elsewhere. `output=` names the run
directory; started again with the same output it continues from the newest checkpoint, at any
number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import sys

from data_tools.common import files
from data_tools.common.errors import USER_ERRORS, one_line
from launch import preflight
from recognition import config
from recognition.backbones import BACKBONES
from recognition.distributed import preemption, runtime, watchdog
from recognition.losses import MARGINS
from recognition.run import build, run_dir, trainer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", help="a Python file that defines `config`, see launch/configs; or a .json of keys"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the recipe")
    parser.add_argument(
        "--safe", action="store_true", help="run no recipe's code: the recipe must be a .json"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line last, from rank 0")
    parser.epilog = (
        f"keys: {', '.join(field.name for field in dataclasses.fields(config.Config))}\n\n"
        f"network=: {', '.join(BACKBONES)}\n\nmargin=: {', '.join(MARGINS)}\n"
        "(python -m recognition.losses says what each computes and takes)\n\n"
        "recognition/config.py says what each key means and its default."
    )
    args = parser.parse_args(arguments)
    preemption.end_now_on_request()
    faulthandler.enable()  # a shard cut short under a run ends it by SIGBUS
    try:
        return _run(args)
    except KeyboardInterrupt:  # while training, the run itself hears it
        print("interrupted: nothing was trained that is not saved", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    """Build and train; the exit code."""
    output = ""
    # A failed rank leaves by an exception: to end the process group in order, it would have to
    # wait for ranks that wait for it.
    with contextlib.ExitStack() as stack:
        try:
            cfg = config.load(args.recipe, args.overrides, args.safe)
            cfg = _without_missing_targets(cfg, args.overrides)
            output = cfg.output
            place = stack.enter_context(runtime.start(cfg.collective_timeout))
            if cfg.preflight_seconds:
                found = preflight.check(cfg, place, cfg.preflight_seconds)
                preflight.report(found, place, everything=False)
            state = build.build(cfg, place)
        except USER_ERRORS as error:  # a mistake in what was asked
            raise SystemExit(_said(error)) from None
        except Exception as error:
            lost = watchdog.lost_contact(error) and os.environ.get("WORLD_SIZE", "1") != "1"
            raise SystemExit(_recorded(error, output, line=lost)) from None
        try:
            results = trainer.train(state)
        except preemption.Stopped as stopped:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun may pass it on only now
            if state.runtime.rank == 0:
                print(stopped, flush=True)
            return preemption.exit_code_of(stopped)
        except ConnectionError as error:
            raise SystemExit(_recorded(error, output, line=True)) from None
        except (FloatingPointError, *USER_ERRORS) as error:
            raise SystemExit(_said(error)) from None
        except Exception as error:  # a bug: where in the code it arose
            raise SystemExit(_recorded(error, output)) from None
    if args.json and state.runtime.rank == 0:
        facts = {"output": state.cfg.output, "step": state.step, "verification": results}
        print(json.dumps(facts))
    return 0


def _recorded(error: Exception, output: str, line: bool = False) -> int:
    """The exit code, after the traceback on stderr and in the run directory.

    line: the error's line last.
    """
    run_dir.record_failure(error, output, int(os.environ.get("RANK", "0")))
    return _said(error) if line else 1


def _said(error: Exception) -> int:
    """The exit code, after one line on stderr."""
    rank = os.environ.get("RANK", "0")
    print(f"error (rank {rank}): {one_line(error)}", file=sys.stderr, flush=True)
    return 1


def _without_missing_targets(cfg: config.Config, overrides: list[str]) -> config.Config:
    """The recipe's val_targets that rec has, with a warning for the others; typed ones all stay."""
    if any(text.startswith("val_targets=") for text in overrides):
        return cfg
    there = [
        name
        for name in cfg.val_targets
        if any(files.is_file(f"{rec}/{name}.bin") for rec in cfg.recs)
    ]
    for name in sorted(set(cfg.val_targets) - set(there)):
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: no {name}.bin in {cfg.rec}: not verified on", file=sys.stderr)
    return dataclasses.replace(cfg, val_targets=there)


if __name__ == "__main__":
    sys.exit(main())
