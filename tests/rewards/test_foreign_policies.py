"""A reward model is given the text of a policy of another family, cut off where that was cut off."""

from __future__ import annotations

import pytest

from tests.models.test_save import BASES, write_base
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.scorer import RewardModelScorer

PROMPT = Prompt(messages=(Message("user", "I want a refund!"),))
TEXT = "We can refund the"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    base = write_base(directory / "base", BASES["end of the template is not eos"]())
    save_model(load_scalar(base, head_seed=0), load_tokenizer(base), directory / "reward")
    return RewardModelScorer.from_directory(str(directory / "reward"), token_budget=4096)


def rollout(prompt_ids, ids, finish_reason, text=TEXT):
    return Rollout(
        prompt=PROMPT,
        response=text,
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(ids),
        logprobs=(0.0,) * len(ids),
        finish_reason=finish_reason,
    )


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
def test_a_reply_scores_the_same_whatever_tokenizer_the_policy_has(scorer, finish_reason):
    ids = scorer.chat.encode_response(TEXT, ended=finish_reason == "stop")
    own = rollout(scorer.chat.encode_prompt(PROMPT.messages), ids, finish_reason)
    foreign = rollout([1, 2, 3], [9, 8, 7], finish_reason)
    assert scorer.score([own])[0].tolist() == scorer.score([foreign])[0].tolist()
    finished = scorer.score_texts([(PROMPT, TEXT)]).tolist()
    assert (scorer.score([foreign])[0].tolist() == finished) == (finish_reason == "stop")


def test_an_id_that_the_reward_model_has_no_row_for_is_read_as_text(scorer):
    prompt_ids = scorer.chat.encode_prompt(PROMPT.messages)
    ids = scorer.chat.encode_response(TEXT, ended=False)
    beyond = rollout(prompt_ids, [*ids, scorer.num_rows + 5], "length")
    assert scorer.score([beyond])[0].tolist() == scorer.score([rollout(prompt_ids, ids, "length")])[0].tolist()


def test_ids_that_are_another_text_here_are_not_read_although_the_prompt_is_the_same(scorer):
    prompt_ids = scorer.chat.encode_prompt(PROMPT.messages)
    ids = scorer.chat.encode_response(TEXT, ended=False)
    other = rollout(prompt_ids, [id_ + 1 for id_ in ids], "length")
    assert scorer.score([other])[0].tolist() == scorer.score([rollout(prompt_ids, ids, "length")])[0].tolist()


def test_a_finished_reply_is_read_at_the_end_that_was_learned_whatever_ended_it(scorer):
    prompt_ids = scorer.chat.encode_prompt(PROMPT.messages)
    ids = scorer.chat.encode_response(TEXT, ended=False)
    [other_end] = scorer.chat.stop_ids - {scorer.chat.end_id}
    learned = scorer.score_texts([(PROMPT, TEXT)]).tolist()
    assert scorer.score([rollout(prompt_ids, [*ids, other_end], "stop")])[0].tolist() == learned
    stopped = [*ids, *scorer.chat.encode_response("\nUser:", ended=False)]  # the text ends before a stop text
    assert scorer.score([rollout(prompt_ids, stopped, "stop")])[0].tolist() == learned
