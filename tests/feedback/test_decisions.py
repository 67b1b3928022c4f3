"""What an adjudicator decides is what is exported, and what the rules make of votes is near the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.feedback.conftest import Make
from tests.feedback.projects import add, answer_next, lease, make_store, person
from trimtab.core.errors import DataError
from trimtab.core.types import Message, Prompt
from trimtab.feedback import labels, people
from trimtab.feedback.answers import Answer
from trimtab.feedback.assign import num_eligible
from trimtab.feedback.board import disagreements
from trimtab.feedback.exporting import export
from trimtab.feedback.project import LabelSettings
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import Late, adjudicate, reopen, save_draft, undo, vote

A, B = Answer(choice="A", strength=1), Answer(choice="B", strength=1)
TIE, BAD, SKIP = Answer(choice="tie"), Answer(choice="both_bad"), Answer(choice="skip")


def decided(tmp_path: Path, values: dict[str, Any], votes: list[Answer], decision: Answer, **item: Any) -> Any:
    """A store with one item, its votes and a decision."""
    store = make_store(tmp_path, {"assignment": {"overlap": 3}, **values})
    add(store, 1, kind=store.project.settings.task.kind, **item)
    for i, answer in enumerate(votes):
        answer_next(store, person(store, f"p{i}"), answer)
    judge = person(store, "Jo", "adjudicator")
    adjudicate(store, judge, 1, decision.__class__(**{**vars(decision), "taxonomy": "annotator error"}), key="k")
    return store


@pytest.mark.parametrize("votes", [[], [BAD, BAD], [TIE], [SKIP, SKIP], [B, B]])
def test_a_decision_makes_the_pair_whatever_became_of_the_votes(tmp_path: Path, votes: list[Answer]):
    store = decided(tmp_path, {"labels": {"ties": "drop", "min_votes": 2}}, votes, A)
    exported = export(store, "preference")
    assert [(row["chosen"], row["label"]) for row in exported.rows] == [("reply 0.0", 1.0)]
    assert exported.card["counts"]["adjudicated"] == 1
    (comparison,) = export(store, "comparisons").rows
    assert (comparison["choice"], comparison["annotator"]) == ("A", "Jo")


def test_a_decision_makes_the_pair_of_people_who_were_banned(tmp_path: Path):
    store = decided(tmp_path, {}, [B, B], A)
    for number in (1, 2):
        people.set_state(store, number, "banned")
    assert export(store, "preference").rows[0]["chosen"] == "reply 0.0"


def test_the_strength_of_a_decision_is_its_margin(tmp_path: Path):
    settings = {"task": {"scale": 4}, "labels": {"margins": [1.0, 3.0]}}
    store = decided(tmp_path, settings, [B, B], Answer(choice="A", strength=2))
    assert export(store, "preference").rows[0]["margin"] == 3.0


def test_a_decision_that_cannot_judge_leaves_the_item_out(tmp_path: Path):
    store = decided(tmp_path, {"task": {"cannot_judge": False}}, [A, A], Answer(choice="cannot_judge"))
    exported = export(store, "preference")
    assert exported.rows == []
    assert exported.card["counts"]["dropped_left_out_items"] == 1
    assert export(store, "comparisons").rows == []


def test_a_decision_on_a_ranking_is_its_only_ranking(tmp_path: Path):
    votes = [Answer(choice="done", ranking=((0,), (1,), (2,)))]
    decision = Answer(choice="done", ranking=((2,), (1,), (0,)))
    store = decided(tmp_path, {"task": {"kind": "ranking"}}, votes, decision, num=3)
    (group,) = export(store, "groups").rows
    assert [one["ranking"] for one in group["rankings"]] == [[[2], [1], [0]]]
    assert {(r["chosen"][-1], r["rejected"][-1]) for r in export(store, "preference").rows} == {
        ("2", "1"), ("2", "0"), ("1", "0"),
    }  # fmt: skip


def test_a_decision_on_a_rating_is_the_label(tmp_path: Path):
    votes = [Answer(choice="done", rating=1)] * 2
    store = decided(tmp_path, {"task": {"kind": "rating"}}, votes, Answer(choice="done", rating=2), num=1)
    assert [row["label"] for row in export(store, "unpaired").rows] == [True]


def test_a_decision_on_steps_is_their_marks(tmp_path: Path):
    votes = [Answer(choice="done", steps=(-1, None))] * 2
    store = decided(tmp_path, {"task": {"kind": "steps"}}, votes, Answer(choice="done", steps=(1, -1)))
    assert [row["labels"] for row in export(store, "stepwise").rows] == [[True, False]]


@pytest.mark.parametrize("kind", ["edit", "demonstration"])
def test_a_decision_on_a_text_is_the_only_text(tmp_path: Path, kind: str):
    votes = [Answer(choice="done", text="bad"), Answer(choice="done", text="worse")]
    decision = Answer(choice="done", text="good")
    store = decided(tmp_path, {"task": {"kind": kind}}, votes, decision, num=1 if kind == "edit" else 0)
    assert [row["messages"][-1]["content"] for row in export(store, "sft").rows] == ["good"]
    if kind == "edit":
        (pair,) = export(store, "preference").rows
        assert (pair["chosen"], pair["rejected"]) == ("good", "reply 0.0")


def test_an_adjudicated_item_is_given_to_nobody_else(make: Make):
    store = make({"assignment": {"overlap": 3, "finish_started": False}})
    add(store, 2)
    ann, judge = person(store, "Ann"), person(store, "Jo", "adjudicator")
    answer_next(store, person(store, "Bob"))
    for item_id in (1, 2):
        adjudicate(store, judge, item_id, Answer(choice="A", strength=1, taxonomy="bad data"), key="same key")
    with store.read() as connection:
        assert num_eligible(store, connection, ann) == 0
    assert lease(store, ann) is None
    # the same key for another item was another decision, and sent again it is the same one
    assert export(store, "preference").card["counts"]["adjudicated"] == 2
    other = adjudicate(store, judge, 1, Answer(choice="B", strength=1, taxonomy="bad data"), key="same key")
    assert other.duplicate
    assert other.differs  # which the page says: it is not stored


def test_an_adjudicator_who_was_banned_decides_nothing(make: Make):
    store = make({})
    add(store, 1)
    judge = person(store, "Jo", "adjudicator")
    people.set_state(store, judge.id, "banned")
    with pytest.raises(DataError, match="no longer take part"):  # let in just before the ban
        adjudicate(store, judge, 1, Answer(choice="A", strength=1, taxonomy="bad data"), key="k")


def test_an_answer_that_is_open_for_change_is_locked_by_the_decision(make: Make):
    store = make({"task": {"rationale": "optional"}})
    add(store, 1)
    ann = person(store, "Ann")
    receipt = answer_next(store, ann)
    assert receipt is not None
    opened = reopen(store, ann, receipt.vote_id)
    assert save_draft(store, ann, opened.token, {"rationale": "because"})
    decision = Answer(choice="B", strength=1, taxonomy="bad data")
    adjudicate(store, person(store, "Jo", "adjudicator"), 1, decision, key="k")
    with pytest.raises(Late, match="locked"):
        vote(store, ann, opened.token, B)
    assert not save_draft(store, ann, opened.token, {"rationale": "because of this"})
    assert lease(store, ann) is None
    with store.read() as connection:
        assert [cast.answer.choice for cast in cast_votes(connection)] == ["A"]


def test_what_a_banned_adjudicator_decided_is_open_again(make: Make):
    store = make({"assignment": {"overlap": 2}})
    add(store, 1)
    ann, judge = person(store, "Ann"), person(store, "Jo", "adjudicator")
    receipt = answer_next(store, ann, replace(A, flags=("flagged",)))
    assert receipt is not None
    adjudicate(store, judge, 1, Answer(choice="B", strength=1, taxonomy="bad data"), key="k")
    for state, num in (("banned", 1), ("active", 0), ("banned", 1)):
        people.set_state(store, judge.id, state)
        with store.read() as connection:
            assert len(disagreements(connection)) == num
    assert reopen(store, ann, receipt.vote_id).standing
    assert lease(store, person(store, "Bob")) is not None


def test_a_flag_that_was_taken_back_is_shown_no_more(small: Make):
    store = small()
    add(store, 1)
    ann = person(store, "Ann")
    answer_next(store, ann, replace(A, flags=("flagged",)))
    vote(store, ann, undo(store, ann).token, A)
    with store.read() as connection:
        assert disagreements(connection) == []


def test_a_decision_on_a_gold_item_is_no_label(small: Make):
    store = small()
    add(store, 1, purpose="gold", gold={"choice": "A"})
    adjudicate(store, person(store, "Jo", "adjudicator"), 1, replace(A, taxonomy="bad data"), key="k")
    assert export(store, "preference").rows == []
    assert export(store, "comparisons").rows == []


def test_no_prompt_is_in_both_splits_whatever_ids_rows_have(small: Make, tmp_path: Path):
    store = small({"labels": {"held_out_prompts": 0.4}})
    from trimtab.feedback.items import NewItem, NewReply, add_items

    rows = [
        NewItem(
            kind="pairs",
            prompt=Prompt(messages=(Message("user", f"q{i % 10}"),), id=f"row {i}"),
            replies=(NewReply(text=f"x{i}"), NewReply(text=f"y{i}")),
        )
        for i in range(30)
    ]
    add_items(store, [("", row) for row in rows])
    ann = person(store, "Ann")
    while answer_next(store, ann) is not None:
        pass
    texts = {s: [row["prompt"] for row in export(store, "preference", split=s).rows] for s in ("train", "held_out")}
    assert len(texts["train"]) + len(texts["held_out"]) == 30
    assert set(texts["train"]) & set(texts["held_out"]) == set()
    assert all(len(found) % 3 == 0 and found for found in texts.values())


# --- the rules against a known truth ---


def simulated(rule: str, *, ties: float, both_bad: float = 0.0, num: int = 400) -> tuple[float, float, float]:
    """Mean label, how often it is right, and log loss, of three votes an item by annotators of known skill."""
    generator = np.random.default_rng(0)
    skill, truth = generator.uniform(0.6, 0.95, 20), generator.random(num) < 0.5
    judgements = []
    for i in range(num):
        for who in generator.choice(20, 3, replace=False):
            said = "A" if (generator.random() < skill[who]) == truth[i] else "B"
            draw = generator.random()
            choice = "tie" if draw < ties else "both_bad" if draw < ties + both_bad else said
            cast: Any = SimpleNamespace(id=0, annotator=str(who))
            prompt = Prompt(messages=(Message("user", "q"),))
            judgements.append(labels._Judgement(str(i), prompt, "a", "b", choice, 0.0, cast))
    found = labels._shares(judgements, LabelSettings(rule=rule, both_bad="tie"))  # type: ignore[arg-type]
    share = np.array([found[str(i)] for i in range(num)])
    decided = ~np.isclose(share, 0.5)
    right = ((share > 0.5) == truth)[decided].mean()
    loss = -np.log(np.where(truth, share, 1 - share).clip(1e-3, 1)).mean()
    return float(np.maximum(share, 1 - share)[decided].mean()), float(right), float(loss)


@pytest.mark.parametrize("rule", ["one_coin", "dawid_skene", "mace"])
@pytest.mark.parametrize(("ties", "both_bad"), [(0.0, 0.0), (0.02, 0.0), (0.2, 0.0), (0.0, 0.02), (0.1, 0.1)])
def test_labels_say_how_often_they_are_right(rule: str, ties: float, both_bad: float):
    label, right, loss = simulated(rule, ties=ties, both_bad=both_bad)
    assert label == pytest.approx(right, abs=0.05)
    assert loss < simulated("share", ties=ties, both_bad=both_bad)[2]
