"""The last block is computed only where it is read: the same numbers, fewer of them."""

import pytest
import torch

from tests.tiny import VOCAB, causal, scalar
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.models.last_block import reads_rows
from trimtab.models.roles import Policy, ScalarModel


def trees():
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(2, VOCAB, (n,), generator=draw).tolist()

    return TokenTrees.build([response_tree(ids(20), [ids(3), ids(5)]), response_tree(ids(11), [ids(1)])])


def rows_of_last_mlp(role, run):
    """How many tokens go through the first and the last MLP while `run` does its work."""
    seen = []
    layers = role.model.base_model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[1])) for layer in (layers[0], layers[-1])
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_the_last_mlp_sees_only_tokens_that_predict_a_trained_one():
    t = trees()
    policy = Policy(causal(), pad_id=0)
    assert rows_of_last_mlp(policy, lambda: policy(t)) == [t.num_tokens, len(t.predict_from.unique())]


@pytest.mark.parametrize(("gives", "rows"), [("scores", 3), ("values", 8)])
def test_a_scalar_model_computes_only_what_it_gives(gives, rows):
    t = trees()  # predicted from: the first prompt's end, 2 + 4 more; the second prompt's end
    model = ScalarModel(scalar(), pad_id=0, gives=gives)
    both = ScalarModel(model.model, pad_id=0)(t)
    outputs = None

    def run():
        nonlocal outputs
        outputs = model(t)

    assert rows_of_last_mlp(model, run) == [t.num_tokens, rows]
    torch.testing.assert_close(getattr(outputs, gives), getattr(both, gives))
    other = "values" if gives == "scores" else "scores"
    assert getattr(outputs, other).isnan().all()


def test_with_checkpointing_the_block_runs_whole_and_gives_the_same_gradients():
    t, gradients = trees(), []
    for checkpoint in (False, True):
        policy = Policy(causal(), pad_id=0)
        if checkpoint:
            policy.checkpoint_activations()
        assert reads_rows(policy.model.base_model) != checkpoint
        policy(t).logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
