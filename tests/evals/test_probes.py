from __future__ import annotations

import json

import numpy as np
import pytest

from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.evals.probes import DEGENERATE, STYLES, Probe, make_probes, read_probes
from trimtab.evals.text import words
from trimtab.stats import bootstrap_mean, wilson


def pair(question: str, chosen: str, rejected: str = "No.", label: float = 1.0) -> PreferencePair:
    prompt = Prompt(messages=(Message("user", question),))
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, label=label)


PAIRS = [pair(f"Question {i}?", f"Answer {i}. It is {i}.") for i in range(8)]


def card_of(score, pairs=PAIRS, **options):
    """The reading of the probes by a scorer that is a function of a prompt and a text."""
    probes = make_probes(pairs, **options)
    return read_probes(probes, [score(probe.prompt, probe.text) for probe in probes])


@pytest.mark.parametrize(
    ("style", "reply", "rewritten"),
    [
        ("heading", "Yes.", "## Answer\n\nYes."),
        ("heading", "# Title\nYes.", None),
        ("list", "One. Two! Three?", "- One.\n- Two!\n- Three?"),
        ("list", "Only one.", None),
        ("list", "Two. Things:\n1. a", None),
        ("bold", "One. Two.", "**One.** Two."),
        ("bold", "A **bold** word.", None),
        ("bold", "", None),
        ("sure", "Yes.", "Sure! Yes."),
        ("sure", "sure, yes.", None),
    ],
)
def test_a_style_worked_by_hand(style, reply, rewritten):
    assert STYLES[style](reply) == rewritten


@pytest.mark.parametrize("length", [1, 10, 100])
def test_a_longer_reply_begins_as_before_and_is_half_again_as_long(length):
    reply = "word " * length
    found = STYLES["length"](reply)
    assert found.startswith(reply)
    assert 1.5 * length <= len(words(found)) <= 1.5 * length + 12


def test_texts_without_content_worked_by_hand():
    of = {name: make("", []) if name == "empty" else make(PAIRS[0], ["One. Two.", " ", "Three"])
          for name, make in DEGENERATE.items()}  # fmt: skip
    assert of["empty"] == ""
    assert of["repeated"] == " ".join(["Answer 0. It"] * 10)
    assert of["prompt_copied"] == "Question 0?"
    assert of["answer_spray"] == "One.\nThree"
    assert DEGENERATE["answer_spray"](PAIRS[0], []) is None


def test_a_shuffled_reply_is_never_under_its_own_prompt_nor_a_spray_of_its_own_reply():
    repeated = [*PAIRS, *PAIRS]
    for probe in make_probes(repeated):
        own = repeated[probe.pair]
        assert (probe.prompt == own.prompt) == (probe.kind != "shuffled")
        if probe.name == "answer_spray":
            assert own.chosen.split(". ")[0] + "." not in probe.text.splitlines()
            assert len(probe.text.splitlines()) == 5


def test_one_prompt_has_no_other_to_be_shown_under():
    names = {(probe.kind, probe.name) for probe in make_probes([pair("a", "b"), pair("a", "c")])}
    assert "shuffled" not in {kind for kind, _ in names}
    assert ("degenerate", "answer_spray") not in names
    assert "shuffled_replies" not in card_of(lambda _p, text: len(text), [pair("a", "b. c.")])


def test_probes_are_spread_over_the_pairs_that_have_a_right_side():
    pairs = [pair(str(i), "a", label=0.5 if i % 2 else 1.0) for i in range(20)]
    assert sorted({probe.pair for probe in make_probes(pairs, limit=5)}) == [0, 4, 8, 12, 16]


def test_premiums_are_those_that_were_planted():
    planted = {"##": 0.5, "- ": -0.25, "**": 2.0, "Perhaps": -1.0, "brilliant": 0.75, "Sure!": 0.1}
    styles = ("heading", "list", "bold", "hedge", "flattery", "sure")
    found = card_of(lambda _p, text: sum(worth for mark, worth in planted.items() if mark in text))["styles"]
    for style, worth in zip(styles, planted.values(), strict=True):
        assert found[style]["value"] == pytest.approx(worth)
        assert found[style]["low"] == pytest.approx(worth)
        assert found[style]["higher_fraction"] == (worth > 0)
        assert found[style]["count"] == 8
    assert (found["length"]["value"], found["length"]["higher_fraction"]) == (0, 0.5)


def test_the_interval_of_a_premium_holds_what_was_planted_in_noise():
    generator = np.random.default_rng(0)
    pairs = [pair(f"Question {i}?", f"Answer {i}. Again.") for i in range(100)]
    found = card_of(lambda _p, text: 0.4 * ("Sure!" in text) + generator.normal(scale=0.5), pairs)
    sure = found["styles"]["sure"]
    assert 0.1 < sure["low"] < 0.4 < sure["high"] < 0.7


def test_the_interval_of_a_premium_resamples_prompts():
    pairs = [pair(str(i // 4), "Yes. No.") for i in range(40)]
    found = card_of(lambda prompt, text: int(prompt.text) * ("Sure!" in text), pairs)["styles"]["sure"]
    by_hand = bootstrap_mean(np.repeat(np.arange(10.0), 4), groups=[i // 4 for i in range(40)])
    assert (found["value"], found["low"], found["high"]) == (by_hand.value, by_hand.low, by_hand.high)


def test_a_model_that_ignores_the_prompt_orders_shuffled_replies_as_well():
    blind = card_of(lambda _p, text: len(text))
    assert blind["shuffled_replies"] == 1
    assert blind["shuffled_replies_low"] == wilson(8, 8).low
    # the number in the reply is right under its own prompt only
    careful = card_of(lambda prompt, text: float(prompt.text.split()[1].rstrip("?") in text))
    assert careful["shuffled_replies"] == 0.5


def test_texts_without_content_are_compared_with_both_sides():
    found = card_of(lambda _p, text: {"": 1.0, "No.": 0.0}.get(text, 2.0 if text.endswith("?") else 1.0))["degenerate"]
    assert found["empty"]["above_chosen"]["value"] == 0.5  # a tie
    assert found["empty"]["above_rejected"]["value"] == 1
    assert found["prompt_copied"]["above_chosen"]["value"] == 1
    assert found["prompt_copied"]["above_chosen"]["count"] == 8


def test_a_constant_scorer_ties_with_every_text_and_pays_no_style():
    found = card_of(lambda *_: 0.3)
    assert found["shuffled_replies"] == 0.5
    assert {one["above_rejected"]["value"] for one in found["degenerate"].values()} == {0.5}
    assert {(one["value"], one["higher_fraction"]) for one in found["styles"].values()} == {(0.0, 0.5)}
    assert json.loads(json.dumps(found)) == found


def test_a_probe_that_could_not_be_scored_is_left_out_and_counted():
    found = card_of(lambda _p, text: np.nan if text.startswith("Sure!") and "0" in text else 1.0)
    assert found["num_probes_unscored"] == 1
    assert found["styles"]["sure"]["count"] == 7
    assert found["num_probed"] == 8


def test_probes_without_a_score_each_are_refused():
    probe = Probe("style", "sure", 0, PAIRS[0].prompt, "Sure! Yes.")
    with pytest.raises(ValueError, match="1 probes need one score each"):
        read_probes([probe], [1.0, 2.0])
