from __future__ import annotations

import pytest

from trimtab.data.preferences import split_by_prompt, to_pairs
from trimtab.types import Comparison, Message, PreferencePair, Prompt


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


def test_no_prompt_is_on_both_sides_of_a_split_and_every_record_is_on_one():
    pairs = [
        PreferencePair(prompt=prompt(f"q{i}"), chosen=c, rejected="no") for c in ("yes", "well") for i in range(500)
    ]
    train, held_out = split_by_prompt(pairs, 0.2)
    assert not {p.prompt.id for p in train} & {p.prompt.id for p in held_out}
    assert len(train) + len(held_out) == 1000
    assert 140 < len(held_out) < 260  # 200 expected; 4.7 standard deviations


def test_a_prompt_stays_on_its_side_as_data_is_added():
    prompts = [prompt(f"q{i}") for i in range(200)]
    _, held_out = split_by_prompt(prompts[:50])
    _, held_out_later = split_by_prompt(prompts[::-1])
    assert {p.id for p in held_out} == {p.id for p in held_out_later} & {p.id for p in prompts[:50]}


def test_the_sides_are_the_same_on_every_machine():
    # printf 'ID' | sha256sum begins with less than a tenth of ffff… for these alone
    assert [p.text for p in split_by_prompt([prompt(f"q{i}") for i in range(30)])[1]] == ["q2", "q14", "q22"]


def test_one_conversation_under_several_ids_is_on_one_side():
    prompts = [prompt(f"q{i % 100}", id=f"row {i}") for i in range(300)]
    train, held_out = split_by_prompt(prompts, 0.3)
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert held_out


def test_nothing_is_held_out_when_nothing_is_asked_for():
    prompts = [prompt(f"q{i}") for i in range(50)]
    assert split_by_prompt(prompts, 0.0) == (prompts, [])
