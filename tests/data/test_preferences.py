from __future__ import annotations

import pytest

from trimtab.core.types import Comparison, Message, PreferencePair, Prompt
from trimtab.data.preferences import to_pairs


def prompt(text: str, **more) -> Prompt:
    return Prompt(messages=(Message("user", text),), **more)


def votes(choices: str, text: str = "q", a: str = "x", b: str = "y") -> list[Comparison]:
    """One comparison for each letter: A, B or t."""
    names = {"A": "A", "B": "B", "t": "tie"}
    return [Comparison(prompt=prompt(text), response_a=a, response_b=b, choice=names[c]) for c in choices]


def test_the_majority_decides():
    pairs, counts = to_pairs(votes("ABB"))
    assert pairs == [PreferencePair(prompt=prompt("q"), chosen="y", rejected="x", label=1.0)]
    assert counts["comparisons"] == 3
    assert counts["pairs"] == 1


def test_a_soft_label_is_the_share_of_votes():
    (pair,), _ = to_pairs(votes("ABAA"), labels="soft")
    assert (pair.chosen, pair.label) == ("x", 0.75)


def test_votes_count_for_a_reply_wherever_it_was_shown():
    (pair,), _ = to_pairs([*votes("A"), *votes("BB", a="y", b="x")], labels="soft")
    assert (pair.chosen, pair.label) == ("x", 1.0)


@pytest.mark.parametrize(("ties", "label"), [("half", 2.5 / 3), ("drop", 1.0)])
def test_a_tie_is_half_a_vote_for_each_or_none(ties, label):
    (pair,), counts = to_pairs(votes("AAt"), labels="soft", ties=ties)
    assert pair.label == pytest.approx(label)
    assert counts["ties"] == 1


def test_every_pair_is_kept_or_counted_as_dropped():
    comparisons = [
        *votes("AB", "even"),
        *votes("tt", "only ties"),
        *votes("AAB", "doubtful"),
        *votes("t", "same", a="x", b="x"),
        *votes("AAAB", "clear"),
    ]
    pairs, counts = to_pairs(comparisons, ties="drop", min_agreement=0.7)
    assert [pair.prompt.text for pair in pairs] == ["clear"]
    assert counts == {
        "comparisons": 12,
        "ties": 3,
        "judged_pairs": 5,
        "dropped_identical_pair": 1,
        "dropped_only_ties": 1,
        "dropped_even_votes": 1,
        "dropped_low_agreement": 1,
        "pairs": 1,
    }


def test_votes_of_one_pair_are_put_together_whatever_ids_their_rows_have():
    rows = [Comparison(prompt=prompt("q", id=f"row {i}"), response_a="x", response_b="y", choice="A") for i in range(3)]
    pairs, counts = to_pairs(rows)
    assert len(pairs) == counts["judged_pairs"] == 1
