"""Tasks by mouse and touch in a real browser: what is chosen without the keyboard is what is stored."""

from __future__ import annotations

import pytest

from tests.feedback.at_a_browser import Person, votes
from tests.feedback.conftest import Start
from tests.feedback.projects import item

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cheap_passwords() -> None:
    """Not here: the server hashes as it does for everyone."""


def test_a_ranking_by_its_lists_may_begin_with_any_place(browser, start: Start):
    """On a phone and for an adjudicator: a place that is chosen stays chosen, whatever is chosen before or after."""
    server = start({"task": {"kind": "ranking"}}, [item(i, kind="ranking", num=3) for i in range(2)])
    boss = Person(browser, server)
    boss.join(server.links[0], "Boss")
    boss.page.goto(f"{server.address}/admin/adjudicate/1")
    decided = boss.shown()
    _choose_places(boss, "2", "1", "3")
    boss.page.select_option("select[name=taxonomy]", "bad data")
    boss.page.click("button:has-text('Decide')")
    boss.page.wait_for_selector("h1:has-text('Adjudicate')")
    boss.page.goto(f"{server.address}/task")
    boss.begin()
    shown = boss.shown()
    _choose_places(boss, "3", "1")
    with boss.page.expect_response("**/draft/**"):
        boss.page.select_option("select[name=rank_2]", "2")
    assert boss.page.inner_text("#ranking") == "2 > 3 > 1"
    boss.page.reload()
    assert boss.page.inner_text("#ranking") == "2 > 3 > 1"
    boss.answer("Enter")
    for purpose, texts, order in (("adjudication", decided, (1, 0, 2)), ("task", shown, (1, 2, 0))):
        (cast,) = votes(server, purposes=(purpose,))
        assert [cast.replies[place]["text"] for (place,) in cast.answer.ranking] == [texts[i] for i in order]
    assert boss.wrong == []


def _choose_places(person: Person, *places: str) -> None:
    for i, place in enumerate(places):
        person.page.select_option(f"select[name=rank_{i}]", place)
        assert person.page.input_value(f"select[name=rank_{i}]") == place


def test_the_buttons_mark_the_step_that_was_touched(browser, start: Start):
    server = start({"task": {"kind": "steps"}}, [item(i, kind="steps", num=4) for i in range(2)])
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    for i in (0, 1):
        ann.page.check(f"input[name=step_{i}][value=right]")
    ann.page.click("[data-step='2']")
    ann.page.click("[data-mark=first]")
    ann.answer("Enter")
    assert [c.answer.steps for c in votes(server)] == [(1, 1, -1, None)]
    assert ann.wrong == []
