from __future__ import annotations

import json

import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, Message, Prompt
from trimtab.data.layouts import load
from trimtab.data.questions import further_turns

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."], "reference": ["r"]}


@pytest.fixture
def file(tmp_path):
    """A function that writes rows to a file."""

    def write(*rows):
        path = tmp_path / "question.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def test_a_question_of_two_turns_is_its_first_turn_with_the_others_among_its_facts(file):
    loaded = load(Prompt, file(QUESTION))
    (found,) = loaded.records
    assert loaded.layout == "questions of several turns"
    assert found.messages == (Message("user", "Compose a post."),)
    assert found.facts["question_id"] == 81
    assert further_turns(found) == ("Rewrite it.",)


def test_turns_with_content_and_questions_of_one_turn_are_read(file):
    rows = [{"question_id": "q", "turns": [{"content": "One?"}, {"content": "Two?"}]}]
    (found,) = load(Prompt, file(*rows)).records
    assert (found.text, further_turns(found)) == ("One?", ("Two?",))
    (found,) = load(Prompt, file(QUESTION | {"turns": ["Human: hi\n\nAssistant: x"]})).records
    assert found.text == "Human: hi\n\nAssistant: x"  # a text of a file of turns is no transcript
    assert further_turns(found) == ()


def test_questions_of_arena_hard_are_prompts(file):
    (found,) = load(Prompt, file({"uid": "u", "category": "c", "cluster": "k", "prompt": "Use ABC."})).records
    assert (found.text, found.facts["uid"]) == ("Use ABC.", "u")
    assert further_turns(found) == ()


def test_facts_of_another_meaning_are_no_turns():
    message = (Message("user", "Hi"),)
    for turns in (3, ["Bye"], ["Hi", 4], []):
        assert further_turns(Prompt(messages=message, facts={"turns": turns})) == ()


@pytest.mark.parametrize("turns", [["", "b"], ["a", None]])
def test_turns_without_text_are_refused_with_their_row(file, turns):
    with pytest.raises(DataError, match="turns is") as refused:
        load(Prompt, file(QUESTION, QUESTION | {"turns": turns}))
    assert "row 2" in refused.value.where
    assert "list of texts" in refused.value.fix


def test_questions_hold_no_replies(file):
    with pytest.raises(DataError, match="questions of several turns"):
        load(Demonstration, file(QUESTION))
