"""Ensembles of reward models: trained by one command, loaded like one model, scored in one pass over a shared base."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.stages.commands import (
    FAST,
    PROMPTS,
    SHORT,
    online_settings,
    rows,
    run_stage,
    summary,
    trimtab,
    without_times,
    write_run_file,
)
from trimtab.batches.trees import response_tree
from trimtab.core.errors import EngineError
from trimtab.core.types import PreferencePair
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.data.tokens import Lazy
from trimtab.math.ensembles import aggregate
from trimtab.models.adapters import LoRA
from trimtab.models.average import weights_of
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.rewards.ensemble import EnsembleScorer
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import RewardModelScorer
from trimtab.runs.models import model_digest
from trimtab.stages.reward import RewardSettings
from trimtab.stages.reward_members import Examples, agreement_of, common_scale, start_members


def settings(base, pairs, **changed):
    return {"model": str(base), "data": str(pairs), "held_out": 0.3, "batch_size": 10, "optimizer": FAST} | changed


ADAPTER = {"adapter": {"rank": 2}, "optimizer": {"learning_rate": 0.01}}
KINDS = {"whole": {}, "adapters": ADAPTER}


@pytest.fixture(scope="module", params=list(KINDS))
def ensemble(request, tmp_path_factory, base, pairs):
    """A run with three members, as models of their own and as adapters."""
    out = tmp_path_factory.mktemp("ensemble") / request.param
    return run_stage("reward", out, **settings(base, pairs, members=3, **KINDS[request.param]))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base, pairs):
    out = tmp_path_factory.mktemp("ensemble") / "adapters"
    return run_stage("reward", out, **settings(base, pairs, members=3, **ADAPTER))


def places(run):
    return [run / "model", *(run / "model" / "members" / str(number) for number in (1, 2))]


def weights_file(directory):
    return next(directory.glob("*model.safetensors"))


def test_the_first_member_is_the_model_that_a_run_of_one_gives(ensemble, base, pairs, tmp_path):
    alone = run_stage("reward", tmp_path / "one", **settings(base, pairs, **KINDS[ensemble.name]))
    first, one = load_file(weights_file(ensemble / "model")), load_file(weights_file(alone / "model"))
    assert first.keys() == one.keys()
    assert all(torch.equal(first[name], one[name]) for name in one)


SOME = [response_tree([1], [[2], [3]])] * 1000


def test_members_differ_in_head_weights_and_order(ensemble):
    found = [load_file(weights_file(place)) for place in places(ensemble)]
    head = next(name for name in found[0] if name.endswith("score.weight"))
    assert len({str(weights[head].tolist()) for weights in found}) == 3
    orders = [Examples(RewardSettings(model="", data="", members=3), m, SOME[:20]).of_step(0) for m in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_a_bootstrap_draws_with_replacement_and_the_same_prompts_each_time():
    own = RewardSettings(model="", data="", members=3, bootstrap=True, num_epochs=2.0, batch_size=1000)
    drawn = Examples(own, 1, SOME)
    first, second = drawn.of_step(0), drawn.of_step(1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(first)) == pytest.approx(1000 * (1 - np.exp(-1)), abs=40)
    assert sorted(first) != sorted(Examples(own, 2, SOME).of_step(0))


@pytest.mark.parametrize(("members", "bootstrap"), [(1, False), (3, True)])
def test_examples_are_not_made_before_they_are_asked_for(members, bootstrap):
    made = []
    lazy = Lazy(20, lambda i: made.append(i) or SOME[i])
    own = RewardSettings(model="", data="", members=members, bootstrap=bootstrap, batch_size=4)
    for member in range(members):
        assert all(0 <= i < 20 for i in Examples(own, member, lazy).of_step(2))
    assert not made


def started(model, **changed):
    """The members with which a run of the stage begins, as adapters."""
    own = RewardSettings(model=str(model), data="", members=3, adapter=LoRA(rank=2), **changed)
    return start_members(own, Chat(load_tokenizer(model)))[0]


def test_adapters_on_a_trained_reward_model_begin_with_its_head(reward_run, adapters, base):
    trained = load_scalar(reward_run / "model").score.weight
    heads = [member.head.weight for member in started(reward_run / "model")]
    assert all(torch.equal(head, trained) for head in heads)
    assert len({head.data_ptr() for head in heads}) == 3  # each learns its own
    assert len({str(member.head.weight.tolist()) for member in started(base)}) == 3
    # an adapter of a reward model brings its head itself
    alone = adapters / "model" / "members" / "1"
    first, *others = (member.head.weight for member in started(alone))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(first, load_scalar(alone).score.weight)


@pytest.mark.parametrize("members", [1, 2])
def test_a_seed_of_a_head_that_is_not_drawn_is_refused(reward_run, adapters, pairs, tmp_path, members):
    for model in (reward_run / "model", adapters / "model" / "members" / "1"):
        run = write_run_file(tmp_path / "run.toml", settings(model, pairs, members=members, head_seed=0))
        done = trimtab("reward", run, "--out", tmp_path / "run")
        assert done.exit_code == 2
        assert "is a reward model, with whose head the training begins" in done.output


@pytest.mark.parametrize("members", [1, 2])
def test_adapters_on_an_encoder_are_refused(encoder, pairs, tmp_path, members):
    run = write_run_file(tmp_path / "run.toml", settings(encoder, pairs, members=members, adapter={"rank": 2}))
    done = trimtab("reward", run, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "the head of a BertForSequenceClassification is more than one layer on a token" in done.output


def test_a_member_with_one_score_for_all_replies_is_refused_by_name():
    scores = np.random.default_rng(0).normal(size=(3, 40))
    scores[1] = 0.3 + 1e-8 * scores[0]  # equal but for rounding
    with pytest.raises(EngineError, match=r"member 1 of 3 gives each of 40 held-out replies the score 0.3") as refused:
        common_scale(scores, [0.0, 0.0, 0.0])
    assert refused.value.where == "reward_1"


def test_the_common_scale_as_worked_by_hand():
    # Deviations 1 and 3, so 2 on average: factors 2 and 2 / 3; zeros at 1 and 0 are 2 (1 - 0) and 2/3 (0 - 3) there.
    found = common_scale(np.array([[-1.0, 1.0], [0.0, 6.0]]), [1.0, 0.0])
    assert (found["means"], found["scales"]) == ([0.0, 3.0], pytest.approx([2.0, 2 / 3]))
    assert found["shift"] == pytest.approx((2 - 2) / 2)


def test_each_member_is_an_ordinary_reward_model(ensemble, pairs):
    records = load(PreferencePair, pairs).records
    texts = [(pair.prompt, pair.chosen) for pair in records]
    whole = RewardModel(path=str(ensemble / "model")).load(token_budget=4096)
    assert isinstance(whole, EnsembleScorer)
    raw = []
    for place in places(ensemble):
        copy = shutil.copytree(place, ensemble / "alone", dirs_exist_ok=True, ignore=shutil.ignore_patterns("ensem*"))
        scorer = RewardModelScorer.from_directory(str(copy), token_budget=4096)
        raw.append(scorer.score_texts(texts) + scorer.shift)
        shutil.rmtree(copy)
    facts = json.loads((ensemble / "model" / "ensemble.json").read_text())
    means, scales = (torch.tensor(facts[name])[:, None] for name in ("means", "scales"))
    scaled = (torch.stack(raw) - means) * scales
    torch.testing.assert_close(whole.score_texts(texts), scaled.mean(0) - facts["shift"], rtol=1e-4, atol=1e-5)
    for how, coef in (("min", None), ("variance", 0.3), ("lower_bound", 2.0), ("soft_min", 0.7)):
        scorer = RewardModel(path=str(ensemble / "model"), aggregate=how, aggregate_coef=coef).load(token_budget=4096)
        expected = aggregate(scaled, how, coef) - facts["shift"]
        torch.testing.assert_close(scorer.score_texts(texts), expected, rtol=1e-4, atol=1e-5)


def test_members_are_on_one_scale_over_the_held_out_replies(ensemble, pairs, tmp_path, base):
    """Mean 0 and one deviation, and the mean of the chosen replies of training at 0, on the scale of the members."""
    facts = json.loads((ensemble / "model" / "ensemble.json").read_text())
    out = run_stage(
        "reward", tmp_path / "run", **settings(base, pairs, members=3, held_out_data=str(pairs), **KINDS[ensemble.name])
    )
    scorer = RewardModel(path=str(out / "model")).load(token_budget=4096)
    records = load(PreferencePair, pairs).records
    ids = [
        (tuple(scorer.chat.encode_prompt(p.prompt.messages)), tuple(scorer.chat.encode_response(text)))
        for p in records
        for text in (p.chosen, p.rejected)
    ]
    found = scorer.member_scores(ids).double()
    torch.testing.assert_close(found.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-4)
    deviations = found.std(1, correction=0)
    torch.testing.assert_close(deviations, deviations[:1].expand(3), rtol=1e-4, atol=1e-5)
    assert float(scorer.score_texts([(p.prompt, p.chosen) for p in records]).mean()) == pytest.approx(0, abs=1e-4)
    assert len(facts["means"]) == len(facts["scales"]) == 3


def test_the_card_says_how_alike_the_members_are(ensemble):
    card = summary(ensemble)
    together = card["ensemble"]
    assert len(together["accuracies"]) == 3
    assert {"error_correlation", "disagreement", "disagreement_spearman"} <= together.keys()
    assert together["disagreement"] > 0
    assert card["accuracy_low"] <= card["accuracy"] <= card["accuracy_high"]
    assert {"optimizer/reward_gradient_norm", "optimizer/reward_2_gradient_norm"} <= rows(ensemble)[0].keys()


def test_equal_members_have_correlation_one_and_independent_ones_none():
    draw = np.random.default_rng(0)
    chosen = np.broadcast_to(draw.normal(0.5, 1, 4000), (3, 4000))
    rejected, labels = np.zeros((3, 4000)), np.ones(4000)
    alike = agreement_of(chosen, rejected, labels)
    assert alike["error_correlation"] == pytest.approx(1)
    assert alike["disagreement"] == pytest.approx(0)
    apart = agreement_of(draw.normal(0.5, 1, (3, 4000)), rejected, labels)
    assert apart["error_correlation"] == pytest.approx(0, abs=0.05)
    # Worked by hand: right, wrong, a tie, and a pair without a right side.
    hand = agreement_of(np.array([[1.0, -1.0, 0.0, 5.0]]), np.zeros((1, 4)), np.array([1.0, 1.0, 1.0, 0.5]))
    assert hand["accuracies"] == [0.5]
    assert hand["error_correlation"] is None
    even = agreement_of(np.ones((2, 3)), np.zeros((2, 3)), np.full(3, 0.5))
    assert np.isnan(even["accuracies"]).all()
    assert even["error_correlation"] is None


def test_a_killed_ensemble_goes_on_bit_for_bit(ensemble, base, pairs, tmp_path):
    run = settings(base, pairs, members=3, checkpoint_every=1, **KINDS[ensemble.name])
    run_stage("reward", tmp_path / "run", **run, max_steps=1)
    out = run_stage("reward", tmp_path / "run", **run)
    found, expected = (without_times(rows(directory)) for directory in (out, ensemble))
    # The shorter run ended with its first step, so it was validated there.
    found[0] = {name: value for name, value in found[0].items() if "validation" not in name}
    assert found == expected
    for place, other in zip(places(out), places(ensemble), strict=True):
        one, two = load_file(weights_file(place)), load_file(weights_file(other))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_in_two_processes_it_has_the_numbers_of_one(ensemble, base, pairs, tmp_path):
    run = settings(base, pairs, members=3, engine={"workers": 2}, **KINDS[ensemble.name])
    out = run_stage("reward", tmp_path / "run", **run)
    for mine, theirs in zip(without_times(rows(out)), without_times(rows(ensemble)), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_it_is_a_reward_of_online_training_and_its_disagreement_is_logged(ensemble, base, tmp_path):
    rewards = [{"name": "model", "path": str(ensemble / "model"), "aggregate": "min"}]
    out = run_stage("online", tmp_path / "run", **online_settings(base, ensemble / "model", rewards=rewards))
    assert all(row["reward/model_disagreement"] > 0 for row in rows(out))


def test_adapters_share_the_base_of_a_policy_that_is_one_too(adapters, base, tmp_path):
    changed = {"adapter": {"rank": 2}, "critic": {"init": "policy", "optimizer": FAST}}
    out = run_stage("online", tmp_path / "run", **online_settings(base, adapters / "model", **changed))
    assert all(row["reward/model_disagreement"] > 0 for row in rows(out))


def test_trimtab_score_and_select_read_it(ensemble, base, pairs, tmp_path):
    done = trimtab("score", "--model", ensemble / "model", "--data", pairs)
    assert done.exit_code == 0, done.output
    rewards = [{"name": "model", "path": str(ensemble / "model"), "aggregate": "variance"}]
    run_stage(
        "select", tmp_path / "run", model=str(base), prompts=PROMPTS, rewards=rewards, replies_per_prompt=2,
        sampling=SHORT, filter={"finished": False},
    )  # fmt: skip


def test_where_one_model_is_needed_an_ensemble_is_refused(ensemble, base, pairs, tmp_path):
    path = ensemble / "model"
    with pytest.raises(EngineError, match="an ensemble of reward models, and one model is needed"):
        RewardModelScorer.from_directory(str(path), token_budget=100)
    for command in (
        ("export", "--model", path, "--out", tmp_path / "out"),
        ("reward", write_run_file(tmp_path / "run.toml", settings(path, pairs)), "--out", tmp_path / "run"),
    ):
        done = trimtab(*command)
        assert done.exit_code == 2
        assert "this is an ensemble of reward models, and one model is needed here" in done.output


def test_the_average_of_an_ensemble_is_that_of_its_members(ensemble, base, pairs, tmp_path):
    done = trimtab("average", tmp_path / "mean", ensemble / "model", "--data", pairs)
    assert done.exit_code == 2
    assert "different score heads" in done.output
    run = settings(base, pairs, members=3, head_seed=0, **KINDS[ensemble.name])
    out = run_stage("reward", tmp_path / "run", **run)
    done = trimtab("average", tmp_path / "mean", out / "model", "--data", pairs, "--tolerance", 1)
    assert "the average of 3 models with the weights 0.333, 0.333, 0.333" in done.output
    members = [weights_of(load_scalar(place)) for place in places(out)]
    for name, weight in weights_of(load_scalar(tmp_path / "mean")).items():
        torch.testing.assert_close(weight, sum(member[name] for member in members) / 3, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "mean" / "ensemble.json").exists()


def test_aggregates_of_one_model_and_coefficients_of_none_are_refused(reward_run, base, tmp_path):
    for reward, said in (
        ({"aggregate": "min"}, "aggregate = 'min', and this is one reward model"),
        ({"aggregate_coef": 0.5}, "aggregate_coef = 0.5, and aggregate = 'mean' has none"),
    ):
        rewards = [{"name": "model", "path": str(reward_run / "model"), **reward}]
        run = online_settings(base, reward_run / "model", rewards=rewards)
        done = trimtab("online", write_run_file(tmp_path / "run.toml", run), "--out", tmp_path / "run")
        assert done.exit_code == 2
        assert said in done.output


def test_a_bootstrap_of_one_model_is_refused(base, pairs, tmp_path):
    run = write_run_file(tmp_path / "run.toml", settings(base, pairs, bootstrap=True))
    done = trimtab("reward", run, "--out", tmp_path / "run")
    assert "bootstrap = true is for the members of an ensemble, and members = 1" in done.output


def test_a_run_sees_that_a_member_has_changed(ensemble, tmp_path):
    copy = shutil.copytree(ensemble / "model", tmp_path / "copy")
    before = model_digest(copy)
    assert before == model_digest(ensemble / "model")
    file = weights_file(copy / "members" / "2")
    weights = load_file(file)
    weights[next(iter(weights))] += 1
    save_file(weights, file)
    assert model_digest(copy) != before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"means": [0.0, 0.0]}, "does not name members with a mean and a scale each"),
        ({"scales": None}, "does not name members with a mean and a scale each"),
        ({"members": []}, "does not name members with a mean and a scale each"),
        ({"shift": None}, "holds shift = None"),
        ({"shift": "0"}, "holds shift = '0'"),
        ({"means": [0.0, "a", 0.0]}, "holds means = "),
        ({"means": [0.0, float("nan"), 0.0]}, "holds means = "),
        ({"scales": [1.0, 0.0, 1.0]}, "holds scales = "),
    ],
)
def test_a_damaged_file_is_refused(adapters, tmp_path, changed, said):
    copy = shutil.copytree(adapters / "model", tmp_path / "copy")
    facts = json.loads((copy / "ensemble.json").read_text())
    (copy / "ensemble.json").write_text(json.dumps(facts | changed))
    with pytest.raises(EngineError, match=f"ensemble.json {said}") as refused:
        RewardModel(path=str(copy)).load(token_budget=100)
    assert refused.value.where == str(copy / "ensemble.json")


def test_transformers_reads_the_directory_as_the_first_member(tmp_path_factory, base, pairs):
    out = run_stage("reward", tmp_path_factory.mktemp("plain") / "run", **settings(base, pairs, members=2, max_steps=1))
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert torch.equal(model.score.weight, load_file(out / "model" / "model.safetensors")["score.weight"])
