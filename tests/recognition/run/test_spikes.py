"""Spikes: seen alike on all ranks, and the run that leaves out the samples of one."""

from __future__ import annotations

import json
import math

import pytest
import torch

from recognition import config
from recognition.distributed import collectives
from recognition.run import build, saving, spikes, trainer
from tests import ranks
from tests.recognition import runs

BAD_STEP = 26  # after enough of them for a mean
KEYS = {
    "precision": "fp32", "max_steps": 32, "global_batch_size": 4, "lr": 0.01, "log_every": 1,
    "checkpoint_every": 8, "loss_spike_factor": 3.0,
    "norm_spike_factor": 1000.0,  # two images a rank: batch norms make jumps of 70
}  # fmt: skip


def guard(loss=2.0, norm=None):
    return spikes.SpikeGuard(collectives.world_group(), torch.device("cpu"), loss, norm)


def looked(own, losses, norm=1.0, first=1):
    for step, loss in enumerate(losses, first):
        own.observe(torch.tensor(loss), torch.tensor(norm), step)
    return own.found()


def test_what_a_spike_is():
    assert looked(guard(), [10.0] * 30) is None
    assert looked(guard(), [10.0] * 30 + [19.0]) is None
    assert "step 31: loss 21 where 10 was usual" in looked(guard(), [10.0] * 30 + [21.0, 99.0])
    assert looked(guard(), [10.0, 99.0]) is None  # no mean yet
    assert looked(guard(), [10.0] * 30 + [math.nan, math.inf]) is None  # of FiniteGuard
    assert looked(guard(None, 2.0), [10.0] * 30 + [99.0]) is None  # the loss is not looked at


def test_the_norm_is_looked_at_too():
    own = guard(None, 4.0)
    assert looked(own, [1.0] * 30) is None
    assert "gradient norm 5 where 1 was" in looked(own, [1.0], norm=5.0, first=31)
    assert looked(own, [1.0], norm=5.0, first=32)  # the spike did not move the mean


def test_the_means_are_saved():
    own, other = guard(), guard()
    looked(own, [10.0 + step % 3 for step in range(40)])
    other.load(json.loads(json.dumps(own.state())))
    assert other.state() == own.state()
    assert "step 41" in looked(other, [99.0], first=41)


@pytest.fixture
def keys(shards_dir, tmp_path):
    return KEYS | {"rec": str(shards_dir), "output": str(tmp_path / "run")}


def run_with_a_bad_batch(keys, kind="spike"):
    """A run in which the samples of step BAD_STEP, wherever they come, give a loss of no use."""
    bad = (BAD_STEP - 1) * 4
    plain = trainer._forward

    def forward(state, batch, micro, rows):
        loss, seen = plain(state, batch, micro, rows)
        if state.samples_seen == bad and (kind == "spike" or state.runtime.rank == 1):
            loss = loss._replace(total=loss.total * (30.0 if kind == "spike" else math.nan))
        return loss, seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_forward", forward)
        try:
            return runs.run(keys)
        except FloatingPointError as error:
            return str(error)


def records(keys):
    with open(f"{keys['output']}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.long
def test_a_warning_and_a_stop(keys):
    ranks.run(2, run_with_a_bad_batch, keys)
    (said,) = [r["spike"] for r in records(keys) if "spike" in r]
    assert f"step {BAD_STEP}" in said
    keys |= {"output": keys["output"] + "2", "on_spike": "stop"}
    messages = ranks.run(2, run_with_a_bad_batch, keys)
    assert messages[0] == messages[1] and f"spike in step {BAD_STEP}" in messages[0]


@pytest.mark.parametrize("kind", ["spike", "nan of one rank"])
def test_back_to_the_checkpoint_and_past_the_samples(keys, kind, tmp_path):
    """To the numbers of a run that was never shown them."""
    keys |= {"on_spike": "rollback"}
    end = ranks.run(2, run_with_a_bad_batch, keys, kind)[0]
    window = [24 * 4, BAD_STEP * 4]
    with open(f"{keys['output']}/skipped.json") as file:
        (noted,) = json.load(file)
    assert noted[:2] == window
    (said,) = [r["rollback"] for r in records(keys) if "rollback" in r]
    assert "back from step 2" in said and "skipping the samples 96 to 103" in said
    logged = [r["step"] for r in records(keys) if "loss" in r]
    assert logged == list(range(1, 33))
    # The same windows, known from the start: no rollback, the jump in the middle of the run.
    other = keys | {"output": str(tmp_path / "other")}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "skipped.json").write_text(json.dumps([noted]))
    shown = ranks.run(2, run_with_a_bad_batch, other, kind)[0]
    assert all(torch.equal(end[name], shown[name]) for name in end)
    # And a checkpoint knows it when it is resumed elsewhere.
    last = f"{keys['output']}/checkpoints/step-32"
    elsewhere = keys | {"output": str(tmp_path / "third"), "resume": last, "max_steps": 33}
    assert ranks.run(1, skipped_of, elsewhere)[0] == window


def skipped_of(keys):
    (window,) = build.build(config.make(runs.BASE | keys), runs.here()).skipped
    return [window.start, window.stop]


@pytest.mark.long
def test_a_run_goes_back_so_often_and_no_more(keys):
    """Every step spikes: the last words say how often it was tried."""
    keys |= {"on_spike": "rollback", "loss_spike_factor": 1.0, "max_rollbacks": 2}
    (message,) = ranks.run(1, endless, keys)
    assert "the run has rolled back 2 times already" in message


def endless(keys):
    plain = spikes.SpikeGuard.found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            spikes.SpikeGuard, "found", lambda own: plain(own) or ("x" if own._count > 10 else None)
        )
        try:
            runs.run(keys)
        except FloatingPointError as error:
            return str(error)


def test_nothing_to_go_back_to(keys):
    keys |= {"on_spike": "rollback", "checkpoint_every": 100}
    assert all("no checkpoint yet" in m for m in ranks.run(2, run_with_a_bad_batch, keys))


@pytest.mark.parametrize(
    "content", ["[[1, 2]]", "", "{}x", "3", "[[Infinity, 2, 3]]", "[[1, null, 3]]", "[" * 100_000]
)
def test_a_damaged_list_of_skipped_samples_is_named(keys, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped.json").write_text(content)
    with pytest.raises(ValueError, match="skipped.json is damaged"):
        spikes.skipped(keys["output"], None)


def test_saving_says_what_is_left_out(keys):
    state = ranks.run(1, facts_of, keys)[0]
    assert state["skipped"] == [[4, 8, "x"]] and len(state["spikes"]) == 3


def facts_of(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    state.skipped = [spikes.Window(4, 8, "x")]
    return saving.facts(state, {})
