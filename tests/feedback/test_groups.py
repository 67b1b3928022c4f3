"""Judgements about one ranking or one prompt depend on each other: intervals that do not know it are too narrow."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from tests.feedback.conftest import Make
from tests.feedback.projects import add, answer_next, person
from trimtab.core.errors import DataError
from trimtab.feedback.answers import Answer
from trimtab.feedback.votes import votes_of
from trimtab.votes.agreement import cohen_kappa, krippendorff_alpha, raw_agreement
from trimtab.votes.annotators import annotator_cards
from trimtab.votes.ratings import games_of, rate
from trimtab.votes.study import study
from trimtab.votes.table import VoteTable, ranked_pairs, votes_from_rows


def rankings(seed: int, *, num: int = 40, replies: int = 6, annotators: int = 3) -> VoteTable:
    """Rankings of clear and of unclear sets of replies, pair by pair."""
    generator = np.random.default_rng(seed)
    rows = []
    for item in range(num):
        quality = generator.normal(size=replies) * generator.choice([0.05, 4.0])
        for who in range(annotators):
            order = np.argsort(-(quality + generator.gumbel(size=replies)))
            for a, b, choice in ranked_pairs([(int(place),) for place in order]):
                row = {"item": f"{item}/{a}-{b}", "annotator": str(who), "choice": choice, "group": str(item)}
                rows.append(("", row | {"model_a": f"m{a}", "model_b": f"m{b}"}))
    return votes_from_rows(rows)


def counts(seed: int, *, num: int = 40, replies: int = 6, annotators: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The same as counts of votes [pairs, 2] with the group of each pair."""
    generator = np.random.default_rng(seed)
    quality = generator.normal(size=(num, 1, replies)) * generator.choice([0.05, 4.0], size=(num, 1, 1))
    liked = quality + generator.gumbel(size=(num, annotators, replies))
    a, b = np.triu_indices(replies, 1)
    wins = (liked[:, :, a] > liked[:, :, b]).sum(axis=1).astype(float).reshape(-1)
    return np.stack([wins, annotators - wins], axis=1), np.repeat(np.arange(num), a.size)


def test_the_interval_of_rankings_covers_the_truth_as_often_as_it_says():
    tables = [counts(seed) for seed in range(100)]
    found = [raw_agreement(table, num_resamples=1).interval.value for table, _ in tables]
    truth = np.mean(found)
    whole = [raw_agreement(table, groups=groups, num_resamples=200).interval for table, groups in tables]
    single = [raw_agreement(table, num_resamples=200).interval for table, _ in tables]
    assert sum(one.low <= truth <= one.high for one in whole) >= 89  # 95 expected of 100
    assert sum(one.low <= truth <= one.high for one in single) < 75  # pairs by themselves: little more than a half
    assert np.mean([one.high - one.low for one in whole]) == pytest.approx(2 * 1.96 * np.std(found), rel=0.25)


def test_the_interval_of_one_annotator_covers_the_truth_too():
    cards = [annotator_cards(rankings(seed, num=20, replies=5, annotators=2))[0].agreement for seed in range(40)]
    truth = np.mean([card.value for card in cards])
    assert sum(card.low <= truth <= card.high for card in cards) >= 34


def test_a_group_counts_once_and_equal_groups_say_as_much_as_one_of_their_items():
    # every item three times over: by themselves three times as many, in groups the same interval as without copies
    generator = np.random.default_rng(0)
    table = generator.multinomial(3, [0.5, 0.1, 0.4], size=50).astype(float)
    groups = np.repeat(np.arange(50), 3)
    for of in (raw_agreement, krippendorff_alpha):
        once, copied = of(table).interval, of(np.repeat(table, 3, axis=0), groups=groups)
        assert copied.interval.count == 50
        assert "150 pairs of 50" in copied.note
        assert copied.interval.high - copied.interval.low == pytest.approx(once.high - once.low, rel=0.15)
    first, second = generator.integers(2, size=(2, 50))
    once = cohen_kappa(first, second, 2).interval
    copied = cohen_kappa(np.repeat(first, 3), np.repeat(second, 3), 2, groups=groups)
    assert copied.interval.high - copied.interval.low == pytest.approx(once.high - once.low, rel=0.15)


def test_one_ranking_has_no_interval():
    found = study(rankings(0, num=1), num_resamples=50).coefficients[0]
    assert found.interval.count == 1
    assert np.isnan(found.interval.low)
    assert "one ranking or prompt: no interval" in found.note


def test_pairs_of_one_prompt_are_one_group_without_being_told():
    def row(prompt: str, a: str, b: str) -> tuple[str, dict]:
        return "", {"prompt": prompt, "response_a": a, "response_b": b, "choice": "A", "annotator": "ann"}

    votes = votes_from_rows([row(p, a, b) for p in "pq" for a, b in combinations("xyz", 2)])
    assert votes.group is not None
    assert votes.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert votes_from_rows([row(p, "x", "y") for p in "pqr"]).group is None


def test_ratings_are_resampled_by_group():
    votes = rankings(0, num=30)
    games = games_of(votes)
    assert len(set(games.group.tolist())) == 30
    assert rate(games, num_resamples=20).players


def test_a_ranking_in_the_order_of_the_screen_is_no_run_of_equal_answers(small: Make):
    store = small({"task": {"kind": "ranking"}, "assignment": {"overlap": 2}})
    add(store, 6, kind="ranking", num=6)
    for name in ("Ann", "Bob"):
        someone = person(store, name)
        while answer_next(store, someone, Answer(choice="done", ranking=tuple((i,) for i in range(6)))) is not None:
            pass
    votes = votes_of(store.project.path)
    assert votes.group is not None
    assert len(set(votes.group.tolist())) == 6
    for card in annotator_cards(votes):
        assert card.longest_run <= 6
        assert not [flag for flag in card.flags if "in a row" in flag]


RANKED = {"item": "i", "annotator": "ann", "choice": "2", "ranking": [[2], [0, 1]]}


def test_a_ranking_is_a_vote_for_each_of_its_pairs_if_it_was_judged():
    votes = votes_from_rows([("r", RANKED), ("s", {**RANKED, "item": "j", "choice": "cannot_judge"})])
    assert votes.items == ("i/0-1", "i/0-2", "i/1-2")
    assert [votes.categories[c] for c in votes.choice] == ["tie", "B", "B"]
    assert votes.counts == {"rows": 2, "votes": 3, "not_judged": 1}
    pair = {**RANKED, "prompt": "q", "response_a": "x", "response_b": "y", "choice": "A"}
    assert len(votes_from_rows([("r", pair)])) == 1, "it judges the two replies that it holds"
    assert votes_from_rows([("r", {**RANKED, "ranking": 7})]).items == ("i",), "a column of another meaning"


@pytest.mark.parametrize("ranking", ["[[2], [0", [[2], [0, 0]], [[0], [2]], [["a"], ["b"]], [[0], 1], [[0.0], [1]]])
def test_a_ranking_that_is_none_is_refused(ranking):
    with pytest.raises(DataError, match="is no ranking"):
        votes_from_rows([("row 1", {**RANKED, "ranking": ranking})])


def test_rankings_without_an_item_are_not_one_item():
    with pytest.raises(DataError, match="no item"):
        votes_from_rows([("row 1", {name: value for name, value in RANKED.items() if name != "item"})])
