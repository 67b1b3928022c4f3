import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.batches.trees import (
    Branch,
    TokenTrees,
    Tree,
    TreeBatch,
    per,
    response_tree,
    sequence_tree,
    split_by_tokens,
)

ids = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
branches = st.builds(
    lambda i, seed: Branch(i, tuple((seed >> k) % 2 == 0 for k in range(len(i)))), ids, st.integers(0, 31)
)
trees = st.lists(
    st.builds(
        Tree, st.lists(st.integers(0, 9), max_size=4).map(tuple), st.lists(branches, min_size=1, max_size=3).map(tuple)
    ),
    min_size=1,
    max_size=4,
)


def test_a_pair_by_hand():
    # prompt 7 8, replies 1 2 and 3: five tokens, the first token of both replies is predicted from the prompt's last
    row = TokenTrees.build([response_tree([7, 8], [[1, 2], [3]])])
    assert row.input_ids.tolist() == [7, 8, 1, 2, 3]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert row.predict_from.tolist() == [1, 2, 1]
    assert row.targets.tolist() == [1, 2, 3]
    assert row.sequence_ids.tolist() == [0, 0, 1]
    assert row.last_tokens.tolist() == [3, 4]
    visible = row.visible()[0]
    assert visible[4].tolist() == [True, True, False, False, True]  # the second reply does not see the first
    assert visible[3].tolist() == [True, True, True, True, False]


def test_the_first_token_of_a_lone_sequence_is_not_trained():
    row = TokenTrees.build([sequence_tree([5, 6, 7])])
    assert row.targets.tolist() == [6, 7]
    assert row.predict_from.tolist() == [0, 1]


@given(trees)
def test_the_tree_and_its_padded_rows_describe_the_same_sequences(some):
    row = TokenTrees.build(some)
    rows = row.padded(pad_id=99)
    flat = rows.input_ids.reshape(-1)
    assert torch.equal(flat[rows.last_tokens], row.input_ids[row.last_tokens])
    # the token after the one a target is predicted from is the target itself
    assert torch.equal(flat[rows.predict_from + 1], row.targets)
    assert torch.equal(flat[rows.predict_from], row.input_ids[row.predict_from])
    assert rows.attention_mask.sum() == sum(
        len(t.prompt) * len(t.branches) + sum(len(b.ids) for b in t.branches) for t in some
    )
    assert row.num_trained == sum(t.num_trained for t in some)


@given(trees)
def test_a_token_sees_exactly_the_earlier_tokens_of_its_own_sequence(some):
    row = TokenTrees.build(some)
    position = {
        int(r): (p, int(s))
        for p, tree_rows in enumerate(row.strips.rows)
        for s, r in enumerate(tree_rows[: some[p].num_tokens])
    }
    visible = row.visible()
    start = 0
    for number, tree in enumerate(some):
        spans = list(tree.nodes())
        for node, (begin, length) in enumerate(spans):
            for offset in range(length):
                here = start + begin + offset
                p, slot = position[here]
                seen = set(torch.nonzero(visible[p, slot]).flatten().tolist())
                prompt = set(range(spans[0][1])) if node else set()
                assert p == number
                assert seen == prompt | set(range(begin, begin + offset + 1))
        start += tree.num_tokens
    assert row.strips.tokens.tolist() == list(range(row.num_tokens))


@given(trees)
def test_chains_and_forks_show_each_pair_of_tokens_that_see_each_other_once(some):
    row = TokenTrees.build(some)
    seen = torch.zeros(row.num_tokens, row.num_tokens, dtype=torch.int64)
    for chain in row.parts.chains:
        for tokens, filled in zip(chain.rows, chain.filled, strict=True):
            real = tokens[filled]
            seen[real[:, None], real] += torch.ones(len(real), len(real), dtype=torch.int64).tril()
    for branches, prompts in row.parts.forks:
        for i in range(len(branches.rows)):
            seen[branches.rows[i][branches.filled[i]][:, None], prompts.rows[i][prompts.filled[i]]] += 1
    visible = row.visible()
    expected = torch.zeros_like(seen)
    for p, (tokens, filled) in enumerate(zip(row.strips.rows, row.strips.filled, strict=True)):
        real = tokens[filled]
        expected[real[:, None], real] = visible[p, : len(real), : len(real)].long()
    assert torch.equal(seen, expected)


def marked_batch(row):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Marks(TreeBatch):
        token: torch.Tensor = per("token")
        sequence: torch.Tensor = per("sequence")
        tree: torch.Tensor = per("tree")

    return Marks(
        trees=row,
        token=torch.arange(row.num_trained),
        sequence=torch.arange(row.num_sequences),
        tree=torch.arange(len(row.trees)),
    )


@given(trees, st.integers(1, 30), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_what_is_known_of_a_batch_follows_its_trees_through_every_split(some, budget, random):
    row = TokenTrees.build(some)
    batch = marked_batch(row)
    groups = split_by_tokens(row, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(some)))
    for group in groups:
        assert len(group) == 1 or sum(some[i].num_tokens for i in group) <= budget
        random.shuffle(group)
        part = batch.select(group)
        assert torch.equal(row.targets[part.token], part.trees.targets)
        assert torch.equal(row.input_ids[row.last_tokens[part.sequence]], part.trees.input_ids[part.trees.last_tokens])
        assert part.tree.tolist() == group
