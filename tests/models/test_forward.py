import pytest
import torch

from tests.architectures import families
from tests.tiny import DECODERS, VOCAB, causal, scalar
from trimtab.batches.trees import TokenTrees, response_tree, sequence_tree
from trimtab.core.errors import EngineError
from trimtab.models.forward import exact_kl_of, sequence_scores_of, token_logprobs_of
from trimtab.models.roles import Policy, ScalarModel
from trimtab.models.tree_attention import masked_attention, tree_attention


def some_trees(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(2, VOCAB, (n,), generator=draw).tolist()

    return TokenTrees.build(
        [
            response_tree(ids(7), [ids(3), ids(9), ids(1)]),
            response_tree(ids(2), [ids(6)]),
            sequence_tree(ids(8), [True, False, True, True, False, False, True, True]),
        ]
    )


def as_role(model, kind, *, tree_form=True):
    role = kind(model, pad_id=0)
    role.tree_form = tree_form
    return role


def relative_difference(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("name", DECODERS)
def test_logprobs_are_those_of_transformers_on_each_sequence_alone(name):
    model = causal(name)
    trees = some_trees()
    expected = []
    with torch.no_grad():
        for tree in trees.trees:
            for branch in tree.branches:
                full = torch.tensor([tree.prompt + branch.ids])
                logprobs = model(input_ids=full).logits[0].log_softmax(-1)
                for offset, trained in enumerate(branch.mask):
                    place = len(tree.prompt) + offset
                    if trained and place:
                        expected.append(logprobs[place - 1, full[0, place]])
    role = Policy(model, pad_id=0)
    assert role.tree_form
    torch.testing.assert_close(token_logprobs_of(role, trees, 10**9), torch.stack(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_of_tree_and_padded_rows_agree(name):
    gradients = []
    for tree_form in (True, False):
        role = as_role(causal(name), Policy, tree_form=tree_form)
        outputs = role(some_trees(), entropy=True)
        (outputs.logprobs.sum() + 0.1 * outputs.entropy.sum()).backward()
        gradients.append({n: p.grad for n, p in role.named_parameters() if p.grad is not None})
    tree, padded = gradients
    assert tree.keys() == padded.keys()
    whole = [torch.cat([g[n].flatten() for n in sorted(g)]) for g in (tree, padded)]
    assert relative_difference(*whole) < 1e-5


def attention_and_gradients(attend, trees, heads):
    """The output of `attend` for random states with these numbers of query and key heads, and their gradients."""
    draw = torch.Generator().manual_seed(1)
    query_heads, key_heads = heads
    states = [
        torch.randn(trees.num_tokens, n, 8, generator=draw, requires_grad=True)
        for n in (query_heads, key_heads, key_heads)
    ]
    output = attend(*states)
    weights = torch.randn(output.shape, generator=draw)
    return [output, *torch.autograd.grad((output * weights).sum(), states)]


def masked(trees, window=None):
    """Attention over the trees by its definition."""
    visible = trees.visible(window)[:, None]
    return lambda q, k, v: masked_attention(q, k, v, trees.strips, visible, 0.3)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_in_parts_is_attention_under_the_mask(heads):
    trees = TokenTrees.build(
        [*some_trees().trees, response_tree([3] * 30, [[4] * 5, [5] * 11]), response_tree([], [[6], [7] * 4])]
    )
    parted = attention_and_gradients(lambda q, k, v: tree_attention(trees)(0, q, k, v, 0.3, None), trees, heads)
    for ours, defined in zip(parted, attention_and_gradients(masked(trees), trees, heads), strict=True):
        assert relative_difference(ours, defined) < 2e-6


def test_an_encoder_is_recognised():
    assert ScalarModel(scalar("llama"), pad_id=0).is_decoder
    assert not ScalarModel(scalar("bert"), pad_id=0).is_decoder


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_scores_are_those_of_transformers_and_do_not_depend_on_padding_or_batch(name):
    model = scalar(name)
    trees = some_trees()
    model.config.pad_token_id = 0
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([tree.prompt + b.ids])).logits[0, 0]
            for tree in trees.trees
            for b in tree.branches
        ]
    role = ScalarModel(model, pad_id=0)
    for budget in (1, 25, 10**9):
        torch.testing.assert_close(sequence_scores_of(role, trees, budget), torch.stack(alone), atol=2e-5, rtol=1e-5)


def test_exact_kl_is_the_kl_of_the_two_softmaxes():
    trees = some_trees()
    one, other = causal(seed=1), causal(seed=2)
    p, q = (as_role(m, Policy, tree_form=False) for m in (one, other))
    rows = trees.padded(0)
    with torch.no_grad():
        logs = [
            m(input_ids=rows.input_ids).logits.flatten(0, 1)[rows.predict_from].log_softmax(-1) for m in (one, other)
        ]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    torch.testing.assert_close(exact_kl_of(p, q, trees, 12), expected, atol=1e-5, rtol=1e-4)


def test_a_value_head_on_the_policy_starts_at_zero():
    policy = Policy(causal(), pad_id=0, with_value_head=True)
    assert policy(some_trees()).values.abs().max() == 0


def test_a_critic_that_gives_no_values_is_refused_with_the_way_out():
    with pytest.raises(
        EngineError, match=r"no values of its tokens: it sees later tokens(.|\n)*critic.init = 'policy'"
    ):
        ScalarModel(scalar("bert"), pad_id=0, gives="values")


def test_decoders_of_every_make_give_values():
    for name in ("bloom", "mpt", "openai-gpt"):
        model = ScalarModel(families.scalar(name), pad_id=0, gives="values")
        assert model(some_trees()).values.isfinite().all()


def test_exact_kl_is_over_the_tokens_that_both_embeddings_have():
    narrow, wide = causal("llama", 0), causal("llama", 1)
    trees = some_trees()
    expected = Policy(narrow, pad_id=0).kl_to(Policy(wide, pad_id=0), trees)
    wide.resize_token_embeddings(VOCAB + 8, mean_resizing=False)  # rows that fill up
    torch.testing.assert_close(Policy(narrow, pad_id=0).kl_to(Policy(wide, pad_id=0), trees), expected)
    assert (Policy(wide, pad_id=0).kl_to(Policy(narrow, pad_id=0), trees) > 0).all()
