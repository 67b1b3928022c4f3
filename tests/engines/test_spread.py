"""Engines spread over several processes are held to the local ones."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.engines.models_of_tests import CASES, start, with_ray
from tests.engines.test_device import batch, values_of
from tests.engines.test_launch import agents
from trimtab.core.metrics import Mean, Peak, Total
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat
from trimtab.engines import launchers
from trimtab.engines.episodes import EpisodeLimits, EpisodeSampler
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.engines.messages import decode, encode
from trimtab.engines.replica import checksums
from trimtab.engines.spread import deal
from trimtab.math.losses.policy import PPO, EntropyBonus, KLPenalty
from trimtab.math.losses.sft import SFTLoss
from trimtab.math.losses.value import ValueLoss
from trimtab.models.load import load_tokenizer

OPTIMIZER = AdamW(learning_rate=1e-3, max_gradient_norm=0.05, weight_decay=0.1)
HOW = {"token_budget": 64, "num_updates": 4}
LOSSES = {
    "critic": [ValueLoss()],
    "value head": [PPO(), ValueLoss()],
    "adapter": [PPO(), KLPenalty(coef=0.1, estimator="k3")],
}
LEARNED = [name for name in CASES if name not in ("few trees", "resumed", "reference", "nan")]
PROMPTS = [Prompt(messages=(Message("user", text * n),)) for text in tiny.TEXTS[:3] for n in (1, 3)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_model_directory(tmp_path_factory.mktemp("spread") / "model")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, False, ""), id="2", marks=pytest.mark.slow),
        pytest.param((3, False, ""), id="3"),
        pytest.param((2, True, ""), id="2 shards", marks=pytest.mark.slow),
        pytest.param((3, True, ""), id="3 shards"),
        pytest.param((3, False, "agents"), id="3 by agents", marks=pytest.mark.slow),
        pytest.param((2, False, "ray"), id="2 by ray", marks=[pytest.mark.slow, with_ray]),
        pytest.param((2, True, "ray"), id="2 shards by ray", marks=[pytest.mark.slow, with_ray]),
    ],
)
def spread(request, directory):
    workers, shard, launcher = request.param
    with ExitStack() as stack:
        if launcher == "agents":
            by_agents, _ = stack.enter_context(agents(workers - 1))
            launchers.join(by_agents, workers, "a test")
            stack.callback(launchers.leave)
        cluster = {"ray": "local"} if launcher == "ray" else {}
        engines, models = start(directory, workers, shard=shard, **cluster)
        with engines:
            yield engines, models


@pytest.mark.parametrize("name", LEARNED)
def test_updates_are_those_of_one_process(spread, name):
    engines, models = spread
    if engines.settings.shard and name == "adapter":
        pytest.skip("the base of an adapter is not sharded; what would lift this is a root for each of its blocks")
    losses = LOSSES.get(name, [PPO(), EntropyBonus(coef=0.01)])
    checkpointed = name == "checkpointed"
    ours = engines.learner(models[name], OPTIMIZER, name=name, checkpoint_activations=checkpointed, **HOW)
    theirs = LocalLearner(CASES[name](), OPTIMIZER, name=name, **HOW)
    for seed in range(4):
        mine, other = (values_of(made.update([(batch(seed), losses)])) for made in (ours, theirs))
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-7)
        norm = f"optimizer/{name}_gradient_norm"
        assert mine[norm] == pytest.approx(other[norm], rel=1e-6)
        for n, weight in ours.local.parameters.items() if not engines.settings.shard else ():
            expected = theirs.parameters[n]
            assert (weight.grad is None) == (expected.grad is None)
            if weight.grad is not None:
                scale = float(expected.grad.abs().max())
                torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-5, atol=1e-5 * scale)
        with ours.whole():
            for weight, expected in zip(models[name].parameters(), theirs.role.parameters(), strict=True):
                torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
            others = [sums[name] for sums in every_checksum(engines)]
            own = checksums({name: models[name]})[name]
            assert others == [own] * (engines.group.size - 1)  # to the bit: all processes made the same updates
    if engines.settings.shard:
        shares = [p.to_local().numel() for p in ours.local.parameters.values()]
        assert sum(shares) < 0.6 * sum(p.numel() for p in theirs.parameters.values())
        assert all(p.numel() == 0 for p in models[name].parameters())  # no memory of its own between uses


def every_checksum(engines):
    engines.group.call("checksums", [{}] * (engines.group.size - 1))
    return engines.group.answers("checksums")


def test_fewer_trees_than_processes_and_two_batches_with_losses_of_their_own(spread):
    engines, models = spread
    one, rest = batch(0).select([2]), batch(1).select([0, 4])
    work = [(one, [PPO()]), (rest, [SFTLoss(coef=0.5)])]
    ours = engines.learner(models["few trees"], OPTIMIZER, name="few trees", **HOW)
    theirs = LocalLearner(CASES["few trees"](), OPTIMIZER, name="few trees", **HOW)
    mine, other = (values_of(made.update(work)) for made in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_scores_are_those_of_one_process_to_the_bit(spread):
    engines, models = spread
    trees = batch().trees
    reference = engines.scorer(models["reference"], name="reference", token_budget=64)
    alone = LocalScorer(models["reference"], token_budget=64)
    expected = LocalScorer(models["nan"], token_budget=64).kl_to(alone, trees)
    policy = engines.learner(models["nan"], OPTIMIZER, name="nan", **HOW)
    assert torch.equal(reference.logprobs(trees), alone.logprobs(trees))
    assert torch.equal(policy.kl_to(reference, trees), expected)


def test_a_learner_is_saved_and_goes_on_in_any_number_of_processes(spread, tmp_path):
    engines, models = spread
    alone = LocalLearner(CASES["resumed"](), OPTIMIZER, name="resumed", **HOW)
    alone.update([(batch(0), [PPO()])])
    alone.save(tmp_path / "one")
    ours = engines.learner(models["resumed"], OPTIMIZER, name="resumed", **HOW)
    ours.load(tmp_path / "one")
    for made in (ours, alone):
        made.update([(batch(1), [PPO()])])
    ours.save(tmp_path / "several")
    back = LocalLearner(CASES["resumed"](), OPTIMIZER, name="resumed", **HOW)
    back.load(tmp_path / "several")
    mine, other = (values_of(made.update([(batch(2), [PPO()])])) for made in (back, alone))
    assert mine == pytest.approx(other, rel=1e-5, abs=1e-7)
    assert back.updates_done == 3


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [({}, 1.0), ({}, 0.7), ({"top_p": 0.9, "top_k": 20}, 0.7), ({"stop": ("e",)}, 1.0), ({"batch_size": 2}, 1.0)],
)
@pytest.mark.parametrize("group_size", [1, 4])
def test_replies_are_those_of_one_process(spread, directory, sampling, temperature, group_size):
    engines, models = spread
    name, chat = f"sampled at {temperature}", Chat(load_tokenizer(directory))
    sampling = Sampling(max_new_tokens=12, temperature=temperature, **sampling)
    ours = engines.sampler(models[name], chat, sampling, name=name)
    alone = LocalSampler(models[name], chat, sampling)
    mine, other = (made.generate(PROMPTS, group_size=group_size, seed=3) for made in (ours, alone))
    assert [replace(r, logprobs=()) for r in mine] == [replace(r, logprobs=()) for r in other]
    for one, another in zip(mine, other, strict=True):
        assert one.logprobs == pytest.approx(another.logprobs, abs=1e-5)
    assert 0 < ours.difference < 1e-4


def test_fewer_prompts_than_processes(spread, directory):
    engines, models = spread
    chat, sampling = Chat(load_tokenizer(directory)), Sampling(max_new_tokens=6)
    ours = engines.sampler(models["sampled at 1.0"], chat, sampling, name="sampled at 1.0")
    alone = LocalSampler(models["sampled at 1.0"], chat, sampling)
    for prompts in ([], PROMPTS[:1]):
        mine, other = (made.generate(prompts, group_size=2, seed=3) for made in (ours, alone))
        assert [r.response_ids for r in mine] == [r.response_ids for r in other]


def test_episodes_are_those_of_one_process(spread, directory):
    from tests.engines.test_episodes import Scripted

    engines, models = spread
    chat, policy = Chat(load_tokenizer(directory)), models["sampled at 1.0"]
    sampling, limits = Sampling(max_new_tokens=60), EpisodeLimits()

    def make(*args, **options):
        return engines.sampler(*args, name="sampled at 1.0", **options)

    ours = EpisodeSampler(policy, chat, sampling, Scripted(num=2), limits, make=make)
    alone = EpisodeSampler(policy, chat, sampling, Scripted(num=2), limits)
    mine, other = (made.generate(PROMPTS, group_size=2, seed=1) for made in (ours, alone))
    assert [(r.response_ids, r.response, r.events) for r in mine] == [
        (r.response_ids, r.response, r.events) for r in other
    ]


# --- shares and messages ---


def test_shares_are_even_and_hold_everything_once():
    costs = [5.0, 1, 1, 1, 1, 1, 9, 2]
    shares = deal(costs, 3)
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert max(sum(costs[i] for i in share) for share in shares) == 9  # the largest alone
    assert deal([], 2) == [[], []]
    assert deal([1.0], 3) == [[0], [], []]


def test_messages_hold_everything_that_is_sent_and_nothing_that_runs():
    sent = {
        "work": [(batch(), [PPO(clip_high=0.3), SFTLoss(coef=2.0)])],
        "metrics": {"a/b": Mean(1.5, 2), "c": Total(3), "d": Peak(float("inf"))},
        "none": None,
        "tuple": (1, "two", 3.0, True),
        1: [float("nan")],
    }
    found = decode(encode(sent))
    assert found["metrics"] == sent["metrics"]
    assert found["tuple"] == sent["tuple"]
    assert found[1][0] != found[1][0]
    [(again, losses)], (original, _) = found["work"], sent["work"][0]
    assert losses == [PPO(clip_high=0.3), SFTLoss(coef=2.0)]
    assert again.trees.trees == original.trees.trees
    for name in ("advantages", "old_logprobs", "returns"):
        assert torch.equal(getattr(again, name), getattr(original, name))
    assert torch.equal(again.trees.predict_from, original.trees.predict_from)
    for code in (print, lambda: 0, object()):
        with pytest.raises(TypeError, match="cannot be sent"):
            encode({"call": code})
