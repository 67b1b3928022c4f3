"""A reward model corrected for length: its scores less its curve, whatever the score is asked by."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.rewards.test_model import PROMPT, rollout
from tests.tiny import write_model_directory
from trimtab.core.errors import ConfigError, EngineError
from trimtab.evals.length_curves import METHODS, fit_curve
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.ensemble import EnsembleScorer
from trimtab.rewards.length_correction import (
    LENGTH_FILE,
    LengthCorrection,
    corrections_in,
    fitted,
    read_correction,
    write_correction,
)
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import lengths_of

TEXTS = [(PROMPT, "We can refund it." * num) for num in range(1, 7)]


@pytest.fixture
def path(tmp_path):
    """A reward model of another program."""
    policy = write_model_directory(tmp_path / "policy")
    model = load_scalar(policy, head_seed=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(model, load_tokenizer(policy), tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture
def corrected(path):
    """A reward model with curves that are fitted to twenty-four replies of its own."""
    scorer = RewardModel(path=str(path)).load(token_budget=4096)
    sequences = scorer.ids_of_texts(TEXTS * 4)
    scores = scorer.member_scores(sequences).double().numpy()
    write_correction(fitted(scores, np.array(lengths_of(sequences), dtype=float), data=["by hand"]), path)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_the_models_less_the_curve(corrected, method):
    plain = RewardModel(path=str(corrected)).load(token_budget=4096)
    scorer = RewardModel(path=str(corrected), length_correction=method).load(token_budget=4096)
    [curve] = corrections_in(corrected)[method].curves
    lengths = lengths_of(plain.ids_of_texts(TEXTS))
    expected = plain.score_texts(TEXTS) - torch.tensor(curve.at(lengths)).float()
    torch.testing.assert_close(scorer.score_texts(TEXTS), expected)
    assert len(set(lengths)) == len(TEXTS)
    assert float(expected.mean()) == pytest.approx(float(plain.score_texts(TEXTS).mean()), abs=1e-4)


def test_a_rollout_is_corrected_by_its_own_length_and_the_metrics_say_how_much(corrected):
    scorer = RewardModel(path=str(corrected), length_correction="regression").load(token_budget=4096, name="model_2")
    plain = RewardModel(path=str(corrected)).load(token_budget=4096)
    long = rollout(scorer.chat, "We can refund it." * 40, reason="length", own=True)
    replies = [rollout(scorer.chat, "We can refund it.", reason="stop", own=True), long]
    scores, metrics = scorer.score(replies)
    without, none = plain.score(replies)
    [curve] = corrections_in(corrected)["regression"].curves
    taken = curve.at(lengths_of(scorer.ids_of(replies)))
    torch.testing.assert_close(scores, without - torch.tensor(taken).float())
    assert none == {}
    assert metrics["reward/model_2_for_length"].value == pytest.approx(taken.mean(), abs=1e-5)
    assert metrics["reward/model_2_beyond_lengths"].value == 0.5


def test_each_member_of_an_ensemble_is_corrected_by_its_own_curve(path):
    """The correction of the mean is the mean of the corrections; the minimum is that of corrected members."""
    one = RewardModel(path=str(path)).load(token_budget=4096)
    options = {"token_budget": 4096, "means": [0.0, 1.0], "scales": [1.0, -2.0], "shift": 0.25}
    plain = EnsembleScorer([one.model, one.model], one.chat, **options)
    sequences = plain.ids_of_texts(TEXTS)
    scores, lengths = plain.member_scores(sequences), np.array(lengths_of(sequences), dtype=float)
    correction = LengthCorrection(tuple(fit_curve(row, lengths, "lowess") for row in scores.double().numpy()))
    for how, of_members in (("mean", lambda x: x.mean(0)), ("min", lambda x: x.amin(0))):
        scorer = EnsembleScorer([one.model, one.model], one.chat, **options, how=(how, None))
        scorer.length_correction = correction
        expected = of_members(scores - correction.of(lengths.astype(int).tolist())) - 0.25
        torch.testing.assert_close(scorer.score_texts(TEXTS), expected)
    whole = torch.tensor(correction.of_mean(lengths)).float()
    torch.testing.assert_close(scores.mean(0) - whole, (scores - correction.of(lengths.tolist())).mean(0))


def test_two_rewards_of_one_model_are_corrected_each_as_its_settings_say(corrected):
    rewards = [
        RewardModel(path=str(corrected)),
        RewardModel(path=str(corrected), length_correction="lowess", weight=-1),
    ]
    combined = load_rewards(rewards, token_budget=4096)
    replies = [rollout(combined.parts[0].reward.chat, text, reason="stop", own=True) for _, text in TEXTS]
    total, by_name, metrics = combined.score_parts(replies)
    assert {"reward/model_2_for_length", "reward/model_2_beyond_lengths"} <= metrics.keys()
    assert "reward/model_for_length" not in metrics
    torch.testing.assert_close(total, by_name["model"] - by_name["model_2"])
    assert float(total.abs().max()) > 1e-3


def test_without_a_curve_the_refusal_says_how_to_get_one(path):
    assert corrections_in(path) == {}
    with pytest.raises(ConfigError, match=r"length_correction = 'lowess', and no curve was fitted") as refused:
        RewardModel(path=str(path), length_correction="lowess").load(token_budget=4096)
    assert f"trimtab debias {path} REPLIES" in refused.value.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lowess": []}, "holds 0 curves under 'lowess' for 1 model"),
        ({"lowess": None}, "holds 0 curves under 'lowess' for 1 model"),
        ({"lowess": [{"lengths": [3, 2], "rewards": [0, 0], "slope": 0}]}, "or not in order"),
        ({"lowess": [{"lengths": [2, 3], "rewards": [0], "slope": 0}]}, "2 lengths with 1 rewards"),
        ({"lowess": [{"lengths": [2, 3], "rewards": [0, None], "slope": 0}]}, "holds no curve under 'lowess'"),
        ({"lowess": [{"lengths": [2, 3], "rewards": [0, 1]}]}, "holds no curve under 'lowess'"),
        ({"lowess": [{"lengths": [2], "rewards": [0], "slope": 0}] * 2}, "holds 2 curves under 'lowess' for 1 model"),
    ],
)
def test_a_damaged_file_is_named(corrected, change, said):
    file = corrected / LENGTH_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(EngineError, match=said) as refused:
        read_correction(corrected, "lowess")
    assert refused.value.where == str(file)
