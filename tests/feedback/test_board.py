"""The board, the simulated crowd, and projects as a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.feedback.conftest import Make
from tests.feedback.projects import A, add, answer_next, item, make_project, person
from trimtab.core.errors import DataError
from trimtab.core.types import PreferencePair
from trimtab.data.layouts import load
from trimtab.feedback import items
from trimtab.feedback.board import disagreements, make_board
from trimtab.feedback.project import load_project
from trimtab.feedback.simulate import simulate
from trimtab.feedback.store import open_store, verify


def test_simulated_annotators_vote_as_people_do(make: Make):
    store = make({"data": ["world:helpdesk?num=24"], "assignment": {"overlap": 3}})
    from trimtab.feedback.importing import seed_items

    seed_items(store)
    assert seed_items(store) == {}
    counts = simulate(store, num_annotators=4, agreement=0.7)
    board = make_board(store)
    assert board.counts["answers"] == counts["answers"] == board.counts["answers_wanted"]
    assert board.study is not None
    raw = board.study.coefficients[0].interval
    assert raw.low < 0.7 < raw.high
    assert board.left.low < 0.5 < board.left.high
    assert json.dumps(board.to_dict())
    with store.read() as connection:
        ranked = disagreements(connection)
    assert ranked[0]["disagreement"] >= ranked[-1]["disagreement"] > 0
    assert verify(store) == []


def test_simulated_annotators_say_what_they_need(small: Make):
    store = small()
    add(store, 2)
    with pytest.raises(DataError, match="does not say which replies are right"):
        simulate(store, num_annotators=2)


def test_the_board_of_an_empty_project_says_nothing_wrong(small: Make):
    board = make_board(small())
    assert board.study is None
    assert board.counts["answers"] == 0
    assert json.dumps(board.to_dict())


def test_gold_accuracy_and_remarks_are_on_the_board(small: Make):
    store = small({"assignment": {"gold_rate": 0.5}})
    add(store, 40)
    items.add_items(store, [("g", item(i, purpose="gold", gold={"choice": "B"})) for i in range(100, 110)])
    ann = person(store, "Ann")
    for _ in range(26):
        answer_next(store, ann, A)
    (row,) = make_board(store).rows
    assert (row.gold.value, row.gold.count) == (0.0, 10)
    assert any("gold items right only 0 of 10" in flag for flag in row.flags)


def test_the_shipped_project_is_read():
    project = load_project(Path(__file__).parents[2] / "examples" / "feedback" / "project.toml")
    assert project.settings.task.scale == 4
    assert project.guideline_text().startswith("# How to judge")


def test_a_source_that_is_no_project_is_refused(tmp_path: Path):
    project = make_project(tmp_path)
    with pytest.raises(DataError, match="no split is called"):
        load(PreferencePair, f"feedback:{project}?split=test")
    with pytest.raises(DataError, match="no option"):
        load(PreferencePair, f"feedback:{project}?seed=1")
    open_store(project).close()
    with pytest.raises(DataError, match="has no PreferencePair yet"):
        load(PreferencePair, f"feedback:{project}")
