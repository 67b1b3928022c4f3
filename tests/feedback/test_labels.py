"""From votes to labels, worked by hand: rules, margins, rankings, grades, and splits."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from tests.feedback.conftest import Make
from tests.feedback.projects import (
    BAD,
    TIE,
    A,
    B,
    add,
    answer_next,
    answered,
    lease,
    make_store,
    pairs_of,
    person,
    write,
)
from trimtab.core.errors import DataError
from trimtab.core.types import (
    Comparison,
    Demonstration,
    LabelledResponse,
    PreferencePair,
    Prompt,
    SteppedResponse,
)
from trimtab.data.layouts import load
from trimtab.data.split import place_of_name
from trimtab.feedback import people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer, from_form, from_position, to_position
from trimtab.feedback.exporting import export, write_export
from trimtab.feedback.importing import Options, import_source
from trimtab.feedback.project import Task
from trimtab.feedback.voting import adjudicate, vote
from trimtab.votes.table import ranked_pairs


def test_the_share_of_votes_is_the_label(make: Make):
    store = make({"assignment": {"overlap": 5}})
    add(store, 1)
    answered(store, A, A, B, TIE, BAD)
    (pair,) = pairs_of(store)  # "both bad" is left out: 2 + 1/2 of 4
    assert (pair.chosen, pair.label) == ("reply 0.0", pytest.approx(2.5 / 4))


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        ({"rule": "majority"}, 1.0),
        ({"ties": "drop"}, 2 / 3),
        ({"both_bad": "tie"}, 3 / 5),
        ({"rule": "one_coin"}, None),
        ({"rule": "dawid_skene"}, None),
        ({"rule": "mace"}, None),
    ],
)
def test_other_rules(small: Make, labels: dict, label: float | None):
    store = small({"assignment": {"overlap": 5}, "labels": labels})
    add(store, 1)
    answered(store, A, A, B, TIE, BAD)
    (pair,) = pairs_of(store)
    assert pair.chosen == "reply 0.0"
    assert 0.5 < pair.label <= 1
    if label is not None:
        assert pair.label == pytest.approx(label)


def test_what_is_left_out_is_counted(small: Make):
    store = small({"assignment": {"overlap": 2}, "labels": {"min_votes": 2, "min_agreement": 0.9}})
    add(store, 3)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    said = {"question 0": (A, B), "question 1": (A, TIE), "question 2": (A, None)}
    for i, someone in enumerate((ann, bob)):
        for _ in range(3):
            given_out = lease(store, someone)
            if given_out is None:
                continue
            with store.read() as connection:
                row = connection.execute(sa.select(t.items.c.prompt).where(t.items.c.id == given_out.item_id)).one()
            answer = said[row.prompt["messages"][0]["content"]][i]
            vote(store, someone, given_out.token, answer or Answer(choice="skip"))
    with pytest.raises(DataError, match="1 dropped even votes, 1 dropped low agreement, 1 dropped few votes") as error:
        pairs_of(store)
    assert "min_votes" in error.value.fix or "min_votes" in str(error.value)


def test_margins_come_from_strengths(small: Make):
    store = small({"task": {"scale": 4}, "assignment": {"overlap": 3}, "labels": {"margins": [1.0, 3.0]}})
    add(store, 1)
    answered(store, Answer(choice="A", strength=2), Answer(choice="A", strength=1), Answer(choice="B", strength=1))
    (pair,) = pairs_of(store)
    assert pair.margin == pytest.approx((3 + 1 - 1) / 3)
    assert export(store, "preference").rows[0]["margin"] == pair.margin


def test_an_adjudication_overrides_and_a_ban_takes_out(small: Make):
    store = small({"assignment": {"overlap": 3}})
    add(store, 1)
    answered(store, A, A, B)
    people.set_state(store, 1, "banned")
    with pytest.raises(DataError, match="even votes"):
        pairs_of(store)
    judge = person(store, "Jo", "adjudicator")
    adjudicate(store, judge, 1, Answer(choice="B", strength=1, taxonomy="annotator error"), key="k")
    (pair,) = pairs_of(store)
    assert (pair.chosen, pair.label) == ("reply 0.1", 1.0)


def test_a_ranking_becomes_every_pair_but_the_ties(make: Make):
    store = make({"task": {"kind": "ranking"}})
    add(store, 1, kind="ranking", num=4)
    answered(store, Answer(choice="done", ranking=((2,), (0, 3), (1,))))
    found = {(pair.chosen[-1], pair.rejected[-1]) for pair in pairs_of(store)}
    assert found == {("2", "0"), ("2", "3"), ("2", "1"), ("0", "1"), ("3", "1")}
    (group,) = export(store, "groups").rows
    assert group["rankings"][0]["ranking"] == [[2], [0, 3], [1]]
    assert group["mean_ranks"] == [2.5, 4.0, 1.0, 2.5]


def test_a_set_that_too_few_have_ranked_is_no_group(make: Make):
    store = make({"task": {"kind": "ranking"}, "assignment": {"overlap": 2}, "labels": {"min_votes": 2}})
    add(store, 2, kind="ranking", num=3)
    ranked = Answer(choice="done", ranking=((2,), (0,), (1,)))
    answered(store, ranked, ranked)
    answer_next(store, person(store, "once"), ranked)
    exported = export(store, "groups")
    assert [len(row["rankings"]) for row in exported.rows] == [2]
    assert exported.card["counts"]["dropped_few_votes"] == 1


@st.composite
def rankings(draw) -> tuple[tuple[int, ...], ...]:
    order = draw(st.permutations(range(5)))
    cuts = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    tiers = [[order[0]]]
    for place, cut in zip(order[1:], cuts, strict=True):
        if cut:
            tiers.append([place])
        else:
            tiers[-1].append(place)
    return tuple(tuple(sorted(tier)) for tier in tiers)


@given(rankings(), st.permutations(range(5)))
def test_the_order_that_is_sent_is_the_order_that_is_exported(ranking, shown):
    # as the page sends it: a rank for each reply in the order on the screen
    rank = {place: i + 1 for i, tier in enumerate(ranking) for place in tier}
    form = {f"rank_{i}": [str(rank[place])] for i, place in enumerate(shown)}
    answer = from_form(form, kind="ranking", order=shown, task=Task(kind="ranking"))
    assert answer.ranking == ranking
    for a, b, choice in ranked_pairs(answer.ranking):
        assert choice == ("A" if rank[a] < rank[b] else "B" if rank[b] < rank[a] else "tie")


@given(st.sampled_from([2, 4, 5, 6, 7, 8]), st.integers(1, 8), st.sampled_from("AB"))
def test_a_place_on_the_scale_is_a_choice_whichever_side_it_was_shown_on(scale: int, position: int, left: str):
    if position > scale:
        with pytest.raises(DataError):
            from_position(position, scale, left)
        return
    choice, strength = from_position(position, scale, left)
    assert to_position(choice, strength, scale, left) == position
    mirrored = from_position(scale + 1 - position, scale, left)
    assert mirrored == from_position(position, scale, "B" if left == "A" else "A")
    assert mirrored[1] == strength


def test_ratings_steps_and_texts_become_their_records(tmp_path: Path):
    def made(kind: str, num: int, answers: list[Answer], record: type, **values):
        folder = tmp_path / f"{kind}-{record.__name__}"
        folder.mkdir()
        store = make_store(folder, {"task": {"kind": kind, **values}, "assignment": {"overlap": 3}})
        add(store, 1, kind=kind, num=num)
        answered(store, *answers)
        found = load(record, f"feedback:{store.project.path}").records
        store.close()
        return found

    up, down = Answer(choice="done", rating=2), Answer(choice="done", rating=1)
    assert [r.label for r in made("rating", 1, [up, up, down], LabelledResponse)] == [True]
    marks = [(1, 1, -1, None), (1, 0, -1, None), (1, -1, None, None)]
    answers = [Answer(choice="done", steps=m) for m in marks]
    (stepped,) = made("steps", 4, answers, SteppedResponse)
    assert stepped.labels == (True, True, False)
    texts = [Answer(choice="done", text="better")]
    assert [d.response for d in made("edit", 1, texts, Demonstration)] == ["better"]
    (pair,) = made("edit", 1, texts, PreferencePair)
    assert (pair.chosen, pair.rejected) == ("better", "reply 0.0")


def test_splits_share_no_prompt_and_no_person(small: Make):
    labels = {"held_out_prompts": 0.3, "held_out_annotators": 0.3}
    store = small({"assignment": {"overlap": 2, "finish_started": False}, "labels": labels})
    add(store, 40)
    crowd = [person(store, f"p{i}") for i in range(10)]
    for _ in range(6):
        for someone in crowd:
            answer_next(store, someone)
    by_split = {s: load(Comparison, f"feedback:{store.project.path}?split={s}").records for s in ("train", "held_out")}
    prompts = [{c.prompt.id for c in by_split[s]} for s in by_split]
    names = [{c.annotator for c in by_split[s]} for s in by_split]
    assert prompts[0]
    assert prompts[1]
    assert not prompts[0] & prompts[1]
    assert not names[0] & names[1]


def test_votes_held_out_stay_so_when_their_author_is_deleted(small: Make, tmp_path: Path):
    store = small({"labels": {"held_out_prompts": 0.0, "held_out_annotators": 0.2}})
    add(store, 1)
    name = next(name for name in map(str, range(100)) if place_of_name(name) < 0.2 <= place_of_name("deleted-1"))
    answer_next(store, person(store, name))
    for deleted in (False, True):
        if deleted:
            people.delete_person(store, 1)
        write_export(store, "dump", tmp_path / f"{deleted}.jsonl")
        restored = small({"labels": {"held_out_prompts": 0.0, "held_out_annotators": 0.2}})
        import_source(restored, str(tmp_path / f"{deleted}.jsonl"))
        for one in (store, restored):
            assert export(one, "preference", split="train").rows == []
            assert len(export(one, "preference").rows) == 1


def test_prompts_of_two_files_that_number_their_rows_alike_are_different_prompts(small: Make, tmp_path: Path):
    store = small()
    for name in "ab":
        rows = [
            {"id": "1", "prompt": f"{name}?", "response_a": "x", "response_b": "y", "choice": "A", "annotator": "Z"}
        ]
        import_source(store, write(tmp_path / f"{name}.jsonl", rows), Options(with_votes=True))
    prompts = load(Prompt, f"feedback:{store.project.path}").records
    assert [prompt.text for prompt in prompts] == ["a?", "b?"]
