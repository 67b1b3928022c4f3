import pytest
import torch

from tests.tiny import write_model_directory
from trimtab.data.chat import Chat
from trimtab.engines.local_generator import LocalGenerator, Sampling
from trimtab.errors import DataError
from trimtab.math.logprobs import truncated_logprobs
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stages.online import to_trees
from trimtab.types import Message, Prompt


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("model") / "base", seed=3)


def generator(model_dir, **sampling):
    chat = Chat(load_tokenizer(model_dir))
    settings = Sampling(**{"max_new_tokens": 12, **sampling})
    policy = Policy(load_causal(model_dir), pad_id=chat.pad_id, temperature=settings.temperature)
    return LocalGenerator(policy, chat, settings)


def prompts(*texts):
    return [Prompt(messages=(Message("user", t),)) for t in texts]


SOME = prompts(
    "I want a refund!", "What is 12 + 30?", "Item: lamp. Policy: refund within 30 days.", "Thank you", "lamp"
)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampled_logprobs_are_the_policys_own(model_dir, temperature):
    g = generator(model_dir, temperature=temperature)
    rollouts = g.generate(SOME, group_size=3, seed=1)
    scored = token_logprobs_of(g.policy, to_trees(rollouts, 3), 10**9)
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    torch.testing.assert_close(sampled, scored, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.6}, {"top_k": 3}, {"top_p": 0.9, "top_k": 5, "temperature": 0.8}])
def test_truncated_sampling_records_logprobs_under_exactly_that_distribution(model_dir, options):
    g = generator(model_dir, **options)
    for r in g.generate(SOME, group_size=2, seed=1):
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        with torch.no_grad():
            logits = g.policy.model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1]
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        expected = truncated_logprobs(logits, **defaults | options).gather(1, ids[0, len(r.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.logprobs), expected, atol=3e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_rollouts_whatever_the_batch_and_the_order_of_prompts(model_dir):
    def drawn(batch_size, some):
        rollouts = generator(model_dir, batch_size=batch_size).generate(some, group_size=2, seed=5)
        return sorted((r.prompt.id, r.response_ids) for r in rollouts)

    whole = drawn(100, SOME)
    assert drawn(2, SOME) == whole
    assert drawn(4, SOME[::-1]) == whole
    assert (
        sorted((r.prompt.id, r.response_ids) for r in generator(model_dir).generate(SOME, group_size=2, seed=6))
        != whole
    )


def test_a_prompt_that_comes_twice_gets_different_replies(model_dir):
    first, second = generator(model_dir).generate([SOME[0], SOME[0]], group_size=1, seed=0)
    assert first.response_ids != second.response_ids


def test_replies_end_at_the_end_token_or_at_the_limit_and_say_which(model_dir):
    g = generator(model_dir, max_new_tokens=40)
    rollouts = g.generate(SOME * 6, group_size=2, seed=2)
    for r in rollouts:
        ended = [i for i, token in enumerate(r.response_ids) if token in g.chat.stop_ids]
        if r.finish_reason == "stop":
            assert ended == [len(r.response_ids) - 1]
        else:
            assert not ended
            assert len(r.response_ids) == 40
        assert len(r.logprobs) == len(r.response_ids)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_greedy_decoding_is_that_of_transformers(model_dir):
    g = generator(model_dir, top_k=1)
    for r in g.generate(SOME, group_size=1, seed=0):
        ids = torch.tensor([r.prompt_ids])
        out = g.policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(g.chat.stop_ids),
        )
        assert tuple(out[0, ids.shape[1] :].tolist()) == r.response_ids


def test_sampling_follows_the_distribution(model_dir):
    g = generator(model_dir, max_new_tokens=1, batch_size=512)
    rollouts = g.generate(SOME[:1], group_size=4000, seed=0)
    with torch.no_grad():
        ids = torch.tensor([rollouts[0].prompt_ids])
        probabilities = g.policy.model(input_ids=ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=len(probabilities))
    expected = probabilities * 4000
    likely = expected > 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    degrees = int(likely.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_prompt_that_is_too_long_is_named(model_dir):
    with pytest.raises(DataError, match=r"a prompt of .* tokens; the longest allowed is 8"):
        generator(model_dir, max_prompt_tokens=8).generate(SOME, group_size=1, seed=0)
