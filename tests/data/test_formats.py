"""Layouts that people have: each is read as what it means."""

from __future__ import annotations

import csv
import json

import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import (
    Comparison,
    Demonstration,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    SteppedResponse,
)
from trimtab.data.layouts import kinds_of, load


def prompt(*contents: str, system: str = "", **more) -> Prompt:
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(contents)]
    return Prompt(messages=tuple([Message("system", system)] if system else []) + tuple(turns), **more)


def shown(*contents: str, **more) -> Demonstration:
    return Demonstration(prompt=prompt(*contents[:-1], **more), response=contents[-1])


def pair(asked: Prompt, chosen: str = "Yes.", rejected: str = "No.", **more) -> PreferencePair:
    return PreferencePair(prompt=asked, chosen=chosen, rejected=rejected, **more)


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def file(tmp_path):
    def write(*rows: dict, name: str = "data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


DEMONSTRATIONS = {
    "alpaca": ({"instruction": "Add.", "input": "2 and 3", "output": "5"}, shown("Add.\n\n2 and 3", "5")),
    "alpaca without input": ({"instruction": "Add.", "input": "", "output": "5"}, shown("Add.", "5")),
    "alpaca with system and history": (
        {"system": "Be brief.", "history": [["a", "b"]], "instruction": "c", "input": "", "output": "d"},
        shown("a", "b", "c", "d", system="Be brief."),
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Bob did it.", "response": "Bob", "category": "closed_qa"},
        shown("Who?\n\nBob did it.", "Bob"),
    ),
    "passages": ({"question": "Who?", "passages": ["One.", "Two."], "answer": "Bob"}, "facts"),
    "input and output": ({"input": "Hi", "output": "Hello"}, shown("Hi", "Hello")),
    "prompt, input and completion": (
        {"prompt": "Translate", "input": "cheese", "completion": "fromage"},
        shown("Translate\n\ncheese", "fromage"),
    ),
    "problem and solution": ({"problem": "1+1?", "solution": "It is 2."}, shown("1+1?", "It is 2.")),
    "system column": (
        {"system": "In French.", "prompt": "Hi", "completion": "Salut"},
        shown("Hi", "Salut", system="In French."),
    ),
    "system prompt beside messages": (
        {"system_prompt": "In French.", "messages": [user("Hi"), said("Salut")]},
        shown("Hi", "Salut", system="In French."),
    ),
    "the same system twice": (
        {"system": "Brief.", "messages": [{"role": "system", "content": "Brief."}, user("Hi"), said("Yo")]},
        shown("Hi", "Yo", system="Brief."),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        shown("Hi", "Hello"),
    ),
    "sharegpt renamed": (
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        shown("Hi", "Hello"),
    ),
    "other names of roles": (
        {
            "messages": [
                {"role": "developer", "content": "Brief."},
                {"role": "human", "content": "Hi"},
                {"role": "model", "parts": [{"text": "Yo"}]},
            ]
        },
        shown("Hi", "Yo", system="Brief."),
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                said("c"),
            ]
        },
        shown("ab", "c"),
    ),
    "no tools, calls or pictures": (
        {
            "messages": [{**user("Hi"), "tool_calls": None}, said("Yo", tool_calls=[], reasoning_content="")],
            "tools": [],
            "images": None,
        },
        shown("Hi", "Yo"),
    ),
    "messages as JSON text": ({"messages": json.dumps([user("Hi"), said("Yo")])}, shown("Hi", "Yo")),
    "prompt and completion as JSON text": (
        {"prompt": json.dumps([user("Hi")]), "completion": json.dumps([said("Yo")])},
        shown("Hi", "Yo"),
    ),
    "one message as prompt": ({"prompt": user("Hi"), "completion": said("Yo")}, shown("Hi", "Yo")),
    "prompt as Python text": ({"prompt": repr([user("Hi")]), "completion": "Yo"}, shown("Hi", "Yo")),
    "several turns of completion": (
        {"prompt": [user("a")], "completion": [said("b"), user("c"), said("d")]},
        shown("a", "b", "c", "d"),
    ),
    "ultrachat": (
        {"prompt": "Hi", "prompt_id": "7", "messages": [user("Hi"), said("Yo")]},
        shown("Hi", "Yo"),
    ),
    "names in capitals": ({"Prompt": "Hi", " completion ": "Yo"}, shown("Hi", "Yo")),
    "messages beside chosen and rejected": (
        {
            "prompt": "Hi",
            "messages": [user("Hi"), said("Yo")],
            "chosen": [user("Hi"), said("Yo")],
            "rejected": [user("Hi"), said("No")],
        },
        shown("Hi", "Yo"),
    ),
    "an input that the prompt was made of": (
        {
            "prompt": "### Input:\ncheese\n\n### Response:",
            "instruction": "cheese",
            "input": "cheese",
            "output": "fromage",
        },
        shown("### Input:\ncheese\n\n### Response:", "fromage"),
    ),
    "a context that the prompt was made of": (
        {"prompt": "Context: Bob did it. Question: Who?", "context": "Bob did it.", "response": "Bob"},
        shown("Context: Bob did it. Question: Who?", "Bob"),
    ),
    "an input that is a word of the instruction by chance": (
        {"instruction": "Is it a noun?", "input": "a", "output": "No"},
        shown("Is it a noun?\n\na", "No"),
    ),
    "instances": (
        {"instruction": "Add.", "instances": [{"input": "2 and 3", "output": "5"}]},
        shown("Add.\n\n2 and 3", "5"),
    ),
    "a solution beside what it arrives at": (
        {"problem": "2+2?", "solution": "Two and two are 4.", "answer": "4"},
        shown("2+2?", "Two and two are 4."),
    ),
    "json that is no conversation": ({"prompt": "List.", "completion": '[{"a": 1}]'}, shown("List.", '[{"a": 1}]')),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_read_from_the_layouts_people_have(file, name):
    row, expected = DEMONSTRATIONS[name]
    if expected == "facts":
        expected = shown("Who?\n\nOne.\n\nTwo.", "Bob", facts={"answer": "Bob"})
    assert load(Demonstration, file(row)).records == [expected]


PAIRS = {
    "question": ({"question": "Is it?", "chosen": "Yes.", "rejected": "No."}, pair(prompt("Is it?"))),
    "instruction, replies that begin alike": (
        {"instruction": "2+2?", "chosen": "Sure! 4.", "rejected": "Sure! 5."},
        pair(prompt("2+2?"), "Sure! 4.", "Sure! 5."),
    ),
    "orca": (
        {"system": "Be brief.", "question": "Is it?", "chosen": "Yes.", "rejected": "No."},
        pair(prompt("Is it?", system="Be brief.")),
    ),
    "instruction and input": (
        {"instruction": "Is it?", "input": "It.", "chosen": "Yes.", "rejected": "No."},
        pair(prompt("Is it?\n\nIt.")),
    ),
    "stack exchange": ({"question": "Is it?", "response_j": "Yes.", "response_k": "No."}, pair(prompt("Is it?"))),
    "context alone": ({"context": [user("Is it?")], "chosen": "Yes.", "rejected": "No."}, pair(prompt("Is it?"))),
    "votes on a transcript": (
        {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "response_a": " Yes.", "response_b": " No.", "choice": "A"},
        pair(prompt("Is it?")),
    ),
    "one of three winners": (
        {
            "prompt": "Is it?",
            "response_a": "No.",
            "response_b": "Yes.",
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        pair(prompt("Is it?")),
    ),
    "winner and loser": ({"prompt": "Is it?", "winner": "Yes.", "loser": "No."}, pair(prompt("Is it?"))),
    "sharegpt pair": (
        {
            "conversations": [{"from": "human", "value": "Is it?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        pair(prompt("Is it?")),
    ),
    "ultrafeedback binarised": (
        {
            "prompt": "Is it?",
            "chosen": [user("Is it?"), said("Yes.")],
            "rejected": [user("Is it?"), said("No.")],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        pair(prompt("Is it?")),
    ),
    "several turns": (
        {
            "prompt": [user("a")],
            "chosen": [said("b"), user("Is it?"), said("Yes.")],
            "rejected": [said("b"), user("Is it?"), said("No.")],
        },
        pair(prompt("a", "b", "Is it?")),
    ),
    "JSON text": (
        {
            "prompt": json.dumps([user("Is it?")]),
            "chosen": json.dumps([said("Yes.")]),
            "rejected": json.dumps([said("No.")]),
        },
        pair(prompt("Is it?")),
    ),
    "implicit JSON text": (
        {"chosen": json.dumps([user("Is it?"), said("Yes.")]), "rejected": json.dumps([user("Is it?"), said("No.")])},
        pair(prompt("Is it?")),
    ),
    "hh with the blank behind the last speaker": (
        {
            "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: Is it?\n\nAssistant:",
            "chosen": " Yes.",
            "rejected": " No.",
        },
        pair(prompt("a", "b", "Is it?")),
    ),
    "hh that repeats the prompt": (
        {
            "prompt": "\n\nHuman: Is it?\n\nAssistant:",
            "chosen": "\n\nHuman: Is it?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Is it?\n\nAssistant: No.",
        },
        pair(prompt("Is it?")),
    ),
    "hh begun by the assistant": (
        {
            "chosen": "\n\nAssistant: Hi.\n\nHuman: Is it?\n\nAssistant: Yes.",
            "rejected": "\n\nAssistant: Hi.\n\nHuman: Is it?\n\nAssistant: No.",
        },
        pair(Prompt(messages=(Message("assistant", "Hi."), Message("user", "Is it?")))),
    ),
    "hh with the line ends of Windows": (
        {
            "chosen": "\r\n\r\nHuman: Is it?\r\n\r\nAssistant: Yes.",
            "rejected": "\r\n\r\nHuman: Is it?\r\n\r\nAssistant: No.",
        },
        pair(prompt("Is it?")),
    ),
    "hh with single line breaks": (
        {"chosen": "Human: Is it?\nAssistant: Yes.", "rejected": "Human: Is it?\nAssistant: No."},
        pair(prompt("Is it?")),
    ),
    "ultrafeedback": (
        {
            "instruction": "Is it?",
            "completions": [{"response": "No.", "overall_score": 2.0}, {"response": "Yes.", "overall_score": 8.0}],
        },
        pair(prompt("Is it?")),
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Is it?\n\nAssistant: ",
            "answers": [{"answer": " Yes.", "rank": 1.0}, {"answer": "No.", "rank": 2.0}],
        },
        pair(prompt("Is it?")),
    ),
    "groups with rankings": (
        {"prompt": "Is it?", "responses": ["No.", "Yes."], "rankings": [2, 1]},
        pair(prompt("Is it?")),
    ),
    "groups with mean ranks": (
        {"prompt": "Is it?", "responses": ["No.", "Yes."], "mean_ranks": [2.0, 1.0]},
        pair(prompt("Is it?")),
    ),
    "multiple choice": (
        {"input": "Is it?", "targets": {"choices": ["Yes.", "No."], "labels": [1, 0]}},
        pair(prompt("Is it?")),
    ),
    "shp": (
        {"history": "Is it?", "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 0, "score_A": 2, "score_B": 10},
        pair(prompt("Is it?")),
    ),
    "webgpt": (
        {"question": {"full_text": "Is it?"}, "answer_0": "No.", "answer_1": "Yes.", "score_0": -1, "score_1": 1},
        pair(prompt("Is it?")),
    ),
    "votes": ({"prompt": "Is it?", "response_a": "No.", "response_b": "Yes.", "choice": "B"}, pair(prompt("Is it?"))),
    "a label of the sides": (
        {"prompt": "Is it?", "response_a": "Yes.", "response_b": "No.", "label": "a"},
        pair(prompt("Is it?")),
    ),
    "numbered outputs": (
        {"input": "Is it?", "output_1": "No.", "output_2": "Yes.", "label": 2},
        pair(prompt("Is it?")),
    ),
    "a probability of the second": (
        {"instruction": "Is it?", "output_1": "Yes.", "output_2": "No.", "preference": 1.25},
        pair(prompt("Is it?"), label=0.75),
    ),
    "below zero is the first": (
        {"context": [user("Is it?")], "response1": "Yes.", "response2": "No.", "overall_preference": -1},
        pair(prompt("Is it?")),
    ),
    "above zero is the second": (
        {"context": [user("Is it?")], "response1": "No.", "response2": "Yes.", "overall_preference": 1},
        pair(prompt("Is it?")),
    ),
    "preferred and other output of an input": (
        {
            "input": {"messages": [user("Is it?")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said("Yes.")],
            "non_preferred_output": [said("No.")],
        },
        pair(prompt("Is it?")),
    ),
    "better of two by its number": (
        {"prompt": "Is it?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1},
        pair(prompt("Is it?")),
    ),
    "the first model by its number": (
        {"prompt": "Is it?", "response_a": "Yes.", "response_b": "No.", "winner": "model_1"},
        pair(prompt("Is it?")),
    ),
    "the second model by its number": (
        {"prompt": "Is it?", "response_a": "No.", "response_b": "Yes.", "winner": "model_2"},
        pair(prompt("Is it?")),
    ),
    "the name of the first model": (
        {
            "prompt": "Is it?",
            "response_a": "Yes.",
            "response_b": "No.",
            "model_a": "m-1",
            "model_b": "m-2",
            "winner": "m-1",
        },
        pair(prompt("Is it?")),
    ),
    "arena": (
        {
            "conversation_a": [user("Is it?"), said("Yes.")],
            "conversation_b": [user("Is it?"), said("No.")],
            "winner": "model_a",
        },
        pair(prompt("Is it?")),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_pairs_are_read_from_the_layouts_people_have(file, name):
    row, expected = PAIRS[name]
    assert load(PreferencePair, file(row)).records == [expected]


@pytest.mark.parametrize(
    ("label", "up"),
    [(True, True), (1, True), (0, False), (1.0, True), ("True", True), ("false", False), ("good", True), ("bad", False),
     ("yes", True), ("no", False), ("👍", True), ("thumbs_down", False), (-1, False)],
)  # fmt: skip
@pytest.mark.parametrize("column", ["label", "kto_tag", "is_correct", "Feedback"])
def test_a_thumb_is_read_in_every_spelling_and_not_imitated(file, label, up, column):
    path = file({"prompt": "Hi", "completion": "Yo", column: label})
    assert load(LabelledResponse, path).records == [LabelledResponse(prompt=prompt("Hi"), response="Yo", label=up)]
    with pytest.raises(DataError, match="thumbs up or down") as caught:
        load(Demonstration, path)
    assert f"data.jsonl?ignore={column}" in caught.value.fix
    assert load(Demonstration, f"{path}?ignore={column}").records == [shown("Hi", "Yo")]


def test_a_conversation_with_a_thumb_is_a_labelled_reply(file):
    path = file({"messages": [user("Hi"), said("Yo")], "label": 0})
    assert load(LabelledResponse, path).records == [LabelledResponse(prompt=prompt("Hi"), response="Yo", label=False)]


@pytest.mark.parametrize("labels", [[True, False], [1, 0], ["+", "-"], ["true", "false"], [1.0, 0.0]])
def test_step_labels_are_read_in_every_spelling(file, labels):
    (found,) = load(SteppedResponse, file({"prompt": "Hi", "completions": ["a", "b"], "labels": labels})).records
    assert found == SteppedResponse(prompt=prompt("Hi"), steps=("a", "b"), labels=(True, False))


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


def test_a_system_turn_within_the_prompt_or_the_replies_is_read(file):
    request = {"model": "m", "system": "Brief.", "messages": [user("Hi")]}
    for asked in (request, json.dumps(request)):
        found = load(Demonstration, file({"prompt": asked, "completion": "Yo"})).records
        assert found == [Demonstration(prompt=prompt("Hi", system="Brief."), response="Yo")]
    sides = {name: {"system": "Brief.", "messages": [user("Is it?"), said(reply)]}
             for name, reply in (("chosen", "Yes."), ("rejected", "No."))}  # fmt: skip
    assert load(PreferencePair, file(sides)).records == [pair(prompt("Is it?", system="Brief."))]
    with pytest.raises(DataError, match="part at turn 1, before the last reply"):
        load(PreferencePair, file(sides | {"rejected": {**sides["rejected"], "system": "Rude."}}))


def test_the_columns_beside_a_prompt_with_messages_are_facts_of_it(file):
    [found] = load(Prompt, file({"prompt": {"messages": [user("2+2?")]}, "answer": "4"})).records
    assert found == prompt("2+2?", facts={"answer": "4"})


def test_the_answer_beside_a_solution_is_a_fact_of_the_prompt(file):
    [found] = load(Prompt, file({"problem": "2+2?", "solution": "Two and two are 4.", "answer": "4"})).records
    assert found.facts == {"solution": "Two and two are 4.", "answer": "4"}


def test_every_column_beside_the_prompt_is_a_fact_of_it(file):
    row = {"prompt": "1+1?", "completion": "It is 2.", "answer": "2", "level": 3}
    assert load(Prompt, file(row)).records == [
        prompt("1+1?", facts={"completion": "It is 2.", "answer": "2", "level": 3})
    ]


def test_turns_marked_as_not_to_be_learnt_are_kept_apart(file):
    turns = [user("a"), said("b", weight=0), user("c"), said("d", weight=1)]
    (found,) = load(Demonstration, file({"messages": turns})).records
    assert found == Demonstration(prompt=prompt("a", "b", "c"), response="d", untrained_turns=(0,))


@pytest.mark.parametrize(
    ("row", "untrained"),
    [
        ({"history": [["a", "b"]], "messages": [user("c"), said("d", weight=0), user("e"), said("f")]}, (1,)),
        ({"history": [user("a"), said("b", weight=0)], "prompt": "c", "completion": "d"}, (0,)),
        ({"history": [user("a"), said("b", weight=0)], "question": "c", "answer": "d"}, (0,)),
        ({"prompt": [user("a"), said("b", weight=0), user("c")], "completion": "d"}, (0,)),
        ({"prompt": {"messages": [user("a"), said("b", train=False), user("c")]}, "completion": "d"}, (0,)),
        ({"prompt": json.dumps([user("a"), said("b", weight=0), user("c")]), "completion": [said("d")]}, (0,)),
        (
            {
                "history": [["a", "b"]],
                "prompt": [user("c"), said("d", weight=0), user("e")],
                "completion": [said("f"), user("g"), said("h", weight=0), user("i"), said("j")],
            },
            (1, 3),
        ),
    ],
)
def test_turns_not_to_be_learnt_are_counted_from_the_first_turn_of_all_columns(file, row, untrained):
    (found,) = load(Demonstration, file(row)).records
    assert found.untrained_turns == untrained


def test_what_is_not_used_is_named(file):
    row = {"messages": [{**user("a"), "name": "Ann"}, said("b")], "source": "x", "model_size": 3, "empty": None}
    assert set(load(Demonstration, file(row)).unused) == {"messages[].name", "source", "model_size"}


@pytest.mark.parametrize(
    ("kind", "row", "unused"),
    [
        (Demonstration, {"messages": json.dumps([{**user("a"), "name": "Ann"}, said("b")])}, {"messages[].name"}),
        (
            Demonstration,
            {"messages": [user([{"type": "text", "text": "a", "cache_control": "x"}]), said("b")]},
            {"messages[].content[].cache_control"},
        ),
        (
            Demonstration,
            {"prompt": {"messages": [user("a")], "model": "m"}, "completion": said("b", seconds=1)},
            {"prompt.model", "completion[].seconds"},
        ),
        (
            PreferencePair,
            {
                "prompt": "a",
                "completions": [
                    {"response": "b", "rating": 2, "custom_system_prompt": "Be a pirate."},
                    {"response": "c", "rating": 1, "principle": "honesty"},
                ],
            },
            {"completions[].custom_system_prompt", "completions[].principle"},
        ),
        (
            Demonstration,
            {"instruction": "a", "instances": [{"input": "b", "output": "c", "constraints": "One word."}]},
            {"instances[].constraints"},
        ),
    ],
)
def test_fields_within_columns_that_are_not_used_are_named(file, kind, row, unused):
    assert set(load(kind, file(row)).unused) == unused


def test_the_kinds_of_a_source_are_those_of_its_layout(file):
    assert kinds_of(file({"prompt": "a", "completion": "b", "label": 1}))[0] is LabelledResponse
    assert kinds_of(file({"chosen": "a b", "rejected": "a c"}))[0] is PreferencePair
