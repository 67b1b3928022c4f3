import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.batches.trees import TokenTrees, sequence_tree
from trimtab.models.embedding_gradients import gradients_in_place, takes_in_place
from trimtab.models.roles import Policy, ScalarModel


def policy(tied: bool, pad_id: int | None = 2) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=pad_id,
    )
    return Policy(LlamaForCausalLM(config), pad_id=0)


def trees(*rows: list[int]) -> TokenTrees:
    return TokenTrees.build([sequence_tree(row) for row in rows])


MICRO_BATCHES = (trees([3, 4, 5, 4, 2, 9], [3, 8]), trees([4, 4, 4, 49]))  # 2 is the embedding's padding


def gradients(role: Policy, in_place: bool) -> dict[str, torch.Tensor]:
    role.zero_grad(set_to_none=True)
    for micro in MICRO_BATCHES:
        if in_place:
            with role.gradients_in_place():
                role(micro).logprobs.square().sum().backward()
        else:
            role(micro).logprobs.square().sum().backward()
    return {name: p.grad for name, p in role.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("pad_id", [2, None])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_added_in_place_are_those_of_autograd(tied, pad_id, precision):
    role = policy(tied, pad_id)
    role.precision = precision
    torch.testing.assert_close(gradients(role, True), gradients(role, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_begin_anew_where_the_last_ones_stood(tied):
    role = policy(tied)
    first = {name: gradient.clone() for name, gradient in gradients(role, True).items()}
    places = {name: p.grad.data_ptr() for name, p in role.named_parameters()}
    role.clear_gradients()
    kept = {name for name, p in role.named_parameters() if p.grad is not None}
    assert kept == ({"model.model.embed_tokens.weight"} | (set() if tied else {"model.lm_head.weight"}))
    assert not any(dict(role.named_parameters())[name].grad.any() for name in kept)
    with role.gradients_in_place():
        for micro in MICRO_BATCHES:
            role(micro).logprobs.square().sum().backward()
    for name, weight in role.named_parameters():
        assert torch.equal(weight.grad, first[name]), name
        assert name not in kept or weight.grad.data_ptr() == places[name]


def test_a_padding_row_gets_none_from_the_lookup():
    role = policy(tied=False)
    assert gradients(role, True)["model.model.embed_tokens.weight"][2].abs().max() == 0


def test_no_gradient_of_the_vocabularys_size_is_made():
    role, made = policy(tied=True), []
    weight = role.head.weight
    hook = weight.register_hook(made.append)
    gradients(role, True)
    assert set(made) == {None}
    assert weight.grad.abs().sum() > 0
    gradients(role, False)
    assert made[-1].shape == weight.shape
    hook.remove()


def test_after_it_gradients_can_be_asked_for_again():
    role = policy(tied=True)
    gradients(role, True)
    (found,) = torch.autograd.grad(role(MICRO_BATCHES[0]).logprobs.sum(), [role.head.weight])
    assert found.abs().sum() > 0
    assert "forward" not in vars(role.model.get_input_embeddings())


def test_a_critics_embedding_is_added_to_as_well():
    from transformers import LlamaForSequenceClassification

    role = ScalarModel(LlamaForSequenceClassification(policy(True).model.config), pad_id=0)
    weight = role.model.get_input_embeddings().weight
    role(MICRO_BATCHES[0]).scores.sum().backward()
    expected = weight.grad.clone()
    weight.grad = None
    with role.gradients_in_place():
        role(MICRO_BATCHES[0]).scores.sum().backward()
    torch.testing.assert_close(weight.grad, expected)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma has."""


def test_only_plain_trained_weights_in_float32_are_taken():
    assert takes_in_place(nn.Embedding(3, 2))
    assert takes_in_place(nn.Linear(3, 2))
    frozen = nn.Embedding(3, 2).requires_grad_(False)
    others = [
        frozen,
        nn.Embedding(3, 2).bfloat16(),
        nn.Embedding(3, 2, max_norm=1.0),
        Scaled(3, 2),
        nn.Identity(),
        None,
    ]
    assert not any(map(takes_in_place, others))
    with gradients_in_place(others):
        assert frozen.weight.grad is None


def test_gradients_of_several_threads_are_the_same_every_time():
    threads = torch.get_num_threads()
    embedding = nn.Embedding(7, 64)  # so few rows that every thread adds to each of them
    ids = torch.randint(0, 7, (4000,), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    found = []
    try:
        torch.set_num_threads(2)
        for _ in range(20):
            embedding.zero_grad(set_to_none=True)
            with gradients_in_place([embedding]):
                (embedding(ids) * weights).sum().backward()
            found.append(embedding.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    expected = torch.zeros(7, 64, dtype=torch.float64).index_add_(0, ids, weights.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)
