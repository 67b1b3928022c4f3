"""Layouts of several replies to a prompt: rankings, votes, and trees of messages."""

from __future__ import annotations

import csv
import json

import pytest

from tests.data.records import pair, prompt, said, shown, user
from trimtab.core.errors import DataError
from trimtab.core.types import Comparison, Demonstration, PreferencePair, Prompt
from trimtab.data.layouts import load


def test_all_pairs_of_a_ranking_are_made_but_for_ties(file):
    replies = [{"response": text, "overall_score": score} for text, score in (("a", 3), ("b", 1), ("c", 3))]
    found = load(PreferencePair, file({"instruction": "Hi", "completions": replies})).records
    assert [(p.chosen, p.rejected) for p in found] == [("a", "b"), ("c", "b")]


def ranking(*replies, **columns):
    return {
        "prompt": "Hi",
        "responses": [{"response": f"reply {i}", **reply} for i, reply in enumerate(replies)],
        **columns,
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ranking({"rank": 1}, {"score": 8}), "responses[1] has no rank, and another reply of the row has one"),
        (ranking({"rating": 4}, {"overall_score": 9}), "responses[0] has no overall_score"),
        (ranking({"rank": 1, "score": 2}, {"rank": 2, "score": 8}), "rank and score put replies 0 and 1 in opposite"),
        ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, "scores and ranks put replies"),
        (ranking({"rank": 1}, {"answer_rank": 2}), "responses[1] has neither a score nor a rank"),
    ],
)
def test_replies_of_one_row_are_compared_by_one_kind_of_score(file, row, said):
    """A rank beside a score of 8 would be the worse reply whatever it is."""
    with pytest.raises(DataError) as error:
        load(PreferencePair, file(row))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("ranks", "missing"), [([1, 2, 4], 3), ([2, 3, 4], 1), ([0, 2, 3], 1), ([1, 1, 4], 2), ([1, 3, 2, 5], 4)]
)
def test_a_ranking_with_a_gap_is_refused(file, ranks, missing):
    with pytest.raises(DataError, match=f"no reply is at {missing}") as error:
        load(PreferencePair, file({"prompt": "Hi", "responses": ["a", "b", "c", "d"][: len(ranks)], "ranks": ranks}))
    assert "1 ranking_gap" in str(error.value)
    by_reply = [{"rank": rank} for rank in ranks]
    with pytest.raises(DataError, match=f"no reply is at {missing}"):
        load(PreferencePair, file(ranking(*by_reply)))


@pytest.mark.parametrize("ranks", [[1, 2, 3], [0, 1, 2], [3, 1, 2], [1, 1, 2], [1, 1, 3], [1, 2, 2], [1.5, 3.5, 9.0]])
def test_a_ranking_without_a_gap_is_read(file, ranks):
    found = load(PreferencePair, file({"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": ranks})).records
    text = dict(zip("abc", ranks, strict=True))
    assert found
    assert all(text[pair.chosen] < text[pair.rejected] for pair in found)


def test_scores_that_agree_and_empty_ones_are_no_mistake(file):
    row = ranking({"rank": 1, "score": 8}, {"rank": 2, "score": 8}, {"rank": "", "score": 9})
    assert [(p.chosen, p.rejected) for p in load(PreferencePair, file(row)).records] == [("reply 0", "reply 1")]


def votes_of_turns(**columns):
    row = {"prompt": ["Hi", "Is it?"], "response_a": ["Yo", "Yes."], "response_b": ["Yo", "No."]} | columns
    return {name: json.dumps(texts) for name, texts in row.items()} | {
        "winner_model_a": "1",
        "winner_model_b": "0",
        "winner_tie": "0",
    }


def test_lists_of_texts_in_votes_are_the_turns_of_a_conversation(tmp_path):
    """As lmsys-arena has them: a list for what was asked, and one for the replies of each side."""
    path = tmp_path / "arena.csv"
    rows = [
        votes_of_turns(prompt=["Is it?"], response_a=["Yes."], response_b=["No."]),
        votes_of_turns(),
        votes_of_turns(response_a=["Hello", "Yes."]),
    ]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    loaded = load(PreferencePair, path, on_bad_row="drop")
    assert loaded.records == [pair(prompt("Is it?")), pair(prompt("Hi", "Yo", "Is it?"))]
    assert loaded.counts["dropped_no_shared_prompt"] == 1


def test_lists_of_different_lengths_are_the_texts_that_they_look_like(file):
    row = {"prompt": "List two.", "response_a": '["a", "b"]', "response_b": '["a"]', "choice": "A"}
    assert load(PreferencePair, file(row)).records == [pair(prompt("List two."), '["a", "b"]', '["a"]')]


def test_a_system_turn_beside_two_conversations_is_read(file):
    row = {"system": "Brief.", "conversation_a": [user("Is it?"), said("Yes.")],
           "conversation_b": [user("Is it?"), said("No.")], "winner": "model_a"}  # fmt: skip
    assert load(PreferencePair, file(row)).records == [pair(prompt("Is it?", system="Brief."))]


def test_votes_over_two_replies_become_one_pair_with_their_share(file):
    votes = [("Yes.", "No.", "A"), ("No.", "Yes.", "B"), ("Yes.", "No.", "B"), ("Yes.", "No.", "A")]
    # an id a row, as exports of votes have, keeps nothing apart
    rows = [
        {"prompt": "Is it?", "response_a": a, "response_b": b, "choice": c, "id": str(i)}
        for i, (a, b, c) in enumerate(votes)
    ]
    loaded = load(PreferencePair, file(*rows))
    assert [(p.chosen, p.rejected, p.label) for p in loaded.records] == [("Yes.", "No.", 0.75)]
    assert len(load(Comparison, file(*rows)).records) == 4


TREE = [
    {"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter", "rank": None},
    {"message_id": "2", "parent_id": "1", "text": "Hello", "role": "assistant", "rank": 0},
    {"message_id": "3", "parent_id": "1", "text": "Go", "role": "assistant", "rank": 1},
    {"message_id": "4", "parent_id": "3", "text": "Why?", "role": "prompter", "rank": 0},
    {"message_id": "5", "parent_id": "4", "text": "So.", "role": "assistant", "rank": 0},
    {"message_id": "6", "parent_id": "1", "text": "Spam", "role": "assistant", "rank": 2, "deleted": True},
]


def nested(rows):
    def node(row):
        replies = [node(r) for r in rows if r["parent_id"] == row["message_id"]]
        return {k: v for k, v in row.items() if k not in ("message_id", "parent_id")} | {"replies": replies}

    return {"message_tree_id": "1", "prompt": node(rows[0])}


@pytest.mark.parametrize("rows", [TREE, TREE[::-1], [nested(TREE)]], ids=["rows", "children first", "tree"])
def test_trees_of_messages_give_ranked_pairs_and_the_best_replies(file, rows):
    path = file(*rows)
    assert load(PreferencePair, path).records == [pair(prompt("Hi"), "Hello", "Go")]
    assert load(Demonstration, path).records == [shown("Hi", "Hello")]
    assert load(Prompt, path).records == [prompt("Hi")]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_trees_of_messages_are_read_from_the_texts_of_a_table(tmp_path, separator):
    """A parent is empty, a rank is "0", and what was deleted says "True"."""
    path = tmp_path / ("data.csv" if separator == "," else "data.tsv")
    rows = [{**row, "deleted": str(row.get("deleted", False))} for row in TREE]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)
    assert load(PreferencePair, path).records == [pair(prompt("Hi"), "Hello", "Go")]
    assert load(Demonstration, path).records == [shown("Hi", "Hello")]


def test_a_tree_whose_first_message_was_deleted_gives_nothing(file):
    spam = [{**row, "message_id": row["message_id"] + "x", "parent_id": row["parent_id"] and row["parent_id"] + "x"}
            for row in TREE]  # fmt: skip
    spam[0] = {**spam[0], "text": "Spam", "deleted": True}
    assert load(Demonstration, file(*TREE, *spam)).records == [shown("Hi", "Hello")]


def test_messages_that_answer_each_other_in_a_circle_are_bad_rows(file):
    parents = {"7": "8", "8": "7", "9": "9", "10": "9"}
    circle = [{**TREE[1], "message_id": name, "parent_id": parent} for name, parent in parents.items()]
    loaded = load(Demonstration, file(*TREE, *circle), on_bad_row="drop")
    assert loaded.records == [shown("Hi", "Hello")]
    assert loaded.counts["dropped_no_first_message"] == 4


def test_messages_without_the_one_they_answer_are_bad_rows(file):
    loaded = load(PreferencePair, file(*TREE[:3], {**TREE[3], "parent_id": "9"}), on_bad_row="drop")
    assert loaded.counts["dropped_missing_parent"] == 1
    assert "row 4" in loaded.dropped[0]
