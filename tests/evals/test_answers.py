from __future__ import annotations

import json

import pytest

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Message, Prompt
from trimtab.evals.answers import answer_rows, arena_hard_row, fastchat_row, read_answers

FASTCHAT = {"question_id": 81, "answer_id": "x", "model_id": "mine", "choices": [{"index": 0, "turns": ["a", "b"]}]}
ARENA = {
    "uid": "u",
    "ans_id": "x",
    "model": "mine",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": "a"}}],
}
TALK = [("Compose.", "A post."), ("Rewrite.", "")]


def prompt(**facts):
    return Prompt(messages=(Message("user", "Compose."),), facts=facts)


@pytest.fixture
def read(tmp_path):
    """A function that writes rows to a file and reads it as answers."""

    def write_and_read(*rows):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_answers([path])

    return write_and_read


@pytest.mark.parametrize(
    ("row", "key", "turns"),
    [
        (FASTCHAT, ("81", "mine"), ("a", "b")),
        (FASTCHAT | {"choices": [{"turns": [{"content": "a", "token_len": 1}]}]}, ("81", "mine"), ("a",)),
        (ARENA, ("u", "mine"), ("a",)),
        (ARENA | {"messages": [{"role": "assistant", "content": "plain"}]}, ("u", "mine"), ("plain",)),
    ],
)
def test_answers_are_read_in_each_layout(read, row, key, turns):
    assert read(row, row).turns == {key: turns}


def test_a_folder_of_answers_holds_all_models(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(FASTCHAT | {"model_id": name}) + "\n", encoding="utf-8")
    assert set(read_answers([tmp_path]).turns) == {("81", "one"), ("81", "two")}


@pytest.mark.parametrize(
    ("rows", "problem", "where", "fix"),
    [
        ([{"question_id": 81, "text": "a"}], "a row that is no answer", "row 1", "choices"),
        ([FASTCHAT | {"choices": []}], "choices[0].turns is None", "row 1", "answer the question again"),
        (
            [FASTCHAT, FASTCHAT | {"question_id": 2, "choices": [{"turns": [None]}]}],
            "turns is [None]",
            "row 2",
            "again",
        ),
        ([ARENA | {"messages": [{"role": "assistant", "content": None}]}], "messages is", "row 1", "again"),
        ([FASTCHAT | {"model_id": ""}], "an answer of ''", "row 1", "the model"),
        ([FASTCHAT, FASTCHAT | {"choices": [{"turns": ["c"]}]}], "a second, different answer", "row 1 and", "remove"),
    ],
)
def test_bad_rows_are_refused(read, rows, problem, where, fix):
    with pytest.raises(DataError) as refused:
        read(*rows)
    assert problem in refused.value.problem
    assert where in refused.value.where
    assert fix in refused.value.fix


@pytest.mark.parametrize("layout", ["fastchat", "arena_hard"])
def test_answers_that_are_written_are_read_back(read, layout):
    rows = list(answer_rows(layout, "mine", [(prompt(question_id=81), [TALK]), (prompt(uid="u"), [TALK])]))
    assert read(*rows).turns == {("81", "mine"): ("A post.", ""), ("u", "mine"): ("A post.", "")}


def test_rows_have_the_fields_of_their_benchmark():
    row = fastchat_row(prompt(question_id=81), "mine", [TALK, TALK])
    assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert row["question_id"] == 81
    assert row["choices"][1] == {"index": 1, "turns": ["A post.", ""]}
    assert len(row["answer_id"]) == 22
    row = arena_hard_row(prompt(uid="u", question_id=3), "mine", [TALK])
    assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp"]
    assert row["messages"][:2] == [
        {"role": "user", "content": "Compose."},
        {"role": "assistant", "content": {"answer": "A post."}},
    ]


def test_what_a_layout_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="does not name its question"):
        fastchat_row(prompt(), "mine", [TALK])
    with pytest.raises(ConfigError, match="2 replies to a prompt"):
        arena_hard_row(prompt(uid="u"), "mine", [TALK, TALK])
