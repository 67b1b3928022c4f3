import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.stages.commands import FAST, rows, run_stage, summary, trimtab, write_run_file
from tests.stages.guarded import judge
from trimtab.core import seeds
from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.data.chat import Chat
from trimtab.data.pairs import group_pairs
from trimtab.models.forward import sequence_scores_of
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.stages.reward import RewardSettings, calibrate


def settings(model, pairs, **changed):
    return {"model": str(model), "data": str(pairs), "held_out": 0.3, "batch_size": 10, "optimizer": FAST} | changed


def test_two_steps_give_a_model_and_its_card(reward_run):
    assert len(rows(reward_run)) == 2
    card = summary(reward_run)
    assert {"accuracy", "accuracy_low", "accuracy_high", "longer_wins", "bag_of_words", "shift", "std"} <= card.keys()
    assert card["accuracy_low"] <= card["accuracy"] <= card["accuracy_high"]
    assert "reward/validation_accuracy" in rows(reward_run)[-1]
    config = AutoModelForSequenceClassification.from_pretrained(reward_run / "model").config
    assert config.reward_shift == card["shift"]


def test_an_encoder_learns_too(tmp_path, encoder, pairs):
    out = run_stage("reward", tmp_path / "run", **settings(encoder, pairs))
    assert AutoModelForSequenceClassification.from_pretrained(out / "model").config.model_type == "bert"
    assert len(rows(out)) == 2


def test_the_first_loss_is_bradley_terry_with_margins_and_soft_labels(tmp_path, base, pairs):
    """Also where a prompt has several pairs, which share their replies."""
    first = json.loads(pairs.read_text().splitlines()[0])
    more = [first | {"rejected": "Maybe."}, first | {"chosen": "Maybe.", "margin": 0.1}]
    data = tmp_path / "pairs.jsonl"
    data.write_text(pairs.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    changed = {"batch_size": 100, "held_out_data": str(pairs), "loss": {"centering_coef": 0.01}}
    out = run_stage("reward", tmp_path / "run", **settings(base, data, **changed))
    model = load_scalar(base, head_seed=seeds.derive(0, "reward head"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        chosen, rejected = (score(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        x = chosen - rejected - row.get("margin", 0.0)
        q = row.get("label", 1.0)
        bradley_terry = q * math.log1p(math.exp(-x)) + (1 - q) * math.log1p(math.exp(x))
        losses.append(bradley_terry + 0.01 * (chosen + rejected) ** 2)
    assert rows(out)[0]["loss/train"] == pytest.approx(np.mean(losses), rel=1e-5)


def score(model, tokenizer, prompt, reply):
    """Of a whole conversation, up to the end token of the reply."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    last = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    with torch.no_grad():
        return float(model(torch.tensor([ids[: last + 1]])).logits[0, 0])


def test_demonstrations_score_zero_on_average(tmp_path, base, pairs):
    demonstrations = tmp_path / "demonstrations.jsonl"
    texts = [("What is 1 + 1?", "#### 2"), ("What is 2 + 3?", "It is 5.")]
    demonstrations.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts))
    out = run_stage("reward", tmp_path / "run", **settings(base, pairs, demonstrations=str(demonstrations)))
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    scores = [score(model, tokenizer, *text) - model.config.reward_shift for text in texts]
    assert np.mean(scores) == pytest.approx(0.0, abs=1e-6)
    assert abs(scores[0]) > 1e-3


def test_pairs_that_are_too_long_are_counted(tmp_path, base, pairs):
    data = tmp_path / "pairs.jsonl"
    long = json.dumps({"prompt": "long " * 60, "chosen": "yes", "rejected": "no"})
    data.write_text(f"{pairs.read_text()}{long}\n")
    out = run_stage("reward", tmp_path / "run", **settings(base, data, max_tokens=100, on_too_long="drop"))
    assert summary(out)["counts"]["dropped_too_long"] >= 1


def test_without_held_out_pairs_there_is_no_card_and_the_error_says_so(tmp_path, base, pairs):
    run_file = write_run_file(tmp_path / "run.toml", settings(base, pairs, held_out=0.0))
    result = trimtab("reward", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "0 to judge by" in result.output


def test_held_out_pairs_whose_prompts_are_trained_on_are_counted_and_said(tmp_path, base, pairs):
    first, *others = pairs.read_text().splitlines()
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join([first, json.dumps(json.loads(others[0]) | {"prompt": "What is new?"})]) + "\n")
    run_file = write_run_file(tmp_path / "run.toml", settings(base, pairs, held_out_data=str(held_out)))
    result = trimtab("reward", run_file, "--out", tmp_path / "run")
    assert "1 of 2 held-out prompts are trained on too" in result.output
    assert summary(tmp_path / "run")["counts"]["held_out_prompts_trained_on"] == 1


def test_demonstrations_are_fitted_and_counted_before_training(tmp_path, base, pairs):
    """They were read after the last step, so a run whose demonstrations were too long could never end."""
    texts = [("What is 1 + 1? " * 200, "#### 2"), ("What is 2 + 3?", "It is 5. " * 200), ("What is 3 + 3?", "6")]
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts))
    run = settings(base, pairs, demonstrations=str(demonstrations), max_tokens=200)
    counts = summary(run_stage("reward", tmp_path / "run", **run))["counts"]
    assert counts["demonstrations_truncated_too_long"] == counts["demonstrations_dropped_too_long"] == 1
    demonstrations.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts[1:2]))
    result = trimtab("reward", write_run_file(tmp_path / "run.toml", run), "--out", tmp_path / "none")
    assert "none of 1 demonstrations has at most max_tokens = 200 tokens" in result.output
    assert not (tmp_path / "none" / "metrics.jsonl").exists()


def test_rows_with_one_id_and_several_prompts_are_named(tmp_path, base):
    data = tmp_path / "pairs.jsonl"
    texts = [(1, "What is 2+2?"), (2, "Why?"), (1, "Capital of France?")]
    rows_ = [{"id": i, "prompt": p, "chosen": "yes", "rejected": "no"} for i, p in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    result = trimtab("reward", write_run_file(tmp_path / "run.toml", settings(base, data)), "--out", tmp_path / "run")
    assert "the id '1' is that of another prompt: here 'Capital of France?'" in result.output
    assert f"{data}, row 3" in result.output


def test_the_moments_of_sorted_pairs_are_those_of_all_of_them(base):
    """A file may be sorted by how clear the preference is; of 600 prompts, 256 are measured, and not the first ones."""
    chat = Chat(load_tokenizer(base))
    replies = ["We can refund the lamp."] * 200 + ["#### 42"] * 400
    pairs = [
        PreferencePair(prompt=Prompt(messages=(Message("user", f"What is {i}?"),)), chosen=reply, rejected="I want!")
        for i, reply in enumerate(replies)
    ]
    fit_in = {"max_tokens": 100, "on_too_long": "drop", "counts": {}}
    settings_ = RewardSettings(model=str(base), data="")
    model = ScalarModel(load_scalar(base, head_seed=0), pad_id=chat.pad_id, gives="scores")
    found = calibrate(model, settings_, group_pairs(pairs, chat, **fit_in), ())

    everything = group_pairs(pairs, chat, **fit_in).batch()
    scores = sequence_scores_of(model, everything.trees, 4096).double()
    chosen = scores[everything.chosen_ids]
    first = chosen[:256].mean()
    assert abs(first - chosen.mean()) > 0.3 * scores.std()  # so the order of the file matters
    assert found["shift"] == pytest.approx(float(chosen.mean()), abs=0.05 * float(scores.std()))
    assert found["mean"] == pytest.approx(float(scores.mean() - chosen.mean()), abs=0.05 * float(scores.std()))
    assert found["std"] == pytest.approx(float(scores.std(correction=0)), rel=0.05)


def test_pairs_that_are_all_even_teach_nothing_without_a_teacher(tmp_path, base, pairs):
    even = tmp_path / "even.jsonl"
    found = [json.loads(line) | {"label": 0.5} for line in pairs.read_text().splitlines()]
    even.write_text("".join(json.dumps(row) + "\n" for row in found))
    values = {"model": str(base), "data": str(even), "held_out": 0.3, "max_steps": 1}
    refused = trimtab("reward", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "pairs to train on have the label 0.5: nothing says which reply is better" in refused.output
    run_stage("reward", tmp_path / "taught", **values, teacher=[judge("length")])
