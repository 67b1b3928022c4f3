"""What a run makes of the cards of its reward models."""

import hashlib
import json
import shutil

import pytest

from tests.stages.commands import rows, run_stage, trimtab, write_run_file
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.reports.card_sentences import cautions
from trimtab.runs.models import model_digest
from trimtab.stages.online import cards

SMALL = {
    "prompts": "world:arithmetic?num=8",
    "prompts_per_step": 2,
    "group_size": 2,
    "num_minibatches": 1,
    "num_steps": 1,
    "sampling": {"max_new_tokens": 8},
}


def settings_of(base, model):
    return SMALL | {"model": str(base), "rewards": [{"name": "model", "path": str(model)}]}


def changed(directory, **values):
    card = json.loads((directory / "reward_card.json").read_text()) | values
    (directory / "reward_card.json").write_text(json.dumps(card))
    return hashlib.sha256((directory / "reward_card.json").read_bytes()).hexdigest()


@pytest.fixture
def reward(tmp_path, reward_run):
    """A copy of a finished run of the reward stage."""
    return shutil.copytree(reward_run, tmp_path / "reward")


def test_a_run_keeps_the_hash_of_the_card_beside_its_reward_model(tmp_path, base, reward):
    sha256 = changed(reward, accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95, resembles=None)
    out = run_stage("online", tmp_path / "run", **settings_of(base, reward / "model"))
    assert json.loads((out / "environment.json").read_text())["reward_cards"] == {"rewards.0": sha256}
    assert all(0 <= row["reward/beyond_card_fraction"] <= 1 for row in rows(out))


def test_a_card_in_the_directory_of_its_model_is_found_and_changes_no_model(tmp_path, base, reward):
    before = model_digest(reward / "model")
    (reward / "reward_card.json").rename(reward / "model" / "reward_card.json")
    sha256 = changed(reward / "model", accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95, resembles=None)
    assert model_digest(reward / "model") == before
    out = run_stage("online", tmp_path / "run", **settings_of(base, reward / "model"))
    assert json.loads((out / "environment.json").read_text())["reward_cards"] == {"rewards.0": sha256}


def test_a_card_that_speaks_against_its_model_is_heard(tmp_path, base, reward):
    changed(reward, accuracy=0.52, accuracy_low=0.41, accuracy_high=0.63, resembles="constant", by_length=[])
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, reward / "model"))
    told = trimtab("online", run_file, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert "the card of rewards.0 says: The reward model orders 52% [41%, 63%] of held-out pairs" in told.stderr
    assert "this is a constant, not a judge" in told.stderr
    assert not any("reward/beyond_card_fraction" in row for row in rows(tmp_path / "run"))


def test_a_card_of_another_model_is_none(tmp_path, base, reward):
    changed(reward, model_sha256="0" * 64)
    out = run_stage("online", tmp_path / "run", **settings_of(base, reward / "model"))
    assert "reward_cards" not in json.loads((out / "environment.json").read_text())


def test_a_resumed_run_adds_the_card_that_was_made_anew(tmp_path, base, reward):
    first = changed(reward, by_length=[])
    run_file = write_run_file(tmp_path / "run.toml", settings_of(base, reward / "model"))
    assert trimtab("online", run_file, "--out", tmp_path / "run").exit_code == 0
    second = changed(reward, auc=0.5)
    for _ in range(2):
        assert trimtab("online", run_file, "--out", tmp_path / "run", "num_steps=2").exit_code == 0
    noted = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert noted["reward_cards"] == {"rewards.0": first}
    assert noted["resumed_with"].count({"reward_cards": {"rewards.0": second}}) == 1


def reply(num_words):
    prompt = Prompt(messages=(Message("user", "?"),))
    text = "word " * num_words
    return Rollout(
        prompt=prompt, response=text, prompt_ids=(1,), response_ids=(2,), logprobs=(0.0,), finish_reason="stop"
    )


def test_replies_longer_than_any_on_the_card_are_counted_and_said_once(monkeypatch, capsys):
    card = cards.CarriedCard("rewards.0", "f" * 64, {"by_length": [{"high": 4.0}, {"high": 9.0}]})
    wider = cards.CarriedCard("rewards.1", "e" * 64, {"by_length": [{"high": 30.0}, {"high": None}]})
    noted = []
    monkeypatch.setattr(cards, "find_cards", lambda settings: [card, wider])
    run = type("Run", (), {"note_cards": lambda self, hashes: noted.append(hashes)})()
    watch = cards.CardWatch(None, run)
    assert noted == [{"rewards.0": "f" * 64, "rewards.1": "e" * 64}]
    assert watch(0, [reply(9), reply(9), reply(10), reply(8)])["reward/beyond_card_fraction"].value == 0.25
    assert capsys.readouterr().err == ""
    assert watch(1, [reply(12), reply(10), reply(2)])["reward/beyond_card_fraction"].value == pytest.approx(2 / 3)
    assert watch(2, [reply(12)])["reward/beyond_card_fraction"].value == 1
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "67% of the replies of step 2 have more than 9 words" in said


@pytest.mark.parametrize(("low", "heard"), [(0.51, False), (0.5, True), (float("nan"), True)])
def test_an_accuracy_that_may_be_chance_is_a_caution(low, heard):
    found = cautions({"accuracy": 0.6, "accuracy_low": low, "accuracy_high": 0.7})
    assert bool(found) == heard


def test_a_card_without_figures_cautions_of_nothing():
    assert cautions({}) == []
