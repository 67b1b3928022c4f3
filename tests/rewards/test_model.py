"""A reward model gives the score that it was trained to give, at the place it was trained at."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.tiny import scalar, write_model_directory
from trimtab.core.errors import EngineError
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.scorer import RewardModelScorer, rewards_of
from trimtab.rewards.written_text import WrittenText

LINE_BREAK_BEHIND = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PROMPT = Prompt(messages=(Message("user", "I want a refund!"),))


@pytest.fixture
def foreign(tmp_path):
    """A reward model that trimtab did not train, whose template writes a line break behind each turn."""

    def make(template=LINE_BREAK_BEHIND, pad=None):
        policy = write_model_directory(tmp_path / "policy")
        tokenizer = load_tokenizer(policy)
        tokenizer.chat_template = template
        model = load_scalar(policy, head_seed=0)
        with torch.no_grad():
            model.score.weight.mul_(20)
        model.config.pad_token_id = tokenizer.pad_token_id if pad is None else getattr(tokenizer, pad)
        save_model(model, tokenizer, tmp_path / "reward")
        return tmp_path / "reward"

    return make


def plain_score(path, reply):
    tokenizer, model = load_tokenizer(path), AutoModelForSequenceClassification.from_pretrained(path)
    turns = [{"role": "user", "content": PROMPT.text}, {"role": "assistant", "content": reply}]
    with torch.no_grad():
        return model(**tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")).logits[0, 0]


@pytest.mark.parametrize("pad", [None, "eos_token_id"])
@pytest.mark.parametrize("template", [LINE_BREAK_BEHIND, LINE_BREAK_BEHIND.replace("eos_token }}\n", "eos_token }}")])
def test_models_of_others_are_read_as_their_template_and_forward_pass_have_it(foreign, template, pad):
    path = foreign(template, pad)
    scorer = RewardModelScorer.from_directory(str(path), token_budget=4096)
    for reply in ("We can refund it.", "No"):
        torch.testing.assert_close(scorer.score_texts([(PROMPT, reply)])[0], plain_score(path, reply))


def test_models_of_the_reward_stage_are_read_at_the_end_token(foreign):
    path = foreign()
    model = load_scalar(path)
    model.config.update({"reward_shift": 0.5})
    save_model(model, load_tokenizer(path), path)
    scorer = RewardModelScorer.from_directory(str(path), token_budget=4096)
    assert scorer.ending == (scorer.chat.end_id,)
    assert scorer.shift == 0.5
    written = WrittenText.of(scorer.chat, None)
    assert written.ending[0] == scorer.chat.end_id
    assert len(written.ending) > 1


def rollout(chat, reply, *, reason, own):
    ids = chat.encode_response(reply)
    return Rollout(
        prompt=PROMPT,
        response=reply,
        prompt_ids=tuple(chat.encode_prompt(PROMPT.messages)) if own else (5,),
        response_ids=tuple(ids if reason == "stop" else ids[:-1]),
        logprobs=(0.0,) * (len(ids) - (reason != "stop")),
        finish_reason=reason,
    )


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_reply_has_the_same_score_from_its_ids_and_from_its_text(foreign, reason):
    scorer = RewardModelScorer.from_directory(str(foreign()), token_budget=4096)
    replies = [rollout(scorer.chat, "We can refund it.", reason=reason, own=own) for own in (True, False)]
    scores, _ = scorer.score(replies)
    assert scores[0] == scores[1]
    finished = scorer.score_texts([(PROMPT, "We can refund it.")])[0]
    assert (scores[0] == finished) == (reason == "stop")


def test_equal_replies_have_equal_scores_to_the_last_bit(foreign):
    scorer = RewardModelScorer.from_directory(str(foreign()), token_budget=40)
    texts = ["We can refund it.", "No", "We can refund it. " * 5, "Thank you"] * 3
    scores = scorer.score_texts([(PROMPT, text) for text in texts])
    assert torch.equal(scores[:4], scores[4:8])
    assert torch.equal(scores[:4], scores[8:])
    assert len(set(scores.tolist())) == 4


def test_many_replies_to_one_prompt_stay_within_the_token_budget(foreign):
    path = str(foreign())
    other = Prompt(messages=(Message("user", "Where is my order?"),))
    texts = [((PROMPT, other)[i % 2], "It is " + "so " * (i // 2)) for i in range(12)] * 2
    wide, narrow = (RewardModelScorer.from_directory(path, token_budget=budget) for budget in (10_000, 80))
    trees, where = narrow.trees_of(narrow.ids_of_texts(texts))
    assert trees.num_sequences == 12
    assert where[:12].tolist() == where[12:].tolist()
    sizes = [tree.num_tokens for tree in trees.trees]
    assert len(sizes) > 2
    assert max(sizes) <= 80
    assert len(wide.trees_of(wide.ids_of_texts(texts))[0].trees) == 2
    assert rewards_of(narrow, texts) == pytest.approx(rewards_of(wide, texts), abs=1e-5)
    assert rewards_of(wide, texts) == pytest.approx(wide.score_texts(texts).numpy(), abs=1e-6)


def test_a_reply_longer_than_the_budget_has_a_tree_of_its_own(foreign):
    scorer = RewardModelScorer.from_directory(str(foreign()), token_budget=20)
    trees, _ = scorer.trees_of(scorer.ids_of_texts([(PROMPT, text) for text in ("No", "Why not? " * 9, "Yes")]))
    assert [tree.num_tokens > 20 for tree in trees.trees] == [False, True, False]


def test_a_reply_that_cannot_be_read_is_refused_or_has_no_reward(foreign):
    scorer = RewardModelScorer.from_directory(str(foreign()), token_budget=4096)
    texts = [(PROMPT, "No"), (PROMPT, "word " * 60), (PROMPT, "Yes")]
    scorer.positions = 60
    found = rewards_of(scorer, texts, unread="nan")
    assert np.isnan(found).tolist() == [False, True, False]
    assert found[[0, 2]] == pytest.approx(rewards_of(scorer, [texts[0], texts[2]]))
    assert np.isnan(rewards_of(scorer, texts[1:2], unread="nan")).all()
    with pytest.raises(EngineError, match="the reward model has learned 60 positions"):
        rewards_of(scorer, texts)


def test_rewards_that_are_not_finite_are_refused(foreign):
    scorer = RewardModelScorer.from_directory(str(foreign()), token_budget=100)
    torch.nn.init.constant_(scorer.model.model.score.weight, torch.inf)
    with pytest.raises(EngineError, match="1 of 1 rewards are not finite"):
        rewards_of(scorer, [(PROMPT, "Because.")])


def test_scores_and_values_are_float32_when_products_are_bfloat16():
    from tests.models.test_forward import some_trees
    from trimtab.models.roles import ScalarModel

    for name in ("llama", "bert"):
        role = ScalarModel(scalar(name), pad_id=0)
        role.precision = "bfloat16"
        scores = role(some_trees()).scores
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float())


def test_a_reply_that_ended_on_another_special_token_gets_the_ending_that_was_learnt(foreign):
    scorer = RewardModelScorer.from_directory(str(foreign()), token_budget=4096)
    chat = scorer.chat
    other = next(i for i in chat.tokenizer.all_special_ids if i not in chat.stop_ids)
    usual = rollout(chat, "No", reason="stop", own=True)
    ended = dataclasses.replace(usual, response_ids=(*usual.response_ids[:-1], other))
    assert torch.equal(scorer.score([usual])[0], scorer.score([ended])[0])
    for text in ("No\n", "No "):  # ordinary text at the end is no ending
        ids = chat.tokenizer.encode(text, add_special_tokens=False)
        assert not scorer._ends((ids[-1],))
