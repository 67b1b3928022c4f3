"""Pairs of a prompt's replies: when they are those of one ranking, and what each weighs."""

import itertools

import pytest
import torch

from trimtab.batches.pairs import Compared, PairBatch, ranks_of
from trimtab.batches.trees import TokenTrees, response_tree


def better(*pairs):
    return [Compared(chosen, rejected, 0.0, 1.0) for chosen, rejected in pairs]


def pairs_of(ranks):
    """All pairs of replies with these ranks, by comparing every two."""
    return better(*((i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]))


@pytest.mark.parametrize("ranks", sorted(set(itertools.product(range(3), repeat=3))))
def test_the_ranks_of_all_pairs_of_an_order_are_that_order(ranks):
    found = ranks_of(pairs_of(ranks), 3)
    for i, j in itertools.combinations(range(3), 2):
        assert (found[i] > found[j]) - (found[i] < found[j]) == (ranks[i] > ranks[j]) - (ranks[i] < ranks[j])


@pytest.mark.parametrize(
    ("pairs", "num", "said"),
    [
        (better((0, 1), (1, 2)), 3, "no pair says whether reply 0 is better than reply 2"),
        (better((0, 1), (2, 3)), 4, "no pair says whether reply 0 is better than reply 3"),
        (better((0, 1), (1, 2), (2, 0)), 3, "replies 0 and 1 are beaten by 1 others each, and one by the other"),
        (better((0, 1), (1, 0)), 2, "each is preferred to the other"),
    ],
)
def test_pairs_that_are_no_ranking_are_refused(pairs, num, said):
    with pytest.raises(ValueError, match=said):
        ranks_of(pairs, num)


def test_shares_and_trees_belong_to_the_trees_that_a_batch_keeps():
    trees = TokenTrees.build([response_tree([1, 2], [[3], [4], [5]][:n]) for n in (3, 2)])
    whole = PairBatch(trees=trees, compared=(tuple(pairs_of([0, 1, 2])), tuple(pairs_of([0, 1]))))
    torch.testing.assert_close(whole.shares, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert whole.sequence_trees.tolist() == [0, 0, 0, 1, 1]
    assert whole.ranks.tolist() == [0, 1, 2, 0, 1]
    part = whole.select([1])
    assert part.shares.tolist() == [1.0]
    assert part.sequence_trees.tolist() == [0, 0]
