"""What a person is told of their own progress is true, and does not tell which items are hidden checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from tests.feedback.projects import BAD, TIE, A, B, add, answer_next, answered, item, lease, person
from trimtab.core.types import Comparison
from trimtab.data.layouts import load
from trimtab.feedback import items, people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.exporting import export
from trimtab.feedback.progress import counts, progress_of
from trimtab.feedback.store import Store
from trimtab.feedback.voting import reopen, undo, vote

HOUR = 3600.0


def progress(store: Store, someone: people.Person):
    with store.read() as connection:
        return progress_of(store, connection, people.by_id(connection, someone.id))


def test_changes_skips_and_undone_answers_are_no_further_answers(make: Make):
    store = make()
    add(store, 4)
    ann = person(store, "Ann")
    first = answer_next(store, ann)
    assert first is not None
    store.clock.seconds += 30 * HOUR
    for choice in ("B", "A"):
        given = reopen(store, ann, _newest(store))
        assert progress(store, ann).answered == 1  # it stands while it is changed
        vote(store, ann, given.token, Answer(choice=choice, strength=1))
    answer_next(store, ann, Answer(choice="skip"))
    answer_next(store, ann)
    undo(store, ann)
    answer_next(store, ann, B)
    found = progress(store, ann)
    assert (found.answered, found.today) == (2, 2)
    store.clock.seconds += 25 * HOUR
    answer_next(store, ann)
    found = progress(store, ann)
    assert (found.answered, found.today) == (3, 1)


def _newest(store: Store) -> int:
    with store.read() as connection:
        return int(connection.execute(sa.select(sa.func.max(t.votes.c.id))).scalar_one())


def test_an_answer_that_is_being_changed_is_one_answer_of_the_project(make: Make):
    store = make()
    add(store, 1)
    ann = person(store, "Ann")
    answer_next(store, ann)
    reopen(store, ann, _newest(store))
    with store.read() as connection:
        found = counts(connection)
    assert (found["answers"], found["in_hand"]) == (1, 0)


def test_the_count_of_what_is_left_does_not_tell_hidden_items(small: Make):
    """With an exact count, a hidden item is the one before which the count stands still."""
    store = small({"assignment": {"gold_rate": 0.5}})
    add(store, 30)
    items.add_items(store, [("g", item(i, purpose="gold", gold={"choice": "A"})) for i in range(100, 130)])
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    told = same = 0
    before = None
    for _ in range(40):
        token = ann.lease()
        shown = re.search(r"<span>(\d+) done(.*?)</span>", ann.text)
        assert shown
        with store.read() as connection:
            purpose = connection.execute(sa.select(t.leases.c.purpose).where(t.leases.c.token == token)).scalar_one()
        left = re.search(r"(\d+) to go", shown[2])
        same += before is not None and left is not None and left[1] == before
        told += before is not None and left is not None and left[1] == before and purpose == "gold"
        before = left[1] if left else None
        ann.post(f"/task/{token}", position="1")
    assert 10 < told < 0.75 * same  # standing still is what the count does most of the time, before either kind


def test_the_count_is_exact_where_nothing_is_hidden(small: Make):
    store = small()
    add(store, 13)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    for left in (13, 12, 11):
        token = ann.lease()
        assert f"· {left} to go" in ann.text
        ann.post(f"/task/{token}", position="1")


def test_votes_that_are_no_comparison_are_counted(small: Make):
    store = small({"assignment": {"overlap": 5}})
    add(store, 1)
    answered(store, A, B, TIE, BAD, Answer(choice="cannot_judge"))
    for layout, num in (("comparisons", 3), ("preference", 0)):
        counted = export(store, layout).card["counts"]
        assert (counted["votes"], counted["dropped_both_bad_votes"], counted["not_judged"]) == (4, 1, 1)
        assert counted["rows"] == num
    loaded = load(Comparison, f"feedback:{store.project.path}")
    assert (len(loaded.records), loaded.counts["dropped_both_bad_votes"]) == (3, 1)


@pytest.mark.parametrize("original", ["Hello.\n", " Hello.", "Hello.\r\n\r\nBye.", "Hello."])
def test_a_reply_that_was_only_confirmed_is_no_preference(small: Make, original: str):
    store = small({"task": {"kind": "edit"}})
    new = items.NewItem(kind="edit", prompt=item(1).prompt, replies=(items.NewReply(text=original),))
    items.add_items(store, [("row", new)])
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    token = ann.lease()
    ann.post(f"/task/{token}", text=original.replace("\r\n", "\n").replace("\n", "\r\n"))  # as browsers send it
    assert export(store, "preference").rows == []
    (row,) = export(store, "sft").rows
    assert row["messages"][-1]["content"] == original.replace("\r\n", "\n").strip()


def test_a_reply_too_long_to_be_edited_is_refused_before_anybody_loses_half_of_it(small: Make, tmp_path: Path):
    store = small({"task": {"kind": "edit"}})
    long = items.NewItem(kind="edit", prompt=item(1).prompt, replies=(items.NewReply(text="a" * 50_001),))
    with pytest.raises(Exception, match="50001 letters to edit"):
        items.add_items(store, [("row 1", long)])
    assert lease(store, person(store, "Ann")) is None
