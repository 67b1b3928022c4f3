"""What a reference says is computed once, and again when anything it depends on is another."""

import dataclasses
import math

import pytest
import torch

from tests.preference_batches import random_trees
from tests.tiny import causal
from trimtab.batches.trees import Branch, TokenTrees, Tree
from trimtab.models import reference_cache
from trimtab.models.adapters import LoRA, adapter_parameters, add_adapter
from trimtab.models.forward import token_logprobs_of
from trimtab.models.reference_cache import model_hash, reference_logprobs
from trimtab.models.roles import Policy


@pytest.fixture
def policy():
    return Policy(causal(), pad_id=0)


def say(policy, trees, directory, token_budget=60):
    return reference_logprobs(policy, trees, token_budget=token_budget, directory=directory)


def files(directory):
    return sorted(directory.glob("*.safetensors"))


def test_it_gives_what_the_model_gives_and_reads_it_back_bit_for_bit(policy, tmp_path, capsys):
    trees = random_trees(7)
    found = say(policy, trees, tmp_path)
    row = TokenTrees.build(trees)
    assert torch.equal(torch.cat(found), token_logprobs_of(policy, row, 60))
    assert [len(values) for values in found] == [tree.num_trained for tree in trees]
    assert "kept in" in capsys.readouterr().err
    again = say(policy, trees, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert "read before" in capsys.readouterr().err
    assert len(files(tmp_path)) == 1


def test_no_forward_pass_is_made_for_what_is_kept(policy, tmp_path):
    trees = random_trees(3)
    say(policy, trees, tmp_path)
    stamp = files(tmp_path)[0].stat().st_mtime_ns
    policy.forward = None  # would fail
    say(policy, trees, tmp_path)
    assert files(tmp_path)[0].stat().st_mtime_ns == stamp


def changed_weight(policy, trees):
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[5] += 1e-3
    return policy, trees, 60


def changed_token(policy, trees):
    last = trees[-1]
    branch = last.branches[0]
    ids = (*branch.ids[:-1], branch.ids[-1] + 1)
    return policy, [*trees[:-1], Tree(last.prompt, (Branch(ids, branch.mask), *last.branches[1:]))], 60


def moved_seam(policy, trees):
    """The same tokens, one of which is now part of the reply."""
    last = trees[-1]
    first, *rest = last.branches
    longer = Branch((last.prompt[-1], *first.ids), (True, *first.mask))
    return policy, [*trees[:-1], Tree(last.prompt[:-1], (longer, *rest))], 60


def other_mask(policy, trees):
    last = trees[-1]
    branches = [dataclasses.replace(b, mask=(False, *b.mask[1:])) for b in last.branches]
    return policy, [*trees[:-1], Tree(last.prompt, tuple(branches))], 60


def other_precision(policy, trees):
    policy.precision = "bfloat16"
    return policy, trees, 60


def other_temperature(policy, trees):
    policy.temperature = 0.7
    return policy, trees, 60


def other_budget(policy, trees):
    return policy, trees, 30


def other_architecture(policy, trees):
    policy.model.config.rms_norm_eps = 1e-3
    return policy, trees, 60


def one_less(policy, trees):
    return policy, trees[:-1], 60


@pytest.mark.parametrize(
    "change",
    [
        changed_weight,
        changed_token,
        moved_seam,
        other_mask,
        other_precision,
        other_temperature,
        other_budget,
        other_architecture,
        one_less,
    ],
    ids=lambda f: f.__name__,
)
def test_another_question_is_answered_anew(policy, tmp_path, change):
    trees = random_trees(4)
    say(policy, trees, tmp_path)
    policy, trees, token_budget = change(policy, trees)
    found = say(policy, trees, tmp_path, token_budget)
    assert len(files(tmp_path)) == 2
    assert torch.equal(torch.cat(found), token_logprobs_of(policy, TokenTrees.build(trees), token_budget))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_said_and_made_again(policy, tmp_path, capsys, damage):
    trees = random_trees(4)
    expected = say(policy, trees, tmp_path)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    if damage == "other":
        reference_cache.write(path, torch.zeros(3))
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b""}[damage])
    found = say(policy, trees, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "is damaged" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_a_long_reading_is_kept_in_parts(policy, tmp_path, monkeypatch):
    """So that a killed run goes on, and a larger set of data profits from a smaller one."""
    monkeypatch.setattr(reference_cache, "TREES_PER_FILE", 3)
    trees = random_trees(7)
    found = say(policy, trees, tmp_path)
    assert len(files(tmp_path)) == math.ceil(7 / 3)
    files(tmp_path)[0].unlink()
    again = say(policy, trees, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    say(policy, [*trees[:6], *random_trees(4, seed=9)], tmp_path)
    assert len(files(tmp_path)) == 3 + 2


def test_the_base_is_the_same_model_with_and_without_adapters_on_it_and_an_adapter_is_another(policy):
    plain = model_hash(policy)
    add_adapter(policy.model, "policy", LoRA(rank=2), seed=0)
    assert model_hash(Policy(policy.model, pad_id=0)) == plain
    adapted = model_hash(Policy(policy.model, pad_id=0, adapter="policy"))
    assert adapted != plain
    add_adapter(policy.model, "other", LoRA(rank=2), seed=1)
    assert model_hash(Policy(policy.model, pad_id=0, adapter="policy")) == adapted
    with torch.no_grad():
        next(iter(adapter_parameters(policy.model, "policy").values())).add_(0.1)
    assert model_hash(Policy(policy.model, pad_id=0, adapter="policy")) != adapted
    assert model_hash(Policy(policy.model, pad_id=0)) == plain
