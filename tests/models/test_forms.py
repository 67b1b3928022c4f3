"""A model is computed in the first form that gives its plain hidden states, and refused when none does."""

import pytest
import torch

from tests.architectures import families
from tests.models.test_forward import some_trees
from tests.tiny import causal
from trimtab.batches.trees import TokenTrees, Tree, response_tree
from trimtab.core.errors import EngineError
from trimtab.models import attention
from trimtab.models.attention import backbone
from trimtab.models.forms import proved
from trimtab.models.forward import token_logprobs_of
from trimtab.models.positions import length_limit
from trimtab.models.roles import Policy


def test_rows_are_shared_and_windows_are_as_they_were_after_the_proof():
    model = causal("gemma3_windowed")
    assert proved(model).form == "tree"
    assert model.config.sliding_window == 4
    wide = causal("mistral_windowed")
    wide.config.sliding_window = 4096
    assert proved(wide).form == "tree"
    assert wide.config.sliding_window == 4096


def test_a_window_that_is_lost_is_found_however_wide_it_is(monkeypatch):
    monkeypatch.setattr(attention, "_window", lambda *_: None)
    wide = causal("mistral_windowed")
    wide.config.sliding_window = 4096
    assert proved(wide).form == "padded"


def spoil(model, change):
    """Has `change` look at the ids of every forward pass and say what is added to the hidden states."""

    def add(module, args, kwargs, output):
        output.last_hidden_state = output.last_hidden_state + change(kwargs["input_ids"])[..., None]
        return output

    backbone(model).register_forward_hook(add, with_kwargs=True)
    return model


def test_a_model_that_takes_the_row_for_one_sequence_runs_as_padded_rows():
    # Running counts of tokens, as a state would have them, go over from one reply to the next.
    model = spoil(causal("llama"), lambda ids: torch.ones(ids.shape).cumsum(-1))
    assert proved(model).form == "padded"
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_feels_its_row_mates_runs_every_sequence_alone():
    model = spoil(causal("llama"), lambda ids: len(ids) + torch.ones(ids.shape).cumsum(-1))
    assert proved(model).form == "alone"
    trees = some_trees()
    policy = Policy(model, pad_id=0)
    expected = families.plain_logprobs(model, [t for t in trees.trees if t.prompt])
    whole = token_logprobs_of(policy, trees, 10**9)[: len(expected)]
    torch.testing.assert_close(whole, expected.detach(), atol=2e-5, rtol=0)


def test_a_model_that_is_not_a_function_of_its_input_is_refused():
    model = spoil(causal("llama"), lambda ids: torch.randn(ids.shape))
    with pytest.raises(EngineError, match="other hidden states each time"):
        proved(model)


def test_a_model_that_sees_later_tokens_is_no_policy():
    model = spoil(causal("llama"), lambda ids: ids.sum(-1, keepdim=True).expand(ids.shape).float())
    with pytest.raises(EngineError, match="changes with the tokens after it"):
        Policy(model, pad_id=0)


def test_a_model_that_cannot_run_is_refused_with_what_transformers_said():
    model = causal("llama")
    backbone(model).layers[0].mlp.down_proj = torch.nn.Linear(3, 32)
    with pytest.raises(EngineError, match="cannot run this model on one plain row: RuntimeError: mat1 and mat2"):
        proved(model)


@pytest.mark.parametrize("name", ["llama with dynamic positions", "phi3 with long positions"])
def test_positions_that_depend_on_the_length_of_a_row_depend_on_no_other_row(name):
    model = families.causal(name)
    assert length_limit(model) == 16
    some = [*families.trees(), response_tree([5] * 30, [[6] * 10, [7] * 3]), response_tree([9] * 14, [[8] * 2])]
    alone = [Tree(t.prompt, (b,)) for t in some for b in t.branches]
    # Of a fresh model each, since transformers' dynamic embeddings remember the longest row that they have seen.
    expected = torch.cat([families.plain_logprobs(families.causal(name), [t]) for t in alone]).detach()
    policy = Policy(model, pad_id=0)
    for budget in (1, 40, 10**9):
        logprobs = token_logprobs_of(policy, TokenTrees.build(some), budget)
        torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    assert length_limit(causal("llama")) is None
