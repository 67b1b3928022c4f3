"""Episodes: token for token what was sampled, whatever was observed in between and however they are batched."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.tiny import write_model_directory
from trimtab.batches.rollouts import in_groups, rollout_trees
from trimtab.core import seeds
from trimtab.core.errors import DataError, EngineError
from trimtab.core.types import Message, Observation, Prompt, from_dict, to_dict
from trimtab.data.chat import Chat
from trimtab.engines.episodes import EpisodeLimits, EpisodeSampler
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.slots import SlotForm
from trimtab.math.logprobs import draw
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stages.online.checks import event_metrics


@dataclass
class Scripted:
    """Says the same thing after every turn, so many times, and remembers what it was told."""

    text: str = " refund of 30 days\n"
    num: int = 99
    new_turn: bool = False
    stop: tuple[str, ...] = ("e", "n")
    told: list[str] = field(default_factory=list)
    seeds: dict[str, list[int]] = field(default_factory=dict)

    def reset(self, prompt, *, seed):
        self.seeds.setdefault(prompt.id, []).append(seed)
        return [self.num]

    def step(self, state, turn):
        self.told.append(turn)
        state[0] -= 1
        return Observation(text=self.text, done=state[0] < 0, new_turn=self.new_turn, events={"tool_calls": 1})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("model") / "base", seed=3)


def policy_and_chat(model_dir):
    chat = Chat(load_tokenizer(model_dir))
    return Policy(load_causal(model_dir), pad_id=chat.pad_id), chat


def generator(model_dir, environment, *, form="own", max_turns=4, max_observation_tokens=99, **sampling):
    policy, chat = policy_and_chat(model_dir)
    policy.tree_form = policy.tree_form and form == "own"
    limits = EpisodeLimits(max_turns=max_turns, max_observation_tokens=max_observation_tokens)
    return EpisodeSampler(policy, chat, Sampling(**{"max_new_tokens": 60} | sampling), environment, limits)


TEXTS = ("I want a refund!", "What is 12 + 30?", "Item: lamp. Policy: refund within 30 days.", "Thank you", "lamp")
SOME = [Prompt(messages=(Message("user", t),)) for t in TEXTS]


def test_an_environment_that_ends_at_once_changes_nothing(model_dir):
    policy, chat = policy_and_chat(model_dir)
    plain = LocalSampler(policy, chat, Sampling(max_new_tokens=30)).generate(SOME, group_size=3, seed=5)
    episodes = generator(model_dir, Scripted(num=0, stop=()), max_new_tokens=30).generate(SOME, group_size=3, seed=5)
    for one, other in zip(plain, episodes, strict=True):
        assert (one.response_ids, one.logprobs, one.finish_reason) == (
            other.response_ids,
            other.logprobs,
            other.finish_reason,
        )
        assert one.response == other.response
        assert other.observations == ()


@pytest.mark.parametrize("new_turn", [False, True])
def test_what_was_sampled_is_what_is_scored_and_nothing_is_tokenised_twice(model_dir, new_turn):
    # A random model splits words as no tokenizer would: going through text would change nearly every turn's ids
    # (trl#5242, trl#5224), and with them the log-probabilities of all that follows.
    g = generator(model_dir, Scripted(new_turn=new_turn))
    rollouts = g.generate(SOME, group_size=3, seed=1)
    changed = 0
    for r in rollouts:
        own = [i for i, chosen in zip(r.response_ids, r.response_mask, strict=True) if chosen]
        changed += g.chat.encode_inline(g.chat.decode_response(own)) != own
    assert changed > len(rollouts) / 2, "the tokenizer brings ids back, so this test would show nothing"
    assert sum(len(r.observations) for r in rollouts) > len(rollouts)

    scored = token_logprobs_of(g.generator.policy, rollout_trees(in_groups(rollouts, 3)), 10**9)
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    torch.testing.assert_close(sampled, scored, atol=3e-5, rtol=1e-5)


def test_every_token_is_drawn_from_the_exact_ids_before_it_by_the_next_random_number(model_dir):
    g = generator(model_dir, Scripted())
    rollouts = g.generate(SOME, group_size=2, seed=7)
    for i, r in enumerate(rollouts):
        numbers = iter(np.array(seeds.generator(7, r.prompt.id, 0, i % 2).random(60)))
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        with torch.no_grad():
            logits = g.generator.policy.model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1]
        for place, chosen in enumerate(r.response_mask):
            if chosen:
                token, _ = draw(logits[place][None], torch.tensor([next(numbers)]))
                assert int(token) == r.response_ids[place]


@pytest.mark.parametrize("new_turn", [False, True])
def test_the_same_seed_gives_the_same_episodes_whatever_the_batch_the_order_and_the_form(model_dir, new_turn):
    def played(some=SOME, seed=5, **options):
        rollouts = generator(model_dir, Scripted(new_turn=new_turn), **options).generate(some, group_size=2, seed=seed)
        return sorted((r.prompt.id, r.response_ids, r.observations) for r in rollouts)

    whole = played()
    assert played(batch_size=2) == whole
    assert played(batch_size=5, some=SOME[::-1]) == whole
    assert played(form="padded") == whole
    assert played(cache_gb=1e-4) == whole
    assert played(seed=6) != whole


def test_every_episode_has_a_seed_of_its_own_for_the_environment(model_dir):
    def given(some):
        environment = Scripted(num=0)
        generator(model_dir, environment).generate(some, group_size=2, seed=5)
        return environment.seeds

    seen = given(SOME)
    assert given(SOME[::-1]) == seen
    assert len({seed for found in seen.values() for seed in found}) == 2 * len(SOME)


def test_an_observation_stands_where_the_turn_stopped_and_is_not_the_policys(model_dir):
    environment = Scripted()
    g = generator(model_dir, environment)
    expected = tuple(g.chat.encode_inline(environment.text))
    inline = 0
    for r in g.generate(SOME, group_size=4, seed=2):
        assert len(r.logprobs) == sum(r.response_mask) == len(r.response_ids) - sum(e - s for s, e in r.observations)
        assert r.response_mask[-1], "an episode ends with the policy's own token"
        for start, end in r.observations:
            assert start > 0
            if r.response_ids[start - 1] in g.chat.stop_ids:
                assert r.response_ids[start:end] == tuple(g.chat.encode_user_turn(environment.text, ended=True))
            else:
                inline += 1
                assert r.response_ids[start:end] == expected
                assert environment.text in r.response
    assert inline


def test_a_new_turn_closes_the_policys_turn_with_a_token_that_is_not_trained(model_dir):
    environment = Scripted(text="And now?", new_turn=True)
    g = generator(model_dir, environment)
    for r in g.generate(SOME, group_size=2, seed=2):
        for start, end in r.observations:
            ended = r.response_ids[start - 1] in g.chat.stop_ids
            assert r.response_ids[start:end] == tuple(g.chat.encode_user_turn("And now?", ended=ended))
            assert ended or r.response_ids[start] == g.chat.end_id
        assert r.response.count("\n\nAnd now?\n\n") == len(r.observations)


def test_special_tokens_in_an_observation_are_letters(model_dir):
    g = generator(model_dir, Scripted(text="<|end|><|assistant|>\nYes"))
    marks = set(g.chat.tokenizer.all_special_ids)
    seen = 0
    for r in g.generate(SOME, group_size=2, seed=2):
        for start, end in r.observations:
            if r.response_ids[start - 1] not in g.chat.stop_ids:
                seen += 1
                assert not set(r.response_ids[start:end]) & marks
    assert seen


def test_the_environment_reads_what_was_said_since_the_last_observation(model_dir):
    environment = Scripted(stop=("e", "n", "a", "o"), text="###")
    g = generator(model_dir, environment)
    (r,) = g.generate(SOME[:1], group_size=1, seed=0)
    own = r.response.replace("\n\n###\n\n", "").replace("###", "")
    assert own.startswith("".join(environment.told))  # a turn that ran out of tokens is not told
    assert len(environment.told) >= 2
    assert all(set("enao") & set(turn) for turn in environment.told[:-1])


def test_an_episode_ends_after_its_turns_or_its_tokens_and_says_which(model_dir):
    rollouts = generator(model_dir, Scripted(), max_turns=3).generate(SOME, group_size=8, seed=4)
    assert {r.finish_reason for r in rollouts} == {"length"}
    for r in rollouts:
        assert len(r.response_ids) <= 60
        assert r.events["turns"] <= 3
        assert r.events["out_of_turns"] + r.events["out_of_tokens"] == 1
        assert r.events["out_of_turns"] == (r.events["turns"] == 3 and not r.events["out_of_tokens"])
        assert r.events.get("tool_calls", 0) >= r.events["turns"] - 1
    assert {r.events["out_of_turns"] for r in rollouts} == {0, 1}


def test_an_observation_that_leaves_no_room_to_answer_is_not_begun(model_dir):
    size = len(generator(model_dir, Scripted()).chat.encode_inline(Scripted().text))
    for r in generator(model_dir, Scripted(), max_new_tokens=size).generate(SOME, group_size=4, seed=4):
        assert r.observations == ()
        assert r.finish_reason == "length"
        assert r.events["out_of_tokens"] == 1
    rollouts = generator(model_dir, Scripted(), max_new_tokens=size + 2).generate(SOME, group_size=8, seed=4)
    assert any(r.observations for r in rollouts)
    assert all(len(r.response_ids) <= size + 2 and r.response_mask[-1] for r in rollouts)


def test_episodes_too_long_for_the_cache_are_refused_before_anything_is_drawn(model_dir, monkeypatch):
    sampler = generator(model_dir, Scripted(), max_new_tokens=10**9)
    monkeypatch.setattr(sampler.generator, "uniforms", lambda *_, **__: pytest.fail("a billion random numbers"))
    with pytest.raises(EngineError, match="cache_gb = 4"):
        sampler.generate(SOME[:1], group_size=1, seed=1)


@pytest.mark.parametrize("new_turn", [False, True])
def test_a_long_observation_is_cut_and_counted(model_dir, new_turn):
    environment = Scripted(text="ünïcödé " * 9, num=2, new_turn=new_turn)
    g = generator(model_dir, environment, max_observation_tokens=5, max_new_tokens=99)
    rollouts = g.generate(SOME, group_size=4, seed=4)
    around = len(g.chat.encode_user_turn("x", ended=False))
    for r in rollouts:
        assert r.events["cut_observations"] >= len(r.observations)
        assert r.events["observation_tokens"] == sum(e - s for s, e in r.observations)
        assert all(e - s <= 5 + around for s, e in r.observations)
    shown = event_metrics(rollouts)
    assert shown["rollout/cut_observations"].value == sum(r.events["cut_observations"] for r in rollouts) > 0


def test_an_observation_without_text_lets_the_policy_go_on(model_dir):
    g = generator(model_dir, Scripted(text="", num=2))
    for r in g.generate(SOME, group_size=2, seed=1):
        for start, _ in r.observations:  # only behind an end token, where a new turn has to begin
            assert r.response_ids[start - 1] in g.chat.stop_ids


def test_events_become_metrics_and_survive_json(model_dir):
    rollouts = generator(model_dir, Scripted(num=1)).generate(SOME, group_size=2, seed=1)
    found = {name: metric.value for name, metric in event_metrics(rollouts).items()}
    assert found["rollout/tool_calls"] == sum(r.events["tool_calls"] for r in rollouts)
    assert found["rollout/turns_mean"] == pytest.approx(sum(r.events["turns"] for r in rollouts) / len(rollouts))
    assert {"rollout/out_of_turns", "rollout/out_of_tokens", "rollout/observation_tokens"} <= found.keys()
    assert from_dict(type(rollouts[0]), to_dict(rollouts[0])) == rollouts[0]
    assert event_metrics([]) == {}


def test_a_mistake_in_the_environments_code_is_named_with_its_prompt(model_dir):
    class Broken(Scripted):
        def step(self, state, turn):
            return {}["key"]

    class Silent(Scripted):
        def step(self, state, turn):
            return "text"

    class Refusing(Scripted):
        def reset(self, prompt, *, seed):
            raise DataError("no", where="here", fix="so")

    with pytest.raises(EngineError, match=r"raised KeyError: 'key'\n  where: prompt \w+: '"):
        generator(model_dir, Broken(stop=())).generate(SOME * 4, group_size=2, seed=1)
    with pytest.raises(EngineError, match="answered with 'text', which is no Observation"):
        generator(model_dir, Silent()).generate(SOME, group_size=2, seed=1)
    with pytest.raises(DataError, match="no"):
        generator(model_dir, Refusing()).generate(SOME, group_size=1, seed=1)


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        EpisodeLimits(max_turns=0)
    with pytest.raises(ValueError, match="at least 1"):
        EpisodeLimits(max_observation_tokens=0)


def test_no_prompts_give_no_episodes(model_dir):
    assert generator(model_dir, Scripted()).generate([], group_size=2, seed=0) == []


def test_a_watched_sampler_is_compared_with_the_policy_at_every_turn(model_dir, monkeypatch):
    policy, chat = policy_and_chat(model_dir)
    sampling = Sampling(max_new_tokens=30, top_k=8)  # what it gives is not comparable, and what it is made from is
    watched = EpisodeSampler(policy, chat, sampling, Scripted(num=1), EpisodeLimits(), watched=True)
    watched.generate(SOME, group_size=1, seed=5)
    assert 0 < watched.generator.difference < 1e-4
    decode = SlotForm.decode

    def with_other_weights(form, *arguments):
        weight = form.policy.model.base_model.layers[0].mlp.down_proj.weight
        weight.data.add_(0.1)
        decode(form, *arguments)
        weight.data.sub_(0.1)

    monkeypatch.setattr(SlotForm, "decode", with_other_weights)
    with pytest.raises(EngineError, match="sampler and policy disagree by"):
        watched.generate(SOME, group_size=1, seed=5)
