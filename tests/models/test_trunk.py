"""What adapters in the last blocks have in common is computed once, and gives the numbers of computing it each time."""

import pytest
import torch

from tests.preference_batches import random_trees
from tests.tiny import DECODERS, scalar
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.errors import ConfigError
from trimtab.models.adapters import LoRA, add_adapter
from trimtab.models.forward import sequence_scores_of
from trimtab.models.load import drawn_head
from trimtab.models.roles import ScalarModel
from trimtab.models.trunk import blocks_of, num_shared
from trimtab.rewards.ensemble import scores_of_members

TREES = TokenTrees.build(random_trees(6, num_replies=3))


def members_of(architecture, num=3, form="tree", **settings):
    """Adapters with weights of their own on one base."""
    model = scalar(architecture)
    for number in range(num):
        add_adapter(model, f"member_{number}", LoRA(rank=2, **settings), seed=number)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=draw)
    roles = [
        ScalarModel(model, pad_id=0, adapter=f"member_{n}", head=drawn_head(model, n), gives="scores")
        for n in range(num)
    ]
    for role in roles:
        role.tree_form = form == "tree"
    return roles


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("form", ["tree", "padded"])
@pytest.mark.parametrize("token_budget", [10_000, 40])
def test_scores_of_members_are_those_of_each_alone(architecture, form, token_budget):
    members = members_of(architecture, form=form, last_blocks=1)
    assert num_shared(members[0].model) == 1
    together = scores_of_members(members, TREES, token_budget)
    for scores, member in zip(together, members, strict=True):
        assert torch.equal(scores, sequence_scores_of(member, TREES, token_budget))
    assert float(together.std(0).mean()) > 1e-3


def test_shared_blocks_are_computed_once():
    members = members_of("llama", num=4, last_blocks=1)
    calls = []
    for number, block in enumerate(blocks_of(members[0].model)):
        block.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    scores_of_members(members, TREES, 10_000)
    assert calls == [0, 1, 1, 1, 1]


def test_nothing_is_shared_when_the_first_block_is_adapted_or_members_are_models_of_their_own():
    everywhere = members_of("llama")
    assert num_shared(everywhere[0].model) == 0
    together = scores_of_members(everywhere, TREES, 10_000)
    for scores, member in zip(together, everywhere, strict=True):
        assert torch.equal(scores, sequence_scores_of(member, TREES, 10_000))
    apart = [ScalarModel(scalar("llama", seed=seed), pad_id=0, gives="scores") for seed in range(2)]
    for scores, member in zip(scores_of_members(apart, TREES, 10_000), apart, strict=True):
        assert torch.equal(scores, sequence_scores_of(member, TREES, 10_000))


def test_a_batch_with_rows_of_two_kinds_is_replayed_in_order():
    """Long rows are computed apart, so one batch takes several calls of the model."""
    members = members_of("llama", last_blocks=1)
    for member in members:
        member.length_limit = 12
    trees = TokenTrees.build([*random_trees(3), response_tree(range(2, 14), [[3, 4], [5, 6, 7]])])
    together = scores_of_members(members, trees, 10_000)
    for scores, member in zip(together, members, strict=True):
        assert torch.equal(scores, sequence_scores_of(member, trees, 10_000))


def test_a_model_is_as_it_was_afterwards():
    members = members_of("llama", last_blocks=1)
    before = sequence_scores_of(members[0], TREES, 10_000)
    scores_of_members(members, TREES, 10_000)
    assert torch.equal(sequence_scores_of(members[0], TREES, 10_000), before)
    assert not any("forward" in vars(block) for block in blocks_of(members[0].model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt"])
def test_only_the_last_blocks_get_an_adapter(architecture):
    model = scalar(architecture)
    add_adapter(model, "a", LoRA(rank=2, last_blocks=1), seed=0)
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted
    assert all(".1." in name for name in adapted)


def test_more_blocks_than_there_are_and_layers_in_none_of_them_are_refused():
    with pytest.raises(ConfigError, match="last_blocks = 3, and this LlamaForSequenceClassification has 2 blocks"):
        add_adapter(scalar("llama"), "a", LoRA(last_blocks=3), seed=0)
    with pytest.raises(ConfigError, match="of which the last hold none of"):
        add_adapter(scalar("llama"), "a", LoRA(last_blocks=1, modules=("layers.0.mlp.up_proj",)), seed=0)
