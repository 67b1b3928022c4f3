"""Distillation in the reward stage: labels from a teacher's scores, what the student keeps, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.stages.commands import FAST, rows, run_stage, summary, trimtab, write_run_file
from tests.stages.guarded import judge
from tests.stages.test_card import card_in
from tests.stages.test_reward import score
from trimtab.core import seeds
from trimtab.core.errors import DataError
from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.data.pairs import group_pairs
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.model import RewardModel
from trimtab.stages import reward
from trimtab.stages.card import texts_of
from trimtab.stages.reward_teacher import TEACHER_FILE, agreement_with_teacher, teach


def settings(base, pairs, teacher, **changed):
    held_out = {"held_out_data": str(pairs), "batch_size": 100, "optimizer": FAST}
    return {"model": str(base), "data": str(pairs), "teacher": teacher} | held_out | changed


def refused(tmp_path, **values):
    done = trimtab("reward", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert done.exit_code == 2
    return done.output


def a_pair(i, chosen, rejected, **more):
    return PreferencePair(
        prompt=Prompt(messages=(Message("user", f"What is {i}?"),)), chosen=chosen, rejected=rejected, **more
    )


# --- labels ---


def test_other_labels_turn_pairs_round_and_take_their_margins(base):
    chat = Chat(load_tokenizer(base))
    pairs = [a_pair(0, "a", "b", margin=2.0), a_pair(1, "c", "d"), a_pair(0, "a", "e", label=0.75)]
    grouped = group_pairs(pairs, chat, max_tokens=100, on_too_long="drop", counts={})
    assert [pair.chosen for pair in grouped.pairs()] == ["a", "a", "c"]
    other = grouped.relabelled(np.array([0.25, 0.5, 1.0]))
    first, second = other.batch().compared
    replies = [[chat.tokenizer.decode(b.ids[:-1]) for b in tree.branches] for tree in other.trees]
    told = [
        (texts[c.chosen], texts[c.rejected], c.margin, c.label)
        for texts, compared in zip(replies, (first, second), strict=True)
        for c in compared
    ]
    assert told == [("b", "a", 0.0, 0.75), ("a", "e", 0.0, 0.5), ("c", "d", 0.0, 1.0)]
    assert grouped.pairs() == other.pairs()
    assert grouped.batch().compared[0][0].margin == 2.0  # the first set is as it was


def test_the_first_loss_is_cross_entropy_with_the_teachers_margins(tmp_path, base, pairs, reward_run):
    """With the scores that the file keeps, which are those of the teacher."""
    teacher = [{"name": "model", "path": str(reward_run / "model"), "weight": 30.0}]
    out = run_stage("reward", tmp_path / "run", **settings(base, pairs, teacher, teacher_temperature=0.5))
    records = load(PreferencePair, pairs).records
    scorer = RewardModel(path=str(reward_run / "model")).load(token_budget=4096)
    expected = torch.stack([scorer.score_texts(texts_of(records, side)) for side in ("chosen", "rejected")]) * 30
    kept = [row for row in rows(out, TEACHER_FILE) if row["set"] == "train"]
    by_text = {(row["prompt"]["messages"][0]["content"], row["rejected"]): row for row in kept}
    student, tokenizer = load_scalar(base, head_seed=seeds.derive(0, "reward head")), load_tokenizer(base)
    losses = []
    for pair, (chosen, rejected) in zip(records, expected.T.tolist(), strict=True):
        row = by_text[pair.prompt.text, pair.rejected]
        assert (row["teacher_chosen"], row["teacher_rejected"]) == pytest.approx((chosen, rejected), abs=1e-4)
        q = 1 / (1 + math.exp(-(chosen - rejected) / 0.5))
        a, b = (score(student, tokenizer, pair.prompt.text, text) for text in (pair.chosen, pair.rejected))
        losses.append(q * math.log1p(math.exp(b - a)) + (1 - q) * math.log1p(math.exp(a - b)) + 0.01 * (a + b) ** 2)
    assert rows(out)[0]["loss/train"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert summary(out)["counts"]["margins_not_learned_from"] == sum(pair.margin is not None for pair in records)


# --- what the student keeps ---


def test_a_student_learns_what_its_teacher_says_and_not_the_labels(tmp_path, base, pairs):
    """The teacher likes long replies, and those are the rejected ones here."""
    many = {"num_epochs": 40.0, "batch_size": 10, "teacher_temperature": 0.1}
    out = run_stage("reward", tmp_path / "run", **settings(base, pairs, [judge("length")], **many))
    card = card_in(out)
    assert card["teacher"]["agreement"] == 1.0
    assert card["teacher"]["accuracy"] == card["accuracy"] == 0.0
    assert card["teacher"]["num_tied"] == 0
    assert -1 <= card["teacher"]["margin_spearman"] <= 1
    assert rows(out)[-1]["reward/validation_accuracy"] == 1.0  # held out, by the teacher's labels
    said = trimtab("card", out / "model", pairs).output
    assert "as its teacher does" not in said  # a command that knows of no teacher


def test_a_corrected_ensemble_teaches_one_model(tmp_path, base, other, pairs):
    big = run_stage(
        "reward",
        tmp_path / "big",
        model=str(other),
        data=str(pairs),
        held_out_data=str(pairs),
        members=2,
        optimizer=FAST,
    )
    teacher = [{"name": "model", "path": str(big / "model"), "aggregate": "min", "length_correction": "lowess"}]
    out = run_stage("reward", tmp_path / "small", **settings(base, pairs, teacher))
    assert not (out / "model" / "members").exists()
    assert card_in(out)["teacher"]["names"] == [str(big / "model")]
    recorded = json.loads((out / "models.json").read_text())
    assert str(big / "model") in recorded


def test_a_run_that_goes_on_does_not_ask_its_teacher_again(tmp_path, base, pairs):
    def values(num_steps):
        return settings(base, pairs, [judge("noisy")], batch_size=5, max_steps=num_steps, checkpoint_every=1)

    out = run_stage("reward", tmp_path / "run", **values(1))
    kept = (out / TEACHER_FILE).read_text()
    whole = run_stage("reward", tmp_path / "whole", **values(3))
    assert (whole / TEACHER_FILE).read_text() == kept  # also a teacher that draws is the same each time
    run_stage("reward", out, **values(3))
    assert (out / TEACHER_FILE).read_text() == kept
    assert [r["loss/train"] for r in rows(out)] == [r["loss/train"] for r in rows(whole)]


def test_labels_of_a_teacher_that_has_changed_are_not_learned_from(tmp_path, base, pairs, reward_run, monkeypatch):
    """Stopped before its first checkpoint, the run has its labels and nothing else."""
    teacher = tmp_path / "teacher"
    shutil.copytree(reward_run / "model", teacher)
    values = settings(base, pairs, [{"name": "model", "path": str(teacher)}])
    with monkeypatch.context() as patched:
        patched.setattr(reward, "start_members", lambda *_: sys.exit("stopped"))
        trimtab("reward", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert (tmp_path / "run" / TEACHER_FILE).exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    model = load_scalar(teacher)
    with torch.no_grad():
        model.score.weight.neg_()
    save_model(model, load_tokenizer(teacher), teacher)
    assert f"teacher {teacher} is not the data this run began with" in refused(tmp_path, **values)
    out = run_stage("reward", tmp_path / "anew", **values)
    kept, anew = (rows(d, TEACHER_FILE)[0]["teacher_chosen"] for d in (tmp_path / "run", out))
    assert kept != anew


def test_pairs_that_a_teacher_ties_are_counted_and_said_if_they_are_most(tmp_path, base, pairs):
    """A pattern that few replies match ties all other pairs."""
    for pattern, num_tied in (("#### 1.*", None), ("####.*", 0)):
        teacher = [{"name": "regex", "pattern": pattern, "match": "search"}]
        values = settings(base, pairs, teacher, max_steps=1, teacher_temperature=0.5)
        told = trimtab("reward", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / pattern[5:6])
        assert told.exit_code == 0, told.output
        found = summary(tmp_path / pattern[5:6])["counts"].get("pairs_tied_by_teacher", 0)
        own = [json.loads(line)["chosen"] for line in pairs.read_text().splitlines()]
        expected = sum(not text.startswith("#### 1") for text in own) if num_tied is None else num_tied
        assert found == expected
        assert (f"both replies of {found} of 20 pairs the same score" in told.stderr) == (2 * found > 20)


def test_rewards_of_a_teacher_on_scales_far_apart_are_named(tmp_path, base, pairs):
    teacher = [judge("length"), judge("length") | {"weight": 1e-3}]
    run_file = write_run_file(tmp_path / "run.toml", settings(base, pairs, teacher, max_steps=1))
    told = trimtab("reward", run_file, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert told.stderr.count("of the teacher, with its weight, the reward callable varies 1e+03 times as much") == 1


def test_agreement_as_worked_by_hand():
    own = SimpleNamespace(teacher=(RewardModel(path="big"),), teacher_temperature=2.0)
    pairs = [a_pair(i, "a", "b", label=1.0 if i < 4 else 0.5) for i in range(5)]
    teacher = np.array([[1.0, 2.0, 0.0, 3.0, 1.0], [0.0, 3.0, 0.0, 1.0, 0.0]])  # margins 1, -1, 0, 2, 1
    student = np.array([[0.5, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 3.0]])  # alike, alike, -, tied, not alike
    found = agreement_with_teacher(own, pairs, student, teacher)
    assert found["agreement"] == pytest.approx(2.5 / 4)
    assert found["num_tied"] == 1
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert (found["names"], found["temperature"]) == (["big"], 2.0)


# --- refusals ---


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "plackett_luce"}, "teacher with the loss PlackettLuce: a teacher labels pairs"),
        ({"loss": "regression"}, "teacher with the loss RegressionLoss: a teacher labels pairs"),
        ({"loss": {"name": "bradley_terry", "label_smoothing": 0.1}}, "whose labels are soft already"),
        ({"teacher": [], "teacher_temperature": 2.0}, "teacher_temperature = 2 without a teacher"),
        ({"teacher_temperature": 0.0}, "it must be at least 0.001"),
    ],
)
def test_settings_that_contradict_a_teacher_are_refused(tmp_path, base, pairs, changed, said):
    values = settings(base, pairs, [judge("length")]) | changed
    assert said in refused(tmp_path, **values)
    assert not (tmp_path / "run").exists()


def test_a_model_is_not_its_own_teacher_unless_it_is_corrected_or_joined(tmp_path, reward_run, pairs):
    own = {"name": "model", "path": str(reward_run / "model")}
    assert "a model learns nothing from its own scores" in refused(
        tmp_path, **settings(reward_run / "model", pairs, [own])
    )
    out = run_stage("reward", tmp_path / "joined", **settings(reward_run / "model", pairs, [own, judge("length")]))
    assert card_in(out)["teacher"]["names"] == [str(reward_run / "model"), "callable"]


def test_a_teacher_with_several_outputs_or_none_is_refused_before_the_run(tmp_path, base, other, pairs, reward_run):
    config = AutoConfig.from_pretrained(reward_run / "model", num_labels=3)
    save_model(AutoModelForSequenceClassification.from_config(config), load_tokenizer(base), tmp_path / "three")
    for path, said in (
        (tmp_path / "three", "a classifier with 3 labels"),
        (tmp_path / "nowhere", "there is no directory"),
        (other, "teacher.0.path is to be a reward model"),  # a policy
    ):
        assert said in refused(tmp_path, **settings(base, pairs, [{"name": "model", "path": str(path)}]))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ([judge("flat")], "the teacher gives both replies of each of 20 pairs the same score"),
        ([judge("length") | {"weight": 0.0}], "the teacher gives both replies of each of 20 pairs the same score"),
        ([judge("speechless")], "the teacher gives 80 of 80 replies no score"),
        ([{"name": "exact_answer"}], "20 of 20 prompts have no fact 'answer' that teacher.0 compares with"),
    ],
)
def test_a_teacher_that_says_nothing_trains_nothing(tmp_path, base, pairs, teacher, said):
    assert said in refused(tmp_path, **settings(base, pairs, teacher))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_kept_scores_of_other_pairs_are_refused(tmp_path, base):
    chat = Chat(load_tokenizer(base))
    grouped = group_pairs([a_pair(0, "a", "b")], chat, max_tokens=100, on_too_long="drop", counts={})
    run = SimpleNamespace(directory=tmp_path)
    for text, said in (
        (
            '{"set": "train", "chosen": "a", "rejected": "c", "teacher_chosen": 1, "teacher_rejected": 0}\n',
            "of other pairs",
        ),
        ('{"set": "train", "chosen": "a"', "is damaged"),
        ('{"set": "train", "chosen": "a"}\n', "is damaged"),
    ):
        (tmp_path / TEACHER_FILE).write_text(text)
        with pytest.raises(DataError, match=said) as error:
            teach(SimpleNamespace(teacher=()), run, chat, grouped, grouped, {})
        assert "remove it" in error.value.fix
