"""The rules of selection, on replies whose rewards are written down."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, Message, PreferencePair, Prompt
from trimtab.data.layouts import load
from trimtab.stages.selection import (
    Filter,
    PromptItem,
    Reply,
    ReplyFile,
    choose,
    describe,
    write_demonstrations,
    write_pairs,
)


def reply(text, reward, *, finished=True, gold=None, **parts):
    return Reply(response=text, length=len(text), finished=finished, reward=reward, parts=parts, gold=gold)


def asked(num, demonstration=None):
    return [PromptItem(Prompt(messages=(Message("user", f"question {i}"),)), demonstration) for i in range(num)]


ROWS = [
    [reply("a", 1.0), reply("b", 3.0), reply("c", 2.0), reply("b", 3.0)],
    [reply("d", 0.5), reply("  ", 9.0), reply("e", 9.0, finished=False), reply("f", math.nan)],
    [reply("g", 5.0), reply("h", 5.0), reply("i", 5.0), reply("j", 4.0)],
]


def chosen(rows, rule, seed=0):
    choice = choose(asked(len(rows)), rows, rule, seed=seed)
    return [[rows[i][k].response for k in picked] for i, picked in enumerate(choice.picked)], choice.counts


def test_the_best_of_each_prompt_is_kept_and_every_other_reply_is_counted_once():
    texts, counts = chosen(ROWS, Filter())
    assert texts[:2] == [["b"], ["d"]]
    assert texts[2][0] in "ghi"
    dropped = {name: num for name, num in counts.items() if name.startswith("dropped_") and num}
    assert dropped == {"dropped_empty": 1, "dropped_unfinished": 1, "dropped_unjudged": 1, "dropped_not_best": 6}
    assert counts["chosen"] + sum(dropped.values()) == counts["replies"] == 12
    assert counts["prompts_with_tied_best"] == 1, "two equal texts are no tie"


def test_ties_are_drawn_evenly_and_again_alike():
    tied = [[reply(text, 1.0) for text in "abcd"]] * 800
    texts, _ = chosen(tied, Filter())
    assert texts == chosen(tied, Filter())[0]
    assert texts != chosen(tied, Filter(), seed=1)[0]
    shares = [sum(t == [text] for t in texts) / 800 for text in "abcd"]
    # four deviations of a share of 1/4 over 800 draws
    assert all(abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 800) for share in shares)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Filter(keep="all"), ["abc", "d", "ghij"]),
        (Filter(keep="all", dedup=False), ["abcb", "d", "ghij"]),
        (Filter(keep="all", finished=False), ["abc", "de", "ghij"]),
        (Filter(at_least={"reward": 2.0}, keep="all"), ["bc", "", "ghij"]),
        # eight texts pass: a quarter of them is two, and the three of reward 5 draw lots
        (Filter(keep="all", top_fraction=0.375), ["", "", "ghi"]),
        (Filter(keep="best", top_fraction=0.5), ["b", "", "?"]),
        (Filter(keep="best", top_fraction=0.1), ["", "", "?"]),
    ],
)
def test_a_filter_keeps_what_it_says(rule, kept):
    texts, counts = chosen(ROWS, rule)
    assert [len(t) for t in texts] == [len(k) for k in kept]
    assert [t for t, k in zip(texts, kept, strict=True) if k != "?"] == [list(k) for k in kept if k != "?"]
    assert counts["chosen"] == sum(map(len, kept))
    assert counts["chosen"] + sum(n for c, n in counts.items() if c.startswith("dropped_")) == 12


def test_only_correct_replies_with_the_tone_deciding_between_them():
    row = [reply("wrong, charming", 5.0, answer=0.0), reply("right", 2.0, answer=1.0), reply("right!", 3.0, answer=1.0)]
    unjudged = [reply("?", 1.0, answer=math.nan)] * 3
    texts, counts = chosen([row, unjudged], Filter(at_least={"answer": 1.0}))
    assert texts == [["right!"], []]
    assert counts["dropped_below_at_least"] == 4, "what has no score does not reach one"
    assert counts["prompts_without_choice"] == 1


def test_of_equal_rewards_at_the_edge_the_share_is_kept_exactly():
    rows = [[reply("x", 1.0)] for _ in range(10)]
    texts, _ = chosen(rows, Filter(top_fraction=0.25))
    assert sum(map(len, texts)) == 3


def test_nothing_left_is_an_error_that_says_what_refused_what():
    with pytest.raises(DataError, match="none of 1 replies passes the filter: 1 dropped_unfinished"):
        chosen([[reply("a", 1.0, finished=False)]], Filter())


def pairs_of(tmp_path, rows, against, *, rule=None, demonstration=None, seed=0):
    rule, prompts = rule or Filter(), asked(len(rows), demonstration)
    choice = None if against == "demonstration" else choose(prompts, rows, rule, seed=seed)
    path = tmp_path / f"{against}-{seed}.jsonl"
    counts = write_pairs(path, prompts, rows, choice, against=against, rule=rule, seed=seed)
    return load(PreferencePair, path).records, counts


def test_the_best_is_paired_with_the_worst_and_the_margin_is_what_lies_between(tmp_path):
    pairs, counts = pairs_of(tmp_path, ROWS, "worst")
    assert [(p.chosen, p.rejected, p.margin) for p in pairs[:1]] == [("b", "a", 2.0)]
    assert (pairs[1].rejected, pairs[1].margin, pairs[1].label) == ("j", 1.0, 1.0)
    # the second prompt has one reply that can be used
    assert counts == {"pairs": 2, "prompts_without_pair": 1}


def test_a_random_rival_may_be_the_same_or_no_worse_and_is_then_dropped(tmp_path):
    outcomes = set()
    for seed in range(40):
        pairs, counts = pairs_of(tmp_path, [*ROWS, [reply("y", 2.0), reply("z", 1.0)]], "random", seed=seed)
        assert counts["pairs"] == len(pairs)
        assert sum(counts.values()) == 4
        outcomes |= {name for name, num in counts.items() if num} | {p.rejected for p in pairs}
    assert outcomes == {
        *("pairs", "prompts_without_pair", "dropped_identical_pair", "dropped_no_lower_reward"),
        *("a", "c", "j", "z"),
    }


def test_a_reply_that_the_rewards_like_better_than_the_correct_one_is_not_rejected(tmp_path):
    row = [reply("right", 1.0, answer=1.0), reply("wrong", 2.0, answer=0.0), reply("silly", 0.0, answer=0.0)]
    rule = Filter(at_least={"answer": 1.0})
    pairs, _ = pairs_of(tmp_path, [row], "worst", rule=rule)
    assert [(p.chosen, p.rejected) for p in pairs] == [("right", "silly")]
    with pytest.raises(DataError, match="1 dropped_no_lower_reward"):
        pairs_of(tmp_path, [row[:2]], "worst", rule=rule)


def test_a_demonstration_is_preferred_to_each_of_the_policys_own_replies(tmp_path):
    unjudged = [[reply(r.response, math.nan, finished=r.finished) for r in row] for row in ROWS]
    pairs, counts = pairs_of(tmp_path, unjudged, "demonstration", demonstration="b")
    assert all(p.chosen == "b" and p.margin is None for p in pairs)
    assert [p.rejected for p in pairs] == list("acdfghij")
    assert counts == {
        "pairs": 8,
        "dropped_identical_pair": 2,
        "dropped_empty_pair": 1,
        "dropped_unfinished_pair": 1,
        "prompts_without_pair": 0,
    }


def test_no_pair_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no pair could be made: 1 dropped_no_lower_reward"):
        pairs_of(tmp_path, [[reply("a", 1.0), reply("b", 1.0)]], "worst")


def test_best_replies_are_read_as_demonstrations(tmp_path):
    prompts = asked(3)
    write_demonstrations(tmp_path / "best.jsonl", prompts, ROWS, choose(prompts, ROWS, Filter(), seed=0))
    found = load(Demonstration, tmp_path / "best.jsonl").records
    assert [d.prompt for d in found] == [a.prompt for a in prompts]
    assert [d.response for d in found[:2]] == ["b", "d"]


def test_the_curve_equals_trying_every_subset():
    generator = np.random.default_rng(0)
    rows = [
        [reply(f"{i} {k}", float(generator.integers(4)), gold=float(generator.random())) for k in range(6)]
        for i in range(300)  # more than are worked out together
    ]
    found = describe(rows, choose(asked(300), rows, Filter(), seed=0))["best_of"]
    assert [point["n"] for point in found["curve"]] == [1, 2, 4, 6]
    assert found["num_prompts"] == 300
    for point in found["curve"]:
        best, gold, gold_by_gold = [], [], []
        for row in rows:
            for subset in itertools.combinations(row, point["n"]):
                top = max(r.reward for r in subset)
                best.append(top)
                gold.append(np.mean([r.gold for r in subset if r.reward == top]))
                gold_by_gold.append(max(r.gold for r in subset))
        assert point["reward"] == pytest.approx(np.mean(best))
        assert point["gold"] == pytest.approx(np.mean(gold))
        assert point["gold_by_gold"] == pytest.approx(np.mean(gold_by_gold))
        assert point["reward_low"] < point["reward"] < point["reward_high"]
        assert point["kl"] == pytest.approx(math.log(point["n"]) - (point["n"] - 1) / point["n"])


def test_the_curve_of_uniform_rewards_is_the_mean_of_their_highest():
    # the highest of n uniform draws is n / (n + 1) on average, with deviation below 1 / n
    generator = np.random.default_rng(1)
    rows = [[reply(str(k), float(generator.random())) for k in range(16)] for _ in range(2000)]
    curve = describe(rows, choose(asked(2000), rows, Filter(), seed=0))["best_of"]["curve"]
    for point in curve:
        n = point["n"]
        assert point["reward"] == pytest.approx(n / (n + 1), abs=4 / n / math.sqrt(2000))
        assert point["reward_low"] < n / (n + 1) < point["reward_high"]


def test_a_prompt_that_could_not_be_judged_whole_is_left_out_of_the_curve():
    rows = [[reply("a", 1.0), reply("b", math.nan)], [reply("c", 2.0), reply("d", 4.0)]]
    found = describe(rows, choose(asked(2), rows, Filter(), seed=0))
    assert (found["best_of"]["num_prompts"], found["best_of"]["num_prompts_left_out"]) == (1, 1)
    assert [point["reward"] for point in found["best_of"]["curve"]] == [3.0, 4.0]
    assert found["chosen"]["num"] == 2
    assert found["chosen"]["reward"] == 2.5


def test_replies_are_kept_as_far_as_was_saved(tmp_path):
    prompts, path = asked(3, "shown"), tmp_path / "replies.jsonl"
    replies = ReplyFile(path)
    replies.append(prompts[:2], ROWS[:2])
    replies.save(tmp_path)
    replies.append(prompts[2:], ROWS[2:])  # and the process is killed
    path.write_bytes(path.read_bytes() + b'{"half a r')
    again = ReplyFile(path)
    again.load(tmp_path)
    again.append(prompts[2:], ROWS[2:])
    assert [[r.response for r in row] for row in again.read()] == [[r.response for r in row] for row in ROWS]
    read = list(again.read())
    assert math.isnan(read[1][3].reward)
    assert read[0] == ROWS[0]
    assert all("NaN" not in line and json.loads(line) for line in path.read_text().splitlines())


def test_replies_that_were_lost_are_missed(tmp_path):
    replies = ReplyFile(tmp_path / "replies.jsonl")
    replies.append(asked(1), ROWS[:1])
    replies.save(tmp_path)
    replies.path.unlink()
    with pytest.raises(DataError, match="holds 0 bytes"):
        ReplyFile(tmp_path / "replies.jsonl").load(tmp_path)
