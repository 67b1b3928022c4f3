"""What is scored of every promised family is what transformers gives for single unpadded rows; so is the gradient."""

import pytest
import torch

from tests.architectures import families
from trimtab.batches.trees import TokenTrees
from trimtab.core.errors import EngineError
from trimtab.models.forward import sequence_scores_of, token_logprobs_of
from trimtab.models.load import load_causal, load_scalar
from trimtab.models.roles import Policy, ScalarModel

IN_TREES = {
    *("llama", "llama4_text", "mistral", "ministral", "ministral3", "mixtral", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "gemma3_text", "gemma3n_text", "gemma4_text", "phi3", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    *("glm4", "glm4_moe", "glm4_moe_lite", "olmo2", "olmo3", "granite", "granitemoe", "smollm3", "cohere", "cohere2"),
    *("gpt2", "gpt_neox"),
}
"""Families computed over the shared row. The others run as padded rows or alone, which costs the sharing."""


def check(name, directory):
    """Log-probabilities and gradients of a family against plain transformers."""
    some = families.trees()
    plain = families.causal(name)
    expected = families.plain_logprobs(plain, some)
    expected.sum().backward()
    policy = Policy(load_causal(families.write(plain, directory)), pad_id=families.PAD)
    assert name not in IN_TREES or policy.form == "tree"
    logprobs = policy(TokenTrees.build(some)).logprobs
    torch.testing.assert_close(logprobs, expected, atol=families.TOLERANCE, rtol=0)
    assert families.plain_logprobs(plain, some).std() > 0.1, "near uniform: a wrong mask would not be felt"
    logprobs.sum().backward()
    ours, theirs = families.gradients(policy), families.gradients(plain)
    for parameter, gradient in theirs.items():
        if gradient.norm() > 1e-4:
            assert float((ours[parameter] - gradient).norm() / gradient.norm()) < 1e-3, parameter
    return policy


@pytest.mark.parametrize("name", families.PROMISED)
def test_what_is_promised_is_scored_as_transformers_scores_single_rows(name, tmp_path):
    policy = check(name, tmp_path)
    # Nor does it matter what else is in the micro-batch.
    some = TokenTrees.build(families.trees())
    one_by_one = token_logprobs_of(policy, some, 1)
    torch.testing.assert_close(token_logprobs_of(policy, some, 10**9), one_by_one, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["nemotron", "granite_swa", "mimo_v2_flash", "flint", "nanochat", "falcon with alibi", "opt", "stablelm"]
)
def test_what_was_once_wrong_in_silence_stays_right(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "bloom", "mixtral", "phi3 with long positions"])
def test_reward_models_are_read_as_transformers_reads_single_rows(name, tmp_path):
    some = families.trees()
    plain = families.scalar(name)
    expected = families.plain_scores(plain, some)
    model = ScalarModel(load_scalar(families.write(plain, tmp_path)), pad_id=families.PAD)
    assert model.is_decoder
    scores = sequence_scores_of(model, TokenTrees.build(some), 10**9)
    torch.testing.assert_close(scores, expected, atol=families.TOLERANCE, rtol=1e-4)
    assert model(TokenTrees.build(some)).values.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(families.every_family()) - set(families.PROMISED)))
def test_every_other_family_is_scored_rightly_or_refused_by_name(name, tmp_path):
    some = families.trees()
    try:
        plain = families.causal(name)
        expected = families.plain_logprobs(plain, some).detach()
    except Exception as error:
        pytest.skip(f"transformers cannot run a tiny model of it: {type(error).__name__}: {error}")
    try:
        policy = Policy(load_causal(families.write(plain, tmp_path)), pad_id=families.PAD)
    except EngineError as error:
        if "architecture" not in error.where:
            raise
        return
    logprobs = token_logprobs_of(policy, TokenTrees.build(some), 10**9)
    torch.testing.assert_close(logprobs, expected, atol=families.TOLERANCE, rtol=1e-4)
