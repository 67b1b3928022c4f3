"""Leases never over-collect, sides are balanced, policies say with which probability they chose."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from tests.feedback.conftest import Make
from tests.feedback.projects import add, answer_next, item, lease, make_store, person
from trimtab.core.errors import DataError
from trimtab.feedback import items, people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.assign import choose, eligible, next_lease, num_eligible, shown_order
from trimtab.feedback.items import apply_settings, policy_score
from trimtab.feedback.project import Project
from trimtab.feedback.store import Store, verify
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import reopen, save_draft, set_opted_out, undo, vote

CAP = 2


class Crowd(RuleBasedStateMachine):
    """People who take, answer, skip, undo, change, come late, are banned and let back in, in any order."""

    tokens = Bundle("tokens")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = make_store(
            Path(self.folder.name), {"assignment": {"overlap": CAP, "lease_minutes": 1.0, "finish_started": False}}
        )
        add(self.store, 4)
        self.people = [person(self.store, name) for name in "abcd"]
        self.acknowledged: dict[str, int] = {}
        self.unbanned = False

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(target=tokens, who=st.integers(0, 3))
    def take(self, who: int) -> tuple[int, str]:
        given_out = lease(self.store, self.people[who])
        return who, given_out.token if given_out else "none"

    @rule(token=tokens, choice=st.sampled_from(["A", "B", "tie", "skip"]))
    def answer(self, token: tuple[int, str], choice: str) -> None:
        who, name = token
        try:
            said = Answer(choice=choice, strength=1 if choice in "AB" else None)
            receipt = vote(self.store, self.people[who], name, said)
        except DataError:
            return
        assert self.acknowledged.setdefault(name, receipt.vote_id) == receipt.vote_id

    @rule(who=st.integers(0, 3))
    def take_back(self, who: int) -> None:
        try:
            undo(self.store, self.people[who])
        except DataError:
            return

    @rule(who=st.integers(0, 3), which=st.integers(1, 12))
    def change(self, who: int, which: int) -> None:
        try:
            reopen(self.store, self.people[who], which)
        except DataError:
            return

    @rule(token=tokens)
    def draft(self, token: tuple[int, str]) -> None:
        save_draft(self.store, self.people[token[0]], token[1], {"rationale": "x"})

    @rule(seconds=st.sampled_from([5.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.store.clock.seconds += seconds

    @rule(who=st.integers(0, 3))
    def ban(self, who: int) -> None:
        people.set_state(self.store, self.people[who].id, "banned")

    @rule(who=st.integers(0, 3))
    def let_in(self, who: int) -> None:
        self.unbanned = True  # their answers count again beside those given in their place
        people.set_state(self.store, self.people[who].id, "active")

    @invariant()
    def caps_hold_and_nothing_is_lost(self) -> None:
        if not hasattr(self, "store"):
            return
        with self.store.read() as connection:
            casts = list(cast_votes(connection))
            places = connection.execute(sa.select(t.queue.c.taken, t.queue.c.cap)).all()
            stored = set(connection.execute(sa.select(t.votes.c.id)).scalars())
            for one in self.people:  # the short way of counting is the long one
                assert num_eligible(self.store, connection, one) == len(
                    connection.execute(eligible(self.store, one)).all()
                )
        assert set(self.acknowledged.values()) <= stored
        assert len({(c.item_id, c.person_id) for c in casts}) == len(casts)
        if not self.unbanned:
            assert all(0 <= row.taken <= row.cap for row in places)
            assert max(Counter(c.item_id for c in casts).values(), default=0) <= CAP
        assert verify(self.store) == []


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(
    max_examples=6, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_ban_between_a_request_and_its_answer_stops_the_answer(make: Make):
    store = make({})
    add(store, 2)
    ann = person(store, "Ann")
    answer_next(store, ann)
    held = lease(store, ann)
    people.set_state(store, ann.id, "banned")  # ann, as the server read her before, is still active
    for act in (
        lambda: vote(store, ann, held.token, Answer(choice="A", strength=1)),
        lambda: undo(store, ann),
        lambda: reopen(store, ann, 1),
    ):
        with pytest.raises(DataError, match="no longer take part"):
            act()
    with store.write() as connection:
        assert next_lease(store, connection, ann) is None
    assert verify(store) == []


def test_a_pair_is_shown_either_way_round_equally_often():
    for someone in range(20):
        first = [shown_order(0, someone, i, 2, "pairs")[0] for i in range(80)]
        assert sum(first) == 40
        assert all(sum(first[i : i + 8]) == 4 for i in range(0, 80, 8))
    orders = {tuple(shown_order(0, someone, i, 2, "pairs")[0] for i in range(16)) for someone in range(50)}
    assert len(orders) > 40  # everyone has an order of their own


def test_replies_of_a_ranking_stand_anywhere_and_steps_in_order():
    places = [shown_order(0, 1, i, 4, "ranking").index(0) for i in range(400)]
    assert all(70 <= count <= 130 for count in Counter(places).values())
    assert shown_order(0, 1, 0, 5, "steps") == [0, 1, 2, 3, 4]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1), st.floats(0.05, 2))
def test_the_probability_of_a_choice_is_that_of_the_mixture(scores, random_arm, temperature):
    values = np.array(scores)
    chosen, arm, propensity = choose(values, np.random.default_rng(0), random_arm=random_arm, temperature=temperature)
    # by definition, in another way
    weights = [float(np.exp(s / temperature)) for s in scores]
    wanted = random_arm / len(scores) + (1 - random_arm) * weights[chosen] / sum(weights)
    assert propensity == pytest.approx(wanted)
    assert arm in ("random", "active")


def test_choices_come_as_often_as_they_say():
    values, random = np.array([0.0, 0.5, 1.0]), np.random.default_rng(1)
    drawn = [choose(values, random, random_arm=0.2, temperature=0.5) for _ in range(6000)]
    said = {chosen: propensity for chosen, _, propensity in drawn}
    assert sum(said.values()) == pytest.approx(1)
    seen = Counter(chosen for chosen, _, _ in drawn)
    for chosen, propensity in said.items():
        assert seen[chosen] / 6000 == pytest.approx(propensity, abs=0.03)
    assert Counter(arm for _, arm, _ in drawn)["random"] / 6000 == pytest.approx(0.2, abs=0.02)


def test_policies_score_pairs_as_their_formulas_say():
    agreeing, split = {"a": [2.0, 0.0], "b": [2.0, 0.0]}, {"a": [2.0, 0.0], "b": [0.0, 2.0]}
    even = {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    p = 1 / (1 + np.exp(-2.0))
    assert policy_score("uncertainty", agreeing, 0) == pytest.approx(1 - 2 * (p - 0.5))
    assert policy_score("uncertainty", even, 0) == pytest.approx(1)
    assert policy_score("disagreement", agreeing, 0) == pytest.approx(0)
    assert policy_score("disagreement", split, 0) == pytest.approx(4 * np.var([p, 1 - p]))
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert policy_score("bald", split, 0) == pytest.approx(1 - entropy)
    assert policy_score("bald", even, 0) == pytest.approx(0)  # unsure, and nothing would be learnt
    assert policy_score("given", split, 0.7) == 0.7
    assert policy_score("random", split, 0.7) == 0


def test_a_policy_asks_for_what_it_wants_and_the_arm_is_stored(make: Make):
    store = make({"assignment": {"policy": "disagreement", "random_arm": 0.0, "temperature": 0.01}})
    new = [item(i, scores={"a": [float(i), 0.0], "b": [-float(i), 0.0]}) for i in range(5)]
    items.add_items(store, [("row", one) for one in new])
    ann = person(store, "Ann")
    for expected in (4, 3, 2, 1, 0):
        answer_next(store, ann)
        with store.read() as connection:
            *_, last = cast_votes(connection)
        assert last.prompt["messages"][0]["content"] == f"question {expected}"
        assert last.arm == "active"
        assert 0 < last.propensity <= 1
    assert verify(store) == []


def changed(store: Store, **values: object) -> Store:
    """The store with another assignment in its project file."""
    assignment = dataclasses.replace(store.project.settings.assignment, **values)
    settings_ = dataclasses.replace(store.project.settings, assignment=assignment)
    again = Store(Project(store.project.path, settings_), store.engine, store.clock)
    apply_settings(again)
    return again


def test_overlap_can_be_changed_at_any_time(make: Make):
    store = make({"assignment": {"overlap": 1}})
    add(store, 2)
    ann, bob, eve = (person(store, name) for name in ("Ann", "Bob", "Eve"))
    assert answer_next(store, ann)
    assert answer_next(store, ann)
    assert lease(store, bob) is None
    wider = changed(store, overlap=2)
    assert answer_next(wider, bob)
    narrower = changed(wider, overlap=1)
    assert lease(narrower, eve) is None
    assert verify(narrower) == []


def test_gold_items_are_hidden_among_the_others_and_limited_by_nobody(make: Make):
    store = make({"assignment": {"gold_rate": 0.5}})
    add(store, 30)
    items.add_items(store, [("g", item(i, purpose="gold", gold={"choice": "A"})) for i in range(100, 104)])
    ann, bob = person(store, "Ann"), person(store, "Bob")
    for someone in (ann, bob):
        for _ in range(15):
            answer_next(store, someone)
    with store.read() as connection:
        gold = Counter(c.annotator for c in cast_votes(connection, purposes=("gold",)))
    assert gold == {"Ann": 4, "Bob": 4}


def test_asking_again_swaps_the_sides_and_adds_no_label(make: Make):
    store = make({"assignment": {"reask_rate": 0.5}})
    add(store, 60)
    ann = person(store, "Ann")
    for _ in range(45):
        answer_next(store, ann)
    with store.read() as connection:
        first = {c.item_id: c for c in cast_votes(connection)}
        again = list(cast_votes(connection, purposes=("reask",)))
    assert again
    assert len(first) + len(again) == 45
    for cast in again:
        assert cast.shown_left != first[cast.item_id].shown_left
    assert verify(store) == []


def test_the_quiz_of_somebody_who_opted_out_has_no_sensitive_questions(make: Make):
    store = make({"qualification": {"questions": 2}})
    add(store, 1)
    add(store, 1, first=10, purpose="quiz", gold={"choice": "A"})
    add(store, 1, first=11, purpose="quiz", gold={"choice": "A"}, sensitive=True)
    ann = person(store, "Ann")
    set_opted_out(store, ann, True)
    quiz = lease(store, ann)
    assert quiz is not None
    vote(store, ann, quiz.token, Answer(choice="A", strength=1))
    task = lease(store, ann)
    assert task is not None
    assert (quiz.purpose, task.purpose) == ("quiz", "task")


def test_who_opts_out_in_the_midst_of_the_quiz_has_answered_what_is_left_of_it(make: Make):
    store = make({"qualification": {"questions": 2}})
    add(store, 1)
    add(store, 1, first=10, purpose="quiz", gold={"choice": "A"})
    add(store, 1, first=11, purpose="quiz", gold={"choice": "A"}, sensitive=True)
    ann = person(store, "Ann")
    answer_next(store, ann)
    set_opted_out(store, ann, True)
    after = lease(store, ann)
    assert after is not None
    assert after.purpose == "task"


def test_who_opts_out_gives_back_what_is_sensitive_and_is_not_asked_it_again(make: Make):
    store = make({"assignment": {"reask_rate": 0.5}})
    add(store, 13, sensitive=True)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    for _ in range(12):
        answer_next(store, ann)
    in_hand = lease(store, ann)
    set_opted_out(store, ann, True)
    add(store, 30, first=50)
    while (given := lease(store, ann)) is not None:
        with store.read() as connection:
            is_sensitive = sa.select(t.items.c.sensitive).where(t.items.c.id == given.item_id)
            assert not connection.execute(is_sensitive).scalar_one()
        vote(store, ann, given.token, Answer(choice="A", strength=1))
    theirs = lease(store, bob)
    assert in_hand is not None
    assert theirs is not None
    assert verify(store) == []


def test_a_day_has_a_limit(make: Make):
    store = make({"assignment": {"max_per_day": 2}})
    add(store, 5)
    ann = person(store, "Ann")
    assert answer_next(store, ann)
    assert answer_next(store, ann)
    assert lease(store, ann) is None
    store.clock.seconds += 25 * 3600
    assert lease(store, ann) is not None


def test_authors_do_not_judge_their_own_prompts_where_that_is_wished(make: Make):
    store = make({"assignment": {"own_prompts": False}})
    items.add_items(store, [("a", item(1, author="Ann")), ("b", item(2, author="Bob"))])
    given_out = lease(store, person(store, "Ann"))
    assert given_out is not None
    with store.read() as connection:
        row = connection.execute(sa.select(t.queue).where(t.queue.c.item_id == given_out.item_id)).one()
    assert row.author == "Bob"


def test_a_paused_project_gives_out_nothing(make: Make):
    from trimtab.feedback.assign import set_open

    store = make()
    add(store, 2)
    ann = person(store, "Ann")
    in_hand = lease(store, ann)
    set_open(store, False)
    assert in_hand is not None
    vote(store, ann, in_hand.token, Answer(choice="A", strength=1))
    assert lease(store, ann) is None
    add(store, 3, first=2)
    items.add_items(store, [("gold", item(9, purpose="gold", gold={"choice": "A"}))])
    assert lease(store, ann) is None
    set_open(store, True)
    assert lease(store, ann) is not None
