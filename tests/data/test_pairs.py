"""Trees of compared and judged replies, against the texts they are made of."""

import pytest

from tests.data.conftest import CHATML, byte_level
from trimtab.batches.pairs import Compared
from trimtab.core.types import LabelledResponse, Message, PreferencePair, Prompt
from trimtab.data.chat import Chat
from trimtab.data.pairs import group_pairs, group_replies, mismatch, split_in_two


def prompt(text):
    return Prompt(messages=(Message("user", text),))


@pytest.fixture(scope="module")
def chat():
    return Chat(byte_level(["<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>"))


def pair(question, chosen, rejected, **more):
    return PreferencePair(prompt=prompt(question), chosen=chosen, rejected=rejected, **more)


def grouped(chat, pairs, *, max_tokens=200, on_too_long="truncate_prompt_left"):
    counts = {}
    return group_pairs(pairs, chat, max_tokens=max_tokens, on_too_long=on_too_long, counts=counts), counts


def test_all_pairs_of_a_prompt_share_its_tree_and_each_reply_stands_once(chat):
    found, _ = grouped(
        chat,
        [
            pair("Which?", "one", "two", margin=0.5),
            pair("Other?", "yes", "no"),
            pair("Which?", "three", "one", label=0.8),
        ],
    )
    assert [len(tree.branches) for tree in found.trees] == [3, 2]
    assert found.compared[0] == (Compared(0, 1, 0.5, 1.0), Compared(2, 0, 0.0, 0.8))
    assert [p.chosen for p in found.pairs()] == ["one", "three", "yes"]
    batch = found.batch()
    assert batch.chosen_ids.tolist() == [0, 2, 3]
    assert batch.rejected_ids.tolist() == [1, 0, 4]
    turned = batch.select([1, 0])
    assert turned.chosen_ids.tolist() == [0, 2, 4]
    assert turned.labels.tolist() == pytest.approx([1.0, 1.0, 0.8])
    assert turned.margins.tolist() == pytest.approx([0.0, 0.5, 0.0])


def test_the_trained_tokens_are_the_reply_with_one_end_token_and_nothing_of_the_prompt(chat):
    """trl#4908 added a second end token, OpenRLHF#235 trained on prompts, trl#6357 masked the end token as padding."""
    found, _ = grouped(chat, [pair("How are you today?", "I am fine.", "Hello there")])
    trees = found.batch().trees
    for sequence, reply in enumerate(("I am fine.", "Hello there")):
        own = trees.targets[trees.sequence_ids == sequence].tolist()
        assert own == chat.encode_response(reply)
        assert own.count(chat.end_id) == 1
        assert own[-1] == chat.end_id
    firsts = [trees.predict_from[trees.sequence_ids == s][0].item() for s in (0, 1)]
    assert firsts == [len(chat.encode_prompt(prompt("How are you today?").messages)) - 1] * 2


@pytest.mark.parametrize("max_tokens", [12, 20, 200])
def test_truncation_takes_the_beginning_of_the_prompt_and_leaves_the_replies_whole(chat, max_tokens):
    """trl#2332 and trl#5305: indices into a truncated row pointed at other tokens."""
    text = "Hello there, how are you today? What is two plus two?"
    found, counts = grouped(chat, [pair(text, "four", "It is fine.")], max_tokens=max_tokens)
    tree = found.trees[0]
    whole = chat.encode_prompt(prompt(text).messages)
    longest = max(len(chat.encode_response(r)) for r in ("four", "It is fine."))
    assert list(tree.prompt) == whole[len(whole) - min(len(whole), max_tokens - longest) :]
    assert [list(b.ids) for b in tree.branches] == [chat.encode_response(r) for r in ("four", "It is fine.")]
    assert counts == ({"truncated_too_long": 1} if len(whole) + longest > max_tokens else {})


def test_what_does_not_fit_is_counted_by_its_pairs(chat):
    long = "It is four. " * 30
    pairs = [pair("Which?", long, "two"), pair("Which?", "two", "three"), pair("Other?", "yes", "no")]
    found, counts = grouped(chat, pairs, max_tokens=60, on_too_long="drop")
    assert [p.prompt.text for p in found.pairs()] == ["Other?"]
    assert counts == {"dropped_too_long": 2}


def test_judgements_of_a_prompt_share_its_tree_and_are_counted_by_reply(chat):
    judged = [("Which?", "one", True), ("Which?", "two", False), ("Which?", "one", False), ("Other?", "no", True)]
    replies = [LabelledResponse(prompt=prompt(q), response=r, label=good) for q, r, good in judged]
    found = group_replies(replies, chat, max_tokens=100, on_too_long="drop", counts={})
    assert [len(tree.branches) for tree in found.trees] == [2, 1]
    assert list(found.desirable) == [(1.0, 0.0), (1.0,)]
    assert list(found.undesirable) == [(1.0, 1.0), (0.0,)]
    assert found.totals == (2.0, 2.0)


def test_a_pair_is_a_good_and_a_bad_reply_by_the_share_of_its_votes(chat):
    found, _ = grouped(chat, [pair("Which?", "one", "two", label=0.75), pair("Which?", "one", "three")])
    judged = split_in_two(found)
    assert list(judged.desirable) == [(1.75, 0.25, 0.0)]
    assert list(judged.undesirable) == [(0.25, 0.75, 1.0)]


def test_each_prompt_is_set_beside_the_replies_to_another(chat):
    pairs = [pair(f"Which is {i}?", f"{i} it is", "Hello") for i in range(5)]
    trees = grouped(chat, pairs)[0].trees
    found = mismatch(trees, max_tokens=200, bos_id=None)
    assert [tree.prompt for tree in found] == [tree.prompt for tree in trees]
    assert [tree.branches for tree in found] == [trees[(i + 2) % 5].branches for i in range(5)]
    short = mismatch(trees, max_tokens=14, bos_id=None)
    assert all(max(len(b.ids) for b in tree.branches) + len(tree.prompt) <= 14 for tree in short)
    assert all(tree.prompt for tree in short)
