"""Columns that few rows fill in, or that begin late in a file, mean what they would in every row."""

from __future__ import annotations

import pytest

from tests.data.records import CALL, REPLY
from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, Prompt
from trimtab.data.layouts import load


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", "down", "label is 'down': it judges the replies"),
        ("rating", 1, "rating is 1: it judges the replies"),
        ("question", "Which one is it?", "question holds 'Which one is it"),
        ("output", "No", "two columns may be the reply"),
    ],
)
def test_what_few_rows_fill_in_says_no_less_of_those(file, column, value, message):
    """The columns that half of the rows have say the layout; a thumb is often given to one reply in ten."""
    rows = [{"prompt": f"Question {i}?", "completion": "Yo"} for i in range(9)]
    path = file(*rows, {"prompt": "Is it?", "completion": "Yes", column: value})
    with pytest.raises(DataError, match=message) as error:
        load(Demonstration, path)
    assert f"{path}?ignore={column}" in error.value.fix
    assert len(load(Demonstration, f"{path}?ignore={column}").records) == 10


REPLIES = [{"prompt": f"Question {i}?", "completion": "Yo", "liked": "", "system": ""} for i in range(1001)]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", False, "label is False: it judges the replies"),
        ("liked", "no", "liked is 'no': it judges the replies"),
        ("Rating", 1, "Rating is 1: it judges the replies"),
        ("question", "Which one is it?", "question holds 'Which one is it"),
        ("output", "No", "two columns may be the reply"),
        ("Weight", 0, "weight is 0"),
        ("Tools", CALL, "tools holds"),
    ],
)
def test_a_column_that_begins_late_in_a_file_says_no_less(file, column, value, message):
    """The first thousand rows show the layout."""
    path = file(*REPLIES, {"prompt": "Is it?", "completion": "Yes", column: value})
    with pytest.raises(DataError, match=message) as error:
        load(Demonstration, path)
    assert error.value.where == f"{path}, row 1002"
    assert f"{path}?ignore={column}" in error.value.fix
    assert len(load(Demonstration, f"{path}?ignore={column}").records) == 1002


def test_columns_of_the_prompt_that_begin_late_in_a_file_are_used(file):
    path = file(*REPLIES, REPLY | {"system": "Be brief.", "input": "Yo?"}, REPLY | {"System": "Be rude.", "lang": "en"})
    loaded = load(Demonstration, path)
    assert [m.content for m in loaded.records[1001].prompt.messages] == ["Be brief.", "Hi\n\nYo?"]
    assert [m.content for m in loaded.records[1002].prompt.messages] == ["Be rude.", "Hi"]
    assert loaded.unused == ("lang",)
    assert load(Prompt, path).records[1002].facts == {"completion": "Yo", "lang": "en"}


def test_an_empty_column_of_the_prompt_is_no_fact_of_it(file):
    [found] = load(Prompt, file({"prompt": "Hi", "input": "", "answer": "4"})).records
    assert found.facts == {"answer": "4"}
