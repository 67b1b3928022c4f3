"""Runs whose rollouts lag, stopped and resumed: with the same lag, with another, and with more steps."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.stages.commands import FAST, rows, run_stage, trimtab, write_run_file
from tests.stages.family import lagging, reward
from tests.stages.test_resume import differences, kill_after, num_rows, start, wait_for_rows
from trimtab import worlds
from trimtab.core.metrics import Mean, Peak, Total
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.engines.local.learner import LocalLearner
from trimtab.stages.online import rollout_queue
from trimtab.stages.online.draws import Draw
from trimtab.stages.online.rollouts import Group, RolloutBatch
from trimtab.stages.online.state import OnlineState

ROOT = Path(__file__).parents[2]


def everything(base, lag, **changed):
    """All the state there is: moments, an adapted coefficient, a critic, rounds that differ."""
    return (
        lagging(
            base,
            lag,
            rewards=reward("even"),
            num_steps=6,
            checkpoint_every=1,
            advantage={"name": "gae"},
            critic={"init": "policy", "optimizer": FAST, "warmup_steps": 1},
            dynamic_sampling={"max_rounds": 3},
            shaping={"normalize": True, "clip": 2.0},
            kl={"name": "adaptive", "coef": 0.1, "target": 0.5, "horizon": 30.0},
        )
        | changed
    )


@pytest.mark.parametrize("lag", [1, 2])
def test_killed_with_rollouts_in_store_it_ends_with_the_same_bits(tmp_path, base, lag, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the process finds the reward
    settings = everything(base, lag)
    undisturbed = run_stage("online", tmp_path / "undisturbed", **settings)
    assert len({row["rollout/rounds"] for row in rows(undisturbed)}) > 1
    run_file, out = write_run_file(tmp_path / "run.toml", settings), tmp_path / "run"
    process = start("online", run_file, out)
    wait_for_rows(process, out, 2)
    assert kill_after(process, random.Random(lag).uniform(0, 0.05)), "it was to be killed at work"
    done = num_rows(out)
    assert done >= 2
    stored = sorted((out / "checkpoints").glob("step-*"))[-1]
    assert json.loads((stored / "state.json").read_text())["drawn"][0]["number"] == int(stored.name[5:])
    run_stage("online", out, **settings)
    assert not differences(undisturbed, out)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2])
def test_killed_many_times_with_rollouts_in_store_it_ends_with_the_same_bits(tmp_path, base, lag, monkeypatch):
    """Kills (TRIMTAB_KILLS, 15 for each lag) at random moments of runs, each of which is compared when it has ended."""
    monkeypatch.chdir(ROOT)
    settings, draw = everything(base, lag), random.Random(lag)
    undisturbed = run_stage("online", tmp_path / "undisturbed", **settings)
    run_file, kills, runs = write_run_file(tmp_path / "run.toml", settings), 0, 0
    wanted = int(os.environ.get("TRIMTAB_KILLS", "15"))
    while kills < wanted:
        out = tmp_path / f"run-{runs}"
        while not (out / "summary.json").exists():
            process = start("online", run_file, out)
            if kills < wanted:
                wait_for_rows(process, out, min(6, num_rows(out) + draw.choice((0, 1, 2))))
            kills += kill_after(process, draw.uniform(0, 0.4) if kills < wanted else 600.0)
        assert not differences(undisturbed, out), (runs, kills)
        runs += 1
    print(f"lag {lag}: {kills} kills, {runs} runs, all with the same bits")


def stopped_after(tmp_path, monkeypatch, settings, num):
    """A run that was stopped after `num` steps; its directory."""
    update, asked, out = LocalLearner.update, [], tmp_path / f"run-{len(list(tmp_path.iterdir()))}"

    def interrupted(self, work):
        asked.append(1)
        if len(asked) == num:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, work)

    with monkeypatch.context() as patched:
        patched.setattr(LocalLearner, "update", interrupted)
        result = trimtab("online", write_run_file(out.with_suffix(".toml"), settings), "--out", out)
    assert f"stopped after step {num}" in result.output
    return out


def test_a_run_that_goes_on_with_a_smaller_lag_draws_the_same_prompts_again(tmp_path, base, monkeypatch):
    out = stopped_after(tmp_path, monkeypatch, lagging(base, 2, prompts="world:arithmetic?num=15"), 2)
    run_file = write_run_file(tmp_path / "now.toml", lagging(base, 0, prompts="world:arithmetic?num=15"))
    result = trimtab("online", run_file, "--out", out)
    assert result.exit_code == 0, result.output
    assert "engine.max_staleness 2 → 0" in result.output
    assert "rollouts for step 3 and 4 are older than engine.max_staleness = 0 allows" in result.output
    assert [row.get("rollout/staleness_max", 0) for row in rows(out)] == [0, 1, 0, 0, 0]
    prompts = [row["prompt"] for row in rows(out, "samples.jsonl")][::3]
    assert len(set(prompts)) == len(prompts) == 15
    recorded = json.loads((out / "environment.json").read_text())["changed_settings"]
    assert recorded == [{"after_step": 2, "settings": {"engine.max_staleness": {"before": 2, "now": 0}}}]
    order = OnlineState([], worlds.load("arithmetic").prompts("train", 15), 0, 0.0)
    assert prompts == [p.text for p in order.take_prompts(15)]


@pytest.mark.parametrize(
    ("before", "after", "ages"), [(0, 2, [0, 0, 0, 1, 2]), (2, 1, [0, 1, 0, 1, 1]), (1, 2, [0, 1, 1, 1, 2])]
)
def test_a_lag_that_changes_holds_from_there_on_and_is_exact_again(tmp_path, base, monkeypatch, before, after, ages):
    """The first draws after the change are all made with the weights of that moment."""
    then, now = lagging(base, before), lagging(base, after, checkpoint_every=1)
    out = stopped_after(tmp_path, monkeypatch, then, 2)
    run_stage("online", out, **now)
    assert [row.get("rollout/staleness_max", 0) for row in rows(out)] == ages
    again = stopped_after(tmp_path, monkeypatch, then, 2)
    with monkeypatch.context() as patched:
        take, taken = rollout_queue.RolloutQueue.take, []

        def dies(self, *arguments):
            taken.append(1)
            if len(taken) == 2:
                raise SystemError
            return take(self, *arguments)

        patched.setattr(rollout_queue.RolloutQueue, "take", dies)
        with pytest.raises(SystemError):
            trimtab("online", write_run_file(tmp_path / "again.toml", now), "--out", again)
    run_stage("online", again, **now)
    assert not differences(out, again)


def test_a_finished_run_that_grows_draws_what_it_lacks_with_the_weights_it_has(tmp_path, base):
    out = run_stage("online", tmp_path / "run", **lagging(base, 2, num_steps=3))
    run_stage("online", out, **lagging(base, 2, num_steps=6))
    assert [row["rollout/version"] for row in rows(out)] == [0, 0, 0, 3, 3, 3]


def test_stored_rollouts_come_back_to_the_last_bit(tmp_path):
    prompt = Prompt(messages=(Message("system", "be brief"), Message("user", "é?")), facts={"numbers": [1, 2]})
    plain = Rollout(
        prompt=prompt,
        response="1\u2028 2",
        prompt_ids=(1, 2),
        response_ids=(3, 4, 0),
        logprobs=(-0.1, -1e-30, float(torch.tensor(-1 / 3))),
        finish_reason="stop",
    )
    episode = Rollout(
        prompt=prompt,
        response="a b",
        prompt_ids=(1,),
        response_ids=(5, 6, 7),
        logprobs=(-0.25, 0.0),
        finish_reason="length",
        observations=((1, 2),),
        events={"turns": 2},
    )
    groups = [
        Group([plain, episode], torch.tensor([1 / 3, -2e-8]), float("nan")),
        Group([episode], torch.tensor([7.0]), 0.1 + 0.2),
    ]
    logged = {"reward/mean": Mean(1.0, 3), "rollout/unjudged": Total(2), "x/max": Peak(0.1), "x/none": Mean(0.0, 0)}
    state = OnlineState(
        learners=[],
        prompts=[prompt],
        seed=0,
        kl_coef=0.5,
        num_prompts_taken=9,
        drawn=[Draw(4, 2, 6, RolloutBatch(groups, logged))],
    )
    state.save(tmp_path)
    found = OnlineState([], [prompt], 0, 0.0)
    found.load(tmp_path)
    assert (found.kl_coef, found.num_prompts_taken) == (0.5, 9)
    (draw,) = found.drawn
    assert (draw.number, draw.version, draw.num_prompts_before) == (4, 2, 6)
    for mine, stored in zip(groups, draw.rollouts.groups, strict=True):
        assert list(mine.rollouts) == list(stored.rollouts)
        assert torch.equal(mine.rewards, stored.rewards)
        assert mine.rewards.dtype == stored.rewards.dtype
        assert repr(mine.baseline) == repr(stored.baseline)
    assert {n: repr(m.value) for n, m in logged.items()} == {n: repr(m.value) for n, m in draw.rollouts.metrics.items()}
