from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.reports.fabricate import online_metrics
from trimtab.reports import headline
from trimtab.reports.alarms import alarms_of
from trimtab.reports.collect import PipelineRecord, RunRecord, Series, collect
from trimtab.stats import Interval


def run_with(finished: bool = True, summary: dict | None = None, **columns: list[float]) -> RunRecord:
    """Names are written with __ for the slash."""
    metrics = {
        name.replace("__", "/"): Series(np.arange(1.0, len(values) + 1), np.array(values, dtype=float))
        for name, values in columns.items()
    }
    return RunRecord(name="ppo", stage="online", metrics=metrics, summary=summary or {}, finished=finished)


def test_numbers_are_found_however_they_are_stored():
    values = {"a": 1, "b": {"value": 2, "low": 1, "high": 3, "count": 7}, "c": 0.5, "c_low": 0.4, "c_high": 0.6}
    values |= {"text": "1", "flag": True, "nan": math.nan, "huge": 10**400}
    assert headline.number(values, "a") == 1
    assert headline.interval(values, "b") == Interval(2, 1, 3, 7)
    assert headline.interval(values, "c") == Interval(0.5, 0.4, 0.6, 0)
    assert all(headline.number(values, name) is None for name in ("text", "flag", "nan", "huge", "missing"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"),
        (3.0, "3"),
        (12345.6, "12,346"),
        (1e-5, "1e-05"),
        (None, "–"),
        (math.nan, "–"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_are_shown_in_three_digits(value, shown):
    assert headline.show(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(9.86, "9.9 s"), (61, "1 min 1 s"), (3725, "1 h 2 min")])
def test_durations_are_shown_in_two_units(value, shown):
    assert headline.seconds(value) == shown


def test_the_tiles_of_a_pipeline_say_what_its_summary_says(pipeline):
    tiles = {tile.label: tile for tile in headline.pipeline_tiles(collect(pipeline))}
    assert (tiles["Gold score"].value, tiles["Gold score"].detail) == ("0.55 → 0.75", "[0.73, 0.77]")
    assert (tiles["Win rate against SFT"].value, tiles["Win rate against SFT"].detail) == ("86%", "[82%, 90%]")
    assert tiles["Best of 64"].value == "0.72"
    assert tiles["KL"].value == "3.2"
    assert tiles["Time"].value == "14 min 23 s"
    assert tiles["Reward-model accuracy"].value == "68%"
    assert headline.pipeline_tiles(PipelineRecord(name="empty", runs=())) == ()


def test_the_verdict_of_a_good_pipeline_names_the_gain_and_the_hacked_run(pipeline):
    verdict = headline.pipeline_verdict(collect(pipeline))
    text = " ".join(verdict.sentences)
    assert verdict.standing == "good"
    assert "rose from 0.55 to 0.75 [0.73, 0.77]" in text
    assert "on the same 200 prompts the mean change is +0.20 [+0.17, +0.22]" in text
    assert "In ppo_no_leash gold peaked at" in text
    assert "In ppo gold" not in text


def test_the_paired_difference_decides_before_anything_else(pipeline):
    record = collect(pipeline)
    evaluated = record.runs[-1]
    worse = {"difference": -0.1, "difference_low": -0.2, "difference_high": -0.05}
    changed = replace(evaluated, summary={**evaluated.summary, "gold_difference": worse})
    assert headline.pipeline_verdict(replace(record, runs=(*record.runs[:-1], changed))).standing == "bad"


def test_the_difference_comes_from_the_samples_where_the_summary_has_none(pipeline):
    evaluated = collect(pipeline).runs[-1]
    found = headline.comparison(replace(evaluated, summary={}))
    changes = [row["gold"] - row["baseline_gold"] for row in evaluated.samples]
    assert found.difference.value == pytest.approx(sum(changes) / len(changes))
    assert found.difference.low < found.difference.value < found.difference.high
    assert found.difference.count == 200


def test_a_reward_model_is_no_judge_of_its_own_work():
    policy = {"reward_sft": 0.1, "reward_final": 2.0, "reward_final_low": 1.9, "reward_final_high": 2.1}
    verdict = headline.pipeline_verdict(PipelineRecord(name="p", runs=(), summary={"policy": policy}))
    assert verdict.standing == "neutral"
    assert "The reward rose from 0.10 to 2.00 [1.90, 2.10]." in verdict.sentences
    summary = {"win_rate_by_reward": {"win_rate": 0.9, "win_rate_low": 0.8, "win_rate_high": 0.95}}
    verdict = headline.run_verdict(RunRecord(name="evaluate", stage="evaluate", summary=summary))
    assert verdict.standing == "neutral"
    assert verdict.sentences == ("It beats the baseline on 90% [80%, 95%] of prompts.",)


@pytest.mark.parametrize(
    ("low", "high", "standing"),
    [(0.56, 0.6, "good"), (0.4, 0.5, "bad"), (0.5, 0.6, "unclear"), (None, None, "unclear")],
)
def test_without_samples_the_interval_of_gold_decides(low, high, standing):
    policy = {"gold_sft": 0.55, "gold_final": 0.58, "gold_final_low": low, "gold_final_high": high}
    assert headline.pipeline_verdict(PipelineRecord(name="p", runs=(), summary={"policy": policy})).standing == standing


def test_a_pipeline_that_has_only_begun_is_not_judged():
    verdict = headline.pipeline_verdict(PipelineRecord(name="p", runs=()))
    assert (verdict.standing, verdict.sentences) == ("unclear", ())
    assert "not enough" in verdict.title


def test_a_reward_model_alone_is_not_called_a_change():
    record = PipelineRecord(name="p", runs=(), summary={"reward_model": {"accuracy": 0.7}})
    assert headline.pipeline_verdict(record).title == "No policy has been judged here yet."


def test_a_healthy_run_raises_no_alarm():
    rows = online_metrics(100, leash=True)
    columns = {name.replace("/", "__"): [row[name] for row in rows] for name in rows[0] if name != "step"}
    assert alarms_of(run_with(**columns)) == ()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"rollout__truncated_fraction": [0.0, 0.5]}, "50% of the last replies hit the length limit"),
        ({"rollout__logprob_difference": [0.0, 0.02]}, "differ by up to 0.02 nats"),
        ({"policy__clip_fraction": [0.1, 0.4]}, "40% of the tokens were clipped"),
        ({"critic__explained_variance": [0.5, -0.2]}, "worse than a constant"),
        ({"policy__entropy": [1.0, 0.4]}, "entropy fell from 1 to 0.4"),
        ({"rollout__length_mean": [20.0, 30.0]}, "1.5 times longer"),
        ({"loss__train": [1.0, math.nan]}, "not a finite number at some step: loss/train"),
        ({"finished": False, "loss__train": [1.0]}, "not finished: 1 steps"),
        (
            {
                "policy__kl": [*range(12)],
                "reward__mean": [*range(12)],
                "gold__mean": [0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.4],
            },
            "gold ended 46% below its peak while the reward kept rising",
        ),
        (
            {"summary": {"accuracy": 0.6, "accuracy_low": 0.55, "accuracy_high": 0.65, "longer_wins": 0.58}},
            "longer reply",
        ),
    ],
)
def test_each_alarm_states_its_number(columns, words):
    (alarm,) = alarms_of(run_with(**columns))
    assert words in alarm


def test_noise_of_single_steps_is_no_fall():
    # A run that stays at 0.78, seen through 64 replies a step: the best step is 0.86 and the last one 0.74.
    draw = np.random.default_rng(0)
    for _ in range(50):
        gold = [*draw.normal(0.78, 0.045, size=28), 0.86, 0.74]
        found = alarms_of(run_with(policy__kl=[*range(30)], reward__mean=[*range(30)], gold__mean=gold))
        assert not [alarm for alarm in found if "gold" in alarm]


def test_a_single_run_is_summed_up_by_its_stage(pipeline):
    runs = {run.name: run for run in collect(pipeline).runs}
    assert "Validation loss fell from" in " ".join(headline.run_verdict(runs["sft"]).sentences)
    assert "of held-out pairs" in headline.run_verdict(runs["reward"]).sentences[0]
    assert headline.run_verdict(runs["evaluate"]).standing == "good"
    assert headline.run_verdict(RunRecord(name="new", stage="sft")) is None


def test_a_selection_says_what_choosing_gave_and_cost():
    curve = [
        {"n": 1, "kl": 0.0, "reward": 0.1},
        {"n": 8, "kl": 1.204, "reward": 0.7, "reward_low": 0.6, "reward_high": 0.8},
    ]
    run = replace(run_with(summary={"best_of": {"curve": curve}}), stage="select")
    verdict = headline.run_verdict(run)
    assert verdict is not None
    assert verdict.sentences == (
        "The best of 8 has a reward of 0.70 [0.60, 0.80], one reply 0.10.",
        "Choosing costs at most 1.2 nats of KL.",
    )
    assert headline.run_verdict(replace(run, summary={"best_of": {"curve": ["?"]}})) is None


def test_replies_that_no_reward_could_judge_are_an_alarm():
    run = run_with(reward__model_failed=[0.0, 0.0], reward__exact_answer_failed=[2.0, 1.0])
    assert alarms_of(run) == ("3 replies could not be judged by the reward exact_answer",)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.6212, 0.6178, "The gold score stayed at 0.62"),
        (0.62, 0.55, "The gold score fell from 0.62 to 0.55"),
        (0.55, 0.62, "The gold score rose from 0.55 to 0.62"),
        (-0.141, -0.139, "The gold score stayed at -0.14"),
    ],
)
def test_two_numbers_that_read_the_same_have_stayed(before: float, after: float, said: str):
    policy = {"judge": "gold", "gold_sft": before, "gold_final": after}
    record = PipelineRecord(name="p", runs=(), summary={"policy": policy})
    assert headline.pipeline_verdict(record).sentences[0].startswith(said)


def test_a_change_that_rounds_to_nothing_has_no_sign():
    assert headline._signed(-0.001) == headline._signed(0.001) == "0.00"
    assert headline._signed(-0.006) == "-0.01"
