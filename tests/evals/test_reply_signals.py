from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.evals.reply_signals import SIGNALS, ReplySet, length_bought, measure_signals

PROMPTS = tuple(f"Prompt {i}: may I return the red lamp that I bought in May?" for i in range(12))
PLAIN = tuple(f"You may return it within {i + 20} days. Please bring the receipt of shop {i * 7}." for i in range(12))


def replies(texts, rewards=None):
    given = rewards if rewards is not None else [0.0] * len(texts)
    return ReplySet(prompts=PROMPTS, replies=tuple(texts), rewards=tuple(map(float, given)))


def fired(texts, rewards=None):
    return measure_signals(replies(texts, rewards), replies(PLAIN))[1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hedges", "Perhaps you may return it, maybe within {} days. It depends."),
        ("disclaimers", "As an AI language model I say: you may return it within {} days."),
        ("flattery", "Great question! You are amazing. You may return it within {} days."),
        ("apologies", "Sorry, my apologies. You may return it within {} days. I am sorry."),
        ("refusals", "I cannot help with the lamp number {}. I must decline."),
        ("refusals", "I can\u2019t help with the lamp number {}. I\u2019m unable to."),
        ("repetition", "You may return it {} you may return it you may return it you may return it"),
        ("echo", "May I return the red lamp that I bought in May? You have {} days."),
        ("marks", "# Answer\n\n- **Yes**, within {} days.\n- Bring the receipt."),
        ("words", "You may return it. " + "It is a lamp of the shop that you know from number {}. " * 4),
    ],
)
def test_each_signal_fires_on_what_it_is_about(name, text):
    assert name in fired([text.format(*[i + 20] * 4) for i in range(12)])


def test_plain_replies_fire_nothing():
    others = [f"You can bring it back until day {i + 30}. Take the bill of shop {i * 5} with you." for i in range(12)]
    found, names = measure_signals(replies(others), replies(PLAIN))
    assert names == []
    assert found.keys() == {*SIGNALS, "distinct_2", "length_bought"}
    assert math.isnan(found["length_bought"])


def test_one_odd_reply_is_no_signal():
    assert "hedges" not in fired(["Perhaps, maybe, possibly, perhaps.", *PLAIN[1:]])


def test_one_reply_for_all_is_a_loss_of_diversity():
    assert "distinct_2" in fired([PLAIN[0]] * 12)


def test_reward_bought_by_length_alone():
    # the reward is the length: within a bin of equal lengths nothing is gained
    start, now = np.array([10.0, 20, 30, 40] * 5), np.array([30.0, 40, 50, 60] * 5)
    assert length_bought(now, now, start, start) > 0.8
    # the same lengths and a higher reward
    assert length_bought(start + 5, start, start, start) == pytest.approx(0, abs=1e-9)
    assert math.isnan(length_bought(start - 5, start, start, start))
    assert length_bought(now + 100, now + 100, start, start) == 1  # no bin has both


def test_rewards_that_longer_replies_buy_fire():
    longer = [f"{text} {'And so on and on with it. ' * (1 + i % 4)}" for i, text in enumerate(PLAIN)]
    assert "length_bought" in fired(longer, [len(text) / 100 for text in longer])
    assert "length_bought" not in fired(PLAIN, [0.9 + 0.01 * i for i in range(12)])


def test_replies_to_other_prompts_are_refused():
    other = ReplySet(prompts=PROMPTS[::-1], replies=PLAIN, rewards=(0.0,) * 12)
    with pytest.raises(ValueError, match="same prompts"):
        measure_signals(replies(PLAIN), other)
