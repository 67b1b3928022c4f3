"""Every layout that the data page shows is taken as items, and votes in the spellings of others are votes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from tests.feedback.conftest import Make
from tests.feedback.projects import make_project, make_store, write
from trimtab.core.errors import DataError
from trimtab.feedback import tables as t
from trimtab.feedback.command_line import add_to
from trimtab.feedback.importing import Options, import_source
from trimtab.feedback.votes import cast_votes

DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"
KIND_OF = {
    "Demonstration": ("rating", "edit", "demonstration"),
    "PreferencePair": ("pairs", "ranking"),
    "LabelledResponse": ("rating",),
    "RatedResponse": ("rating",),
    "SteppedResponse": ("steps",),
    "Prompt": ("demonstration",),
}


def blocks() -> list[tuple[str, str]]:
    """The examples of the page: the record that each is for, and its rows."""
    return re.findall(r"```jsonl (\w+)\n(.*?)```", DATA_PAGE.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize(("record", "rows"), [pytest.param(r, b, id=f"{r}-{i}") for i, (r, b) in enumerate(blocks())])
def test_every_layout_of_the_data_page_gives_items(tmp_path: Path, record: str, rows: str):
    path = tmp_path / "rows.jsonl"
    neutral = "?neutral=right" if '"labels": [-1' in rows or '"rating": -1' in rows else ""
    path.write_text(rows, encoding="utf-8")
    for kind in KIND_OF[record]:
        folder = tmp_path / kind
        folder.mkdir()
        store = make_store(folder, {"task": {"kind": kind}})
        counts = import_source(store, f"{path}{neutral}", Options(on_bad_row="drop"))
        with store.read() as connection:
            found = connection.execute(sa.select(t.items)).all()
        assert counts["added"] == len(found) > 0
        for row in found:
            assert all(message["content"] for message in row.prompt["messages"])
            assert all(reply["text"].strip() for reply in row.replies)
        store.close()


def replies(store: Any) -> list[tuple[str, set[str]]]:
    with store.read() as connection:
        rows = connection.execute(sa.select(t.items)).all()
    return [(row.prompt["messages"][-1]["content"], {reply["text"] for reply in row.replies}) for row in rows]


def test_trees_give_the_replies_to_each_turn(small: Make, tmp_path: Path):
    rows = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi", "rank": None},
        *(
            {"message_id": str(i), "parent_id": "1", "role": "assistant", "text": f"r{i}", "rank": i - 2}
            for i in (2, 3, 4)
        ),
    ]
    path = write(tmp_path / "trees.jsonl", rows)
    store = small({"task": {"kind": "ranking"}})
    import_source(store, path)
    assert replies(store) == [("Hi", {"r2", "r3", "r4"})]
    with pytest.raises(DataError, match="--gold"):
        import_source(store, path, Options(purpose="gold"))


def test_lists_of_replies_keep_what_is_said_of_each(small: Make, tmp_path: Path):
    said = [{"response": "Moon.", "model": "m"}, {"response": "No.", "model": "n"}]
    row = {"instruction": "Tides?", "completions": said}
    store = small()
    import_source(store, write(tmp_path / "rows.jsonl", [row]))
    with store.read() as connection:
        (found,) = connection.execute(sa.select(t.items.c.replies)).scalars()
    assert {reply["text"]: reply["source"]["model"] for reply in found} == {"Moon.": "m", "No.": "n"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("model_a", "A"), ("model_b", "B"), ("tie", "tie"), ("tie (bothbad)", "both_bad")], "winner"),
        ([("first", "A"), ("second", "B"), ("[[A]]", "A"), ("both bad", "both_bad")], "choice"),
        ([("gpt", "A"), ("llama", "B"), ("", None)], "winner"),
    ],
)
def test_votes_in_the_spellings_of_others(small: Make, tmp_path: Path, rows: list, said: str):
    path = write(
        tmp_path / "votes.jsonl",
        [
            {"question": f"q{i}", "answer_a": "x", "answer_b": "y", said: choice, "annotator": "ann"}
            | {"model_a": "gpt", "model_b": "llama"}
            for i, (choice, _) in enumerate(rows)
        ],
    )
    store = small()
    counts = import_source(store, path, Options(with_votes=True))
    with store.read() as connection:
        found = {c.prompt["messages"][0]["content"]: c.answer.choice for c in cast_votes(connection)}
    expected = {f"q{i}": choice for i, (_, choice) in enumerate(rows) if choice is not None}
    assert found == expected
    assert counts["not_judged"] == len(rows) - len(expected)


def test_a_number_counts_the_replies_as_their_columns_do(small: Make, tmp_path: Path):
    asked = {"response_1": "x", "response_2": "y", "annotator": "a"}
    rows = [{"prompt": f"p{i}", "preference": i} | asked for i in (1, 2)]
    store = small()
    import_source(store, write(tmp_path / "votes.jsonl", rows), Options(with_votes=True))
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["A", "B"]
    unclear = [{"prompt": "p", "response_a": "x", "response_b": "y", "choice": 1, "annotator": "a"}]
    with pytest.raises(DataError, match="the choice 1"):
        import_source(store, write(tmp_path / "unclear.jsonl", unclear), Options(with_votes=True))


def test_a_gold_item_may_have_its_choice_in_another_spelling(small: Make, tmp_path: Path):
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "model_b"}
    store = small()
    import_source(store, write(tmp_path / "gold.jsonl", [row]), Options(purpose="gold"))
    with store.read() as connection:
        assert connection.execute(sa.select(t.items.c.gold)).scalar_one() == {"choice": "B"}


def test_what_a_prompts_file_said_of_its_items_is_theirs(small: Make, tmp_path: Path):
    prompt = {"messages": [{"role": "user", "content": "p"}], "id": "7"}
    prompt["facts"] = {"author": "Ann", "sensitive": True, "slice": "s", "topic": "tea"}
    store = small()
    import_source(store, write(tmp_path / "samples.jsonl", [{"prompt": prompt, "response": text} for text in "xy"]))
    with store.read() as connection:
        row = connection.execute(sa.select(t.items, t.queue.c.author).join(t.queue)).one()
    assert (row.author, row.sensitive, row.slice) == ("Ann", True, "s")
    assert row.prompt["facts"] == {"topic": "tea"}  # from where nobody could delete a name
    assert "Ann" not in json.dumps(row.prompt)


def test_two_columns_of_one_meaning_are_refused_where_both_are_filled(small: Make, tmp_path: Path):
    rows = [{"question": f"q{i}", "response_a": "x", "response_b": "y"} for i in range(4)]
    rows[3]["prompt"] = "another"
    with pytest.raises(DataError, match="is read as 'prompt'"):
        import_source(small(), write(tmp_path / "rows.jsonl", rows))


def test_a_limit_counts_the_prompts_that_a_model_answers(tmp_path: Path):
    """Each prompt has several samples, all of which are compared."""

    def sample(*, data: str, limit: int, num_samples: int, out: Path, **_: Any) -> None:
        prompts = [
            {"messages": [{"role": "user", "content": f"{data} {i}"}], "id": "", "facts": {}} for i in range(limit)
        ]
        rows = [{"prompt": prompt, "response": f"r{k}"} for prompt in prompts for k in range(num_samples)]
        write(out, rows)

    group = click.Group()
    add_to(group)
    project = make_project(tmp_path, {"task": {"kind": "ranking"}})
    words = ["import", str(project), "prompts.jsonl", "--model", "m", "--limit", "3", "--num-samples", "4"]
    result = CliRunner().invoke(group, words, obj=sample)
    assert "12 rows" in result.output, result.output
    assert "3 added" in result.output


def test_which_reply_of_a_tree_was_best_cannot_be_told_from_the_item(small: Make, tmp_path: Path):
    rows = []
    for i in range(100):
        rows.append({"message_id": f"{i}", "parent_id": None, "role": "prompter", "text": f"q{i}"})
        rows += [
            {"message_id": f"{i}-{k}", "parent_id": f"{i}", "role": "assistant", "text": f"{said} {i}", "rank": k}
            for k, said in enumerate(("good", "bad"))
        ]
    store = small()
    import_source(store, write(tmp_path / "trees.jsonl", rows))
    with store.read() as connection:
        first = [found[0]["text"] for found in connection.execute(sa.select(t.items.c.replies)).scalars()]
    assert len(first) == 100
    assert 30 < sum(text.startswith("good") for text in first) < 70
