"""launch/bench/losses.py as a person runs it: real torchrun, the line of JSON, and its errors."""

from __future__ import annotations

import json

import pytest
import torch

from launch.bench import loader, losses
from recognition.losses import Margin, Rows, make_margin
from recognition.losses.margin import Layer
from tests.conftest import command, run

SCRIPT = "launch/bench/losses.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
SMALL = ["--classes", 500, "--batch", 16, "--embedding-size", 32, "--pairs", 2, "--warmup", 1]
WITH_COUNTS = Layer(500, (0, 500), 32, class_counts=torch.arange(1, 501).numpy())


def test_two_losses_on_two_processes():
    done = command(*TORCHRUN, SCRIPT, *SMALL, "--losses", "interface,sphereface2")
    report = json.loads(done.stdout.splitlines()[-1])
    assert {k: report[k] for k in ("W", "threads", "B", "C", "D", "r", "dtype", "pairs")} == {
        "W": 2, "threads": 1, "B": 16, "C": 500, "D": 32, "r": 1.0, "dtype": "fp32", "pairs": 2,
    }  # fmt: skip
    assert report["torch"] == torch.__version__ and report["left_out"] == []
    assert report["machine"]["processor"] and report["machine"]["cores"] >= 1
    assert list(report["losses"]) == ["interface", "sphereface2"]
    for found in report["losses"].values():
        assert 0 < found["min"] <= found["median_ratio"] <= found["max"]
        assert found["ms"] > 0 and found["cosface_ms"] > 0
    promised, free = report["losses"].values()
    assert promised["limit"] == 2.2 and promised["holds"] is (promised["median_ratio"] <= 2.2)
    assert free["limit"] is None and free["holds"] is None


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_one_process_sampled_and_in_other_precisions(dtype, capsys):
    typed = [*SMALL, "--losses", "kappaface", "--dtype", dtype, "--sample-rate", 0.3]
    assert losses.main(list(map(str, typed))) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["W"], report["r"], report["dtype"]) == (1, 0.3, dtype)
    assert report["losses"]["kappaface"]["limit"] == 1.1


def test_check_says_what_is_broken_or_left_out(monkeypatch, capsys):
    """In one process, with limits that no loss and that every loss keeps."""
    small = [*map(str, SMALL), "--losses", "adacos,arcface"]
    monkeypatch.setattr(losses, "_LIMITS", {"adacos": 0.0, "arcface": 1e9})
    assert losses.main(small) == 0  # only asked for by --check
    assert losses.main([*small, "--check"]) == 1
    printed = capsys.readouterr()
    assert "broken: adacos" in printed.err and "broken: arcface" not in printed.err
    monkeypatch.setattr(losses, "_LIMITS", {"adacos": 1e9, "arcface": 1e9})
    assert losses.main([*small, "--check"]) == 0
    assert losses.main([*small, "--check", "--seconds", "0"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["left_out"] == ["adacos", "arcface"]
    assert "left out: adacos" in printed.err


def test_a_loss_that_moves_only_the_target_has_the_small_limit_and_no_other_has():
    """So that a new margin cannot slip in under a limit that is not its own."""
    for name, loss in losses.losses().items():
        margin = make_margin(loss.margin, loss.arguments)
        margin.bind(WITH_COUNTS)
        moves_only_the_target = (
            margin.reduction == "softmax" and not margin.needs_lse and leaves_negatives(margin)
        )
        assert (loss.limit == 1.1) is moves_only_the_target, name


def leaves_negatives(margin: Margin) -> bool:
    cos = torch.linspace(-0.9, 0.9, 20).view(4, 5)
    rows = Rows(torch.full((4,), 0.1), torch.ones(4), torch.arange(4), torch.zeros(4, 0))
    return margin.filtered_negatives(cos, rows, cos.flip(0)) is cos


@pytest.mark.parametrize(
    "typed, words, code",
    [
        (["--losses", "arcfase"], "did you mean arcface", 1),
        (["--losses", "arcface,spherefacer-v3"], "did you mean spherefacer-v2", 1),
        (["--sample-rate", "2"], "sample_rate=2.0", 1),
        (["--pairs", "0"], "--pairs: '0' is not a whole number", 2),
        (["--warmup", "-1"], "--warmup: '-1' is not a whole number", 2),
    ],
)
def test_a_mistake_is_said_and_an_exit_code(typed, words, code, capsys):
    try:
        ended = losses.main(list(map(str, [*SMALL, *typed])))
    except SystemExit as exit:  # of argparse
        ended = exit.code
    said = capsys.readouterr()
    assert ended == code and words in said.err and said.out == ""


@pytest.mark.long
def test_a_batch_that_two_processes_cannot_share():
    done = run(*TORCHRUN, SCRIPT, *SMALL, "--batch", 15)
    assert done.returncode != 0 and done.stdout == ""
    assert "): --batch 15: not divisible by 2 processes" in done.stderr


def test_the_loader_bench_gives_every_ratio(shards_dir):
    done = command("launch/bench/loader.py", shards_dir, "--rounds", 1, "--batches", 1)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["threads"] == 2 and min(report["images_per_second"].values()) > 0
    assert report["ratios"]["cpu / bare"]["target"] == 0.85
    for found in report["ratios"].values():
        assert 0 < found["min"] <= found["median"] <= found["max"]


def test_the_synthetic_faces_bench_gives_a_rate():
    report = json.loads(command("launch/bench/synthetic.py", "--faces", 40).stdout)
    assert report["faces"] == 40 and report["faces_per_second"] > 0


def test_the_loader_bench_opens_a_large_index():
    """The targets at 42 million, held at four: resident 8 + 8 bytes an image, nothing private."""
    done = command("launch/bench/loader.py", "--index", 4_000_000)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["open_seconds"] > 0 and report["resident_mib"] < 4e6 * 16 / 2**20 + 64
    assert report["of_it_private_mib"] < 64


def test_the_loader_bench_says_what_it_wants(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        loader.main([])
    assert ended.value.code == 2 and "name a packed set" in capsys.readouterr().err
    assert loader.main([str(tmp_path / "no")]) == 1
    said = capsys.readouterr().err
    assert "no such" in said and "Traceback" not in said
