"""A process that has imported everything and forks for each run of a command.

Started with the preloaded library; reads one JSON request a line and answers with one. The child
of a request switches recording and the fault on, calls the command's main(), and exits as the
command would. An import of torch costs seconds, a fork milliseconds: hundreds of runs become
affordable.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback

import numpy.ma  # noqa: F401  numpy.unique imports it: not in each child
import torch
import torch.distributed.nn  # before _dynamo, as recognition/distributed/runtime.py says

import torch._dynamo  # isort: skip  DistributedDataParallel imports it: seconds

import data_tools.__main__
import eval.__main__
import eval.embedders.extract
import eval.protocols.score_pairs
import eval.report.figures
import eval.report.page
import launch.train
import recognition.checkpoint.__main__
import recognition.weights.networks
from recognition.run import saving

COMMANDS = {
    "pack": data_tools.__main__.main,
    "train": launch.train.main,
    "checkpoint": recognition.checkpoint.__main__.main,
    "eval": eval.__main__.main,
}


def main() -> None:
    shim = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    torch.set_num_threads(1)
    torch.manual_seed(0)  # it reads the sources of its callers, once in a process
    saving._LAST_WAITS = (0.01, 0.02)  # seconds; a fault of one call has passed by then
    # Drawing opens no file and takes seconds.
    eval.report.figures._svg = lambda figure, label: "<svg></svg>"
    gc.freeze()  # a collection in a child would copy the parent's pages
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(shim, request)
        answer = {"run": request["run"], "code": _wait(child, request["seconds"])}
        print(json.dumps(answer), flush=True)


def _run(shim: ctypes.CDLL, request: dict) -> None:
    code = 70
    try:
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        shim.faults_log(request["log"].encode())
        assert shim.faults_arm(request["position"].encode())
        code = COMMANDS[request["command"]](request["arguments"])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)


def _wait(child: int, seconds: float) -> int | None:
    """The exit code of the child, negative for a signal; None where it had to be ended."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    main()
