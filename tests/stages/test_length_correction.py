"""A reward without length: the curves of the reward stage and of `trimtab debias`, and every stage that uses them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.stages.commands import (
    FAST,
    PROMPTS,
    SHORT,
    online_settings,
    rows,
    run_stage,
    summary,
    trimtab,
    write_run_file,
)
from tests.stages.test_card import card_in
from trimtab.core.types import PreferencePair
from trimtab.data.layouts import load
from trimtab.evals.length_curves import METHODS, fit_curve
from trimtab.rewards.length_correction import LENGTH_FILE, corrections_in, read_correction
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import lengths_of
from trimtab.stages.card import texts_of


def settings(base, pairs, **changed):
    return {"model": str(base), "data": str(pairs), "batch_size": 10, "optimizer": FAST} | changed


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, tmp_path_factory, base, pairs):
    """A run that holds out all twenty pairs: one model, and an ensemble of two."""
    out = tmp_path_factory.mktemp("length") / f"members_{request.param}"
    return run_stage("reward", out, **settings(base, pairs, held_out_data=str(pairs), members=request.param))


def reward(run, method="lowess"):
    return {"name": "model", "path": str(run / "model"), "length_correction": method}


def test_the_stage_fits_the_curves_to_the_replies_that_it_holds_out(trained, pairs):
    records = load(PreferencePair, pairs).records
    texts = [text for side in ("chosen", "rejected") for text in texts_of(records, side)]
    scorer = RewardModel(path=str(trained / "model")).load(token_budget=4096)
    sequences = scorer.ids_of_texts(texts)
    scores, lengths = scorer.member_scores(sequences).double().numpy(), np.array(lengths_of(sequences), dtype=float)
    kept = json.loads((trained / "model" / LENGTH_FILE).read_text())
    assert (kept["num_replies"], kept["unit"], kept["data"]) == (40, "tokens", [str(pairs)])
    for method in METHODS:
        curves = read_correction(trained / "model", method).curves
        assert len(curves) == len(scores)
        for curve, row in zip(curves, scores, strict=True):
            assert curve.at(lengths) == pytest.approx(fit_curve(row, lengths, method).at(lengths), abs=1e-4)


def test_the_card_has_the_premium_of_length_before_and_after(trained, pairs, tmp_path):
    card = card_in(trained)
    figures = card["length"]
    assert figures["none"]["accuracy"]["accuracy"] == card["accuracy"]
    assert abs(figures["regression"]["premium"]["value"]) < 1e-4 < abs(figures["none"]["premium"]["value"])
    assert summary(trained)["length"] == figures
    told = trimtab("card", trained / "model", pairs, "--out", tmp_path / "card")
    assert "One standard deviation of length" in told.output
    assert "with length_correction = 'lowess'" in told.output
    by_command = card_in(tmp_path / "card")["length"]
    for name in ("none", *METHODS):
        assert by_command[name]["premium"]["value"] == pytest.approx(figures[name]["premium"]["value"], abs=1e-3)
    scored = trimtab("score", "--model", trained / "model", "--data", pairs)
    assert "with length_correction = 'regression'" in scored.output


def test_online_training_is_paid_the_corrected_reward(trained, base, tmp_path):
    changed = {"advantage": {"name": "grpo"}, "group_size": 2, "num_steps": 1, "num_epochs": 1, "num_minibatches": 1}
    runs = {}
    for name, part in (("plain", {"name": "model", "path": str(trained / "model")}), ("corrected", reward(trained))):
        values = online_settings(base, base, rewards=[part], **changed)
        runs[name] = rows(run_stage("online", tmp_path / name, **values))[0]
    taken = runs["corrected"]["reward/model_for_length"]
    assert runs["plain"]["reward/mean"] - runs["corrected"]["reward/mean"] == pytest.approx(taken, abs=1e-4)
    assert 0 <= runs["corrected"]["reward/model_beyond_lengths"] <= 1
    assert not any("for_length" in name for name in runs["plain"])


def test_select_and_evaluate_judge_by_the_corrected_reward(trained, base, tmp_path):
    parts = [{"name": "model", "path": str(trained / "model")}, reward(trained)]
    common = {"model": str(base), "prompts": PROMPTS, "rewards": parts, "sampling": SHORT}
    chosen = run_stage("select", tmp_path / "select", **common, replies_per_prompt=2)
    replies = [r for row in rows(chosen, "replies.jsonl") for r in row["replies"]]
    assert any(r["parts"]["model"] != r["parts"]["model_2"] for r in replies)
    judged = summary(run_stage("evaluate", tmp_path / "evaluate", **common, num_prompts=4))
    assert {"model", "model_2"} <= judged["policy"].keys()


def test_without_curves_a_run_is_refused_before_it_starts(reward_run, base, tmp_path):
    """The stage held out twelve replies, which is too few."""
    assert not (reward_run / "model" / LENGTH_FILE).exists()
    assert card_in(reward_run)["length"].keys() == {"mean_tokens", "std_tokens", "none"}
    run_file = write_run_file(tmp_path / "run.toml", online_settings(base, base, rewards=[reward(reward_run)]))
    done = trimtab("online", run_file, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "rewards.0.length_correction" in done.output
    assert "trimtab debias" in done.output
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_another_correction(trained, base, tmp_path):
    model = shutil.copytree(trained / "model", tmp_path / "model")
    part = {"name": "model", "path": str(model), "length_correction": "regression"}
    changed = {"advantage": {"name": "grpo"}, "group_size": 2, "num_steps": 1, "checkpoint_every": 1}
    values = online_settings(base, base, rewards=[part], **changed)
    run_stage("online", tmp_path / "run", **values)
    kept = json.loads((model / LENGTH_FILE).read_text())
    kept["regression"][0]["slope"] += 0.1
    (model / LENGTH_FILE).write_text(json.dumps(kept))
    done = trimtab(
        "online", write_run_file(tmp_path / "run.toml", values | {"num_steps": 2}), "--out", tmp_path / "run"
    )
    assert done.exit_code == 2
    assert str(model) in done.output


@pytest.fixture
def model(reward_run, tmp_path):
    """A copy of a reward model without curves."""
    return shutil.copytree(reward_run / "model", tmp_path / "model")


def test_the_command_fits_to_replies_or_pairs_of_any_source(model, pairs, tmp_path):
    done = trimtab("debias", model, pairs)
    assert done.exit_code == 0, done.output
    assert "fitted to 40 replies" in done.output
    by_pairs = corrections_in(model)
    replies = tmp_path / "replies.jsonl"
    records = load(PreferencePair, pairs).records
    lines = [{"prompt": p.text, "completion": t} for side in ("chosen", "rejected") for p, t in texts_of(records, side)]
    replies.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trimtab("debias", model, replies, "--bandwidth", 1).exit_code == 0
    assert corrections_in(model)["regression"] == by_pairs["regression"]
    assert corrections_in(model)["lowess"] != by_pairs["lowess"]
    assert json.loads((model / LENGTH_FILE).read_text())["bandwidth"] == 1.0
    RewardModel(path=str(model), length_correction="lowess").load(token_budget=4096)


def test_the_command_says_which_replies_and_models_will_not_do(model, pairs, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(pairs.read_text().splitlines(keepends=True)[:9]))
    equal = tmp_path / "equal.jsonl"
    equal.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": "yes"}) + "\n" for i in range(30)))
    for data, said in ((few, "18 replies, and at least 20 are needed"), (equal, "each of 30 replies has")):
        done = trimtab("debias", model, data)
        assert done.exit_code == 2
        assert said in done.output
        assert not (model / LENGTH_FILE).exists()
    done = trimtab("debias", "someone/reward-model", pairs)
    assert done.exit_code == 2
    assert "'someone/reward-model' is no directory here" in done.output
    config = json.loads((model / "config.json").read_text()) | {"reward_kind": "process"}
    (model / "config.json").write_text(json.dumps(config))
    assert "this is a process reward model" in trimtab("debias", model, pairs).output


def test_an_exported_model_keeps_its_curves(model, pairs, tmp_path):
    assert trimtab("debias", model, pairs).exit_code == 0
    done = trimtab("export", "--model", model, "--out", tmp_path / "whole")
    assert done.exit_code == 0, done.output
    assert corrections_in(tmp_path / "whole") == corrections_in(model)


def test_replies_that_the_model_cannot_read_are_counted(encoder, pairs, tmp_path):
    """An encoder has learned so many positions and no more."""
    model = shutil.copytree(encoder, tmp_path / "encoder")
    most = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    long = tmp_path / "long.jsonl"
    long.write_text(pairs.read_text() + json.dumps({"prompt": "a", "chosen": "word " * most, "rejected": "no"}) + "\n")
    done = trimtab("debias", model, long)
    assert done.exit_code == 0, done.output
    assert "fitted to 41 replies" in done.output
    assert "1 replies are left out" in done.output


def test_replies_that_were_trained_on_and_rows_left_out_are_named(reward_run, pairs, tmp_path):
    model = shutil.copytree(reward_run, tmp_path / "run") / "model"
    assert f"the model was trained on {pairs}" in trimtab("debias", model, pairs).output
    twice = trimtab("debias", model, pairs, pairs)
    assert twice.exit_code == 2
    assert f"{pairs} is given twice" in twice.output
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text() + json.dumps({"prompt": "Why?", "chosen": "", "rejected": "No."}) + "\n")
    assert trimtab("debias", model, other).exit_code == 2
    done = trimtab("debias", model, other, "--on-bad-row", "drop")
    assert done.exit_code == 0, done.output
    assert "1 rows are left out" in done.output
    assert "was trained on" not in done.output
