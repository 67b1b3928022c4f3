"""Layouts that people have: each is read as what it means."""

from __future__ import annotations

import json

import pytest

from tests.data.records import pair, prompt, said, shown, user
from trimtab.core.errors import DataError
from trimtab.core.types import (
    Demonstration,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    SteppedResponse,
)
from trimtab.data.layouts import kinds_of, load

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
