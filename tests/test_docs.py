"""The documentation is current: generated tables, the stable names, links and README's size."""

from __future__ import annotations

import re

import pytest

from recognition import config
from tests.conftest import run
from tests.real import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# The names that scripts of others rely on.
STABLE = [
    "recognition.head.PartialFC", "recognition.optim.RowSGD", "recognition.optim.RowAdamW",
    "recognition.losses.margin.Margin", "recognition.backbones.make_backbone",
    "data_tools.recordio.IndexedReader", "data_tools.recordio.Writer", "data_tools.shards.open",
    "eval.verification.evaluate", "eval.verification.tar_at_far", "eval.identification.evaluate",
    "eval.align.similarity",
]  # fmt: skip


def test_the_generated_tables_are_current():
    done = run("docs/generate.py", "--check")
    assert done.returncode == 0, f"run python docs/generate.py\n{done.stdout}{done.stderr}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    prose = re.sub(r"`[^`\n]*`|^    .*$", "", page.read_text(), flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", STABLE)
def test_a_stable_name_is_documented(name):
    assert f"::: {name}\n" in (ROOT / "docs" / "api.md").read_text() + "\n"


def test_each_stable_name_can_be_imported_first_and_has_a_docstring():
    """In a process of its own, in which nothing but torch is imported before it."""
    code = (
        "import importlib, os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        module, _, attribute = name.rpartition('.')\n"
        "        found = getattr(importlib.import_module(module), attribute)\n"
        "        assert found.__doc__, f'{name}: no docstring'\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0, name\n"
    )
    done = run("-c", code, *STABLE)
    assert done.returncode == 0, done.stderr


def test_every_recipe_key_on_a_page_exists():
    known = {field for field in config.Config.__dataclass_fields__}
    for page in PAGES:
        written = re.sub(r"<!-- generated.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        for key in re.findall(r"`([a-z_]+)=[^`]*`", written):
            assert key in known | set(config.HEAD_KEYS) | NOT_KEYS, f"{page.name}: {key}="


# On the pages in the same form, but not keys of a run: arguments of losses, of torchrun, of SLURM.
NOT_KEYS = {"features", "gradient", "is_host", "key", "last_call_timeout", "overflow"}
