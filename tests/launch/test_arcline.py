"""`arcline`: one name for every command; train and doctor start their own processes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from launch import arcline

ROOT = pathlib.Path(__file__).parents[2]
ARCLINE = [sys.executable, "-m", "launch.arcline"]


def test_the_overview_names_every_command(capsys):
    assert arcline.main([]) == 2
    bare = capsys.readouterr().out
    assert arcline.main(["--help"]) == 0 and capsys.readouterr().out == bare
    for name in ("pack", "verify", "train", "doctor", "plan", "eval", "export", "compare"):
        assert f"\n  {name} " in bare
    named = {*arcline._PROGRAMS, *arcline._LAUNCHED, *arcline.data_tools.COMMANDS}
    assert named == {line.split()[0] for line in bare.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize("name", ["pack", "eval lfw", "checkpoint verify", "plan", "compare"])
def test_help_calls_the_program_what_was_typed(capsys, name):
    words = name.split()
    with pytest.raises(SystemExit) as ended:
        arcline.main([*words, "--help"])
    assert ended.value.code == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"usage: arcline {name}") or "python -m" in first and name == "plan"


def test_what_does_not_exist_is_one_line(capsys):
    assert arcline.main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "error: arcline has no command 'trian'; `arcline` lists them\n"
    )
    assert arcline.main(["train", "demo", "--procs", "0"]) == 2
    assert "--procs 0: at least 1" in capsys.readouterr().err


def test_two_processes_train_and_an_error_of_theirs_is_all_that_is_said(shards_dir, tmp_path):
    """A recipe by its name alone; torchrun's own report of a failure is left out."""
    words = [
        *ARCLINE, "train", "demo", "--procs", "2", f"rec={shards_dir}",
        f"output={tmp_path / 'r'}", "embedding_size=32", "global_batch_size=12", "max_steps=2",
        "val_targets=", "preflight_seconds=0",
    ]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "r" / "config.json").read_text())
    assert facts["world"] == 2
    wrong = [word.replace("max_steps=2", "max_step=2") for word in words]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 2, done.stderr  # one from each process that came so far
    assert all(line.startswith("error (rank ") for line in lines)
    assert all("did you mean max_steps" in line for line in lines)
