"""The course of both commands: make the images of a plan, measure them, write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from data_tools.common.schema import from_flags
from recognition.distributed import runtime
from recognition.inversion import work
from recognition.inversion.measure import InvertedImages
from recognition.inversion.plan import TIMEOUT, InversionPlan, check_networks
from recognition.inversion.prior import BnPrior
from recognition.inversion.settings import Request


def invert(
    plan: InversionPlan,
    args: argparse.Namespace,
    measured: Callable[[InvertedImages], tuple[dict[str, Any], str]],
) -> dict[str, Any] | None:
    """The report, which report.json holds too; None in other processes than the first.

    measured: what a command adds to the report, and the text to print.
    """
    request = from_flags(Request, args)
    work.check_settings(request.out, plan.facts)
    check_networks(args)
    note = prior_note(plan)
    with runtime.start(TIMEOUT) as here:
        if here.rank == 0 and note:
            print(f"note: {note}", file=sys.stderr)
        if here.rank == 0 and here.world > len(plan.batches):
            print(
                f"note: {len(plan.batches)} batches for {here.world} processes: a smaller "
                "--batch-size or more identities would keep all of them busy",
                file=sys.stderr,
            )
        with work.directory(request.out, plan.facts, here):
            work.synthesise(
                plan.embedder.module,
                plan.identity(here),
                plan.batches,
                plan.names,
                plan.settings,
                request,
                here,
            )
        if here.rank != 0:
            return None
        more, text = measured(InvertedImages(plan, request.out))
        report = {
            "network": plan.facts["network"],
            "settings": plan.facts["settings"],
            "prior": note,
            "loss": work.terms_of(request.out, len(plan.batches)),
            **more,
            **(plan.faces.facts() if plan.faces is not None else {}),
        }
        work.write_json(request.out / "report.json", report)
        print(text)
        return {"path": str(request.out), **report}


def prior_note(plan: InversionPlan) -> str | None:
    """Why the BatchNorm prior is off; None if it is on."""
    prior = BnPrior(plan.embedder.module, last=plan.settings.bn_last)
    prior.remove()
    if not prior.layers:
        return (
            "this network has no BatchNorm over images: the prior is off, and only smoothness and "
            "length keep the images similar to faces"
        )
    return "bn_weight is 0: the prior is off" if plan.settings.bn_weight == 0 else None
