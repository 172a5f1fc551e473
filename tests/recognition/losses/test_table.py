"""The table of the losses: complete, in docs/losses.md as printed, and a recipe for every loss."""

from __future__ import annotations

import json
import re

import pytest

from recognition import config
from recognition.losses import MARGINS, make_margin
from recognition.losses.__main__ import entries, markdown
from recognition.losses.arguments import arguments_of
from tests.conftest import command
from tests.real import ROOT

# A loss without a publication says "unpublished" in the place of its source.
SOURCES = ("arXiv:", "doi:", "ICCV", "CVPR", "unpublished")
RECIPES = sorted((ROOT / "launch" / "configs").glob("*.py"))


def test_the_page_of_losses_has_the_table_as_it_is_printed():
    printed = command("-m", "recognition.losses", "--markdown").stdout.strip()
    assert printed == markdown()
    assert printed in (ROOT / "docs" / "losses.md").read_text(), (
        "docs/losses.md is out of date: run `python docs/generate.py`"
    )


def test_every_loss_names_its_source_arguments_and_state():
    for entry in entries():
        first = f"the first paragraph of {MARGINS[entry.name].__name__}'s docstring"
        assert any(word in entry.formula for word in SOURCES), (
            f"{entry.name}: {first} names no source: write one of {', '.join(SOURCES)}"
        )
        assert re.search(r"\bz(_[yj])? = ", entry.formula), (
            f"{entry.name}: {first} states no formula: write z_y = ... (or z = ...)"
        )
        shared = {"gradient", "interclass_filtering_threshold"}
        shown, taken = set(entry.arguments), set(arguments_of(MARGINS[entry.name])) - shared
        assert shown == taken, (
            f"{entry.name}: the table differs from the arguments: {shown ^ taken}"
        )
    keeps = {entry.name: " ".join(entry.state) for entry in entries()}
    assert keeps["kappaface"] == "psi, feature_sum, seen (of each class)"
    assert keeps["jamsface"] == "raw_angular, raw_cosine (learned, of each class)"
    assert keeps["adaface"] == "mean, std (of the model)"
    assert keeps["uniface"] == "bias (learned, of the model)"
    assert not keeps["arcface"]


def test_other_forms():
    told = json.loads(command("-m", "recognition.losses", "--json").stdout)
    assert [entry["name"] for entry in told] == list(MARGINS)
    shown = command("-m", "recognition.losses").stdout
    assert all(name in shown for name in MARGINS)


def test_every_loss_has_a_recipe():
    used = {config.load(str(path), ["rec=somewhere"]).margin for path in RECIPES}
    assert used == set(MARGINS), f"add a recipe to launch/configs for {set(MARGINS) - used}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_its_loss_and_is_named_after_it(path):
    cfg = config.load(str(path), ["rec=somewhere"])
    make_margin(cfg.margin, cfg.margin_args)
    if path.stem == "demo":
        return
    data, _, rest = path.stem.partition("_")
    assert rest.startswith(f"{cfg.network}_")
    loss = rest.removeprefix(f"{cfg.network}_").split("_")
    assert loss[0] == cfg.margin and config.load(str(path)).rec == f"data/{_SETS.get(data, data)}"
    assert ("k3" in loss) == (cfg.num_subcenters == 3)


_SETS = {"wf12m": "webface12m", "wf42m": "webface42m"}
