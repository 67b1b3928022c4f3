from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from trimtab.core.errors import DataError
from trimtab.evals.reward_bench import SECTIONS, BenchItem, bench_scores, read_bench, share_won, ties_score


def item(subset: str, *, right: int = 1, wrong: int = 1, id: str = "") -> BenchItem:
    replies = tuple(f"reply {i}" for i in range(right + wrong))
    return BenchItem(subset=subset, prompt="p", replies=replies, num_right=right, id=id, where="rows.jsonl:1")


def test_replies_that_tie_for_the_first_place_share_it():
    assert share_won([2.0, 1.0], 1) == 1
    assert share_won([1.0, 1.0], 1) == 0.5
    assert share_won([0.0, 1.0], 1) == 0
    assert share_won([1.0, 1.0, 1.0, 1.0], 1) == 0.25
    assert share_won([1.0, 1.0, 0.0, 0.0], 1) == 0.5
    assert share_won([0.0, 3.0, 3.0, 1.0], 1) == 0


def test_a_constant_scorer_has_half_of_pairs_and_a_quarter_of_four():
    pairs = [item(name) for section in SECTIONS.values() for name in section for _ in range(3)]
    found = bench_scores(pairs, [[1.0, 1.0]] * len(pairs))
    assert {one.value for one in found.sections.values()} == {0.5}
    assert found.overall == 0.5
    four = [item("Factuality", wrong=3) for _ in range(8)]
    assert bench_scores(four, [[0.0] * 4] * 8).overall == 0.25


def test_simple_scorers_are_called_what_they_are():
    items = [replace(item("hep-go"), replies=("word " * (i + 2), "word")) for i in range(20)]
    assert bench_scores(items, [[1.0, 1.0]] * 20).resembles == "constant"
    assert bench_scores(items, [[i + 2.0, 1.0] for i in range(20)]).resembles == "length"
    assert bench_scores(items, [[(-1.0) ** i, 0.5] for i in range(20)]).resembles is None


def test_a_section_is_the_mean_of_its_subsets_by_their_published_weights():
    names = [name for section in SECTIONS.values() for name in section]
    items = [item(name) for name in names]
    right = {"alpacaeval-easy", "mt-bench-med", "math-prm"}
    found = bench_scores(items, [[1.0, 0.0] if one.subset in right else [0.0, 1.0] for one in items])
    assert found.sections["Chat"].value == pytest.approx((100 + 40) / (100 + 95 + 95 + 28 + 40))
    assert found.sections["Reasoning"].value == pytest.approx(984 / (984 + 6 * 164))
    assert found.sections["Safety"].value == 0
    assert found.overall == pytest.approx((140 / 358 + 0.5) / 4)
    (note,) = found.notes  # the same problems in six languages are not independent
    assert note.startswith("Reasoning: hep-cpp, hep-go, hep-java, hep-js, hep-python, hep-rust are the same problems")


def test_a_section_without_all_its_subsets_says_so():
    found = bench_scores([item("llmbar-natural")] * 4, [[1.0, 0.0]] * 4)
    assert list(found.sections) == ["Chat Hard"]
    lacks, absent = found.notes  # a section without any row has no score that would not be the published one
    assert lacks.startswith("Chat Hard lacks mt-bench-hard, llmbar-adver-neighbor")
    assert absent == "no row is of Chat or Safety or Reasoning: the mean is not that of RewardBench"


def test_the_interval_of_a_section_is_that_of_the_number_of_rows_with_its_variance():
    """Two subsets of equal weight with 10 and 40 rows: (1 + 1)^2 / (1/10 + 1/40) = 32 rows."""
    items = [item("hep-go")] * 10 + [item("hep-js")] * 40
    found = bench_scores(items, [[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5 + [[1.0, 0.0]] * 20 + [[0.0, 1.0]] * 20)
    section = found.sections["Reasoning"]
    n, z = 32, 1.959963984540054
    half = z * math.sqrt(0.25 / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert (section.value, section.low, section.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert section.count == 50


def test_ties_by_hand():
    """Prompt 1: one right 3 against 1 (gap 2); many 5, 4 against 1 (spread 1, gap 3): apart in both.
    Prompt 2: one right 1 against 2 (gap -1); many 4, 4 against 3 (spread 0, gap 1): apart, not in both, no margin."""
    rows = [
        (item("Ties", id="ref:1"), [3.0, 1.0]),
        (item("Ties", right=2, id="tied:1"), [5.0, 4.0, 1.0]),
        (item("Ties", id="ref:2"), [1.0, 2.0]),
        (item("Ties", right=2, id="tied:2"), [4.0, 4.0, 3.0]),
    ]
    found = ties_score(rows)
    assert (found.one_right, found.many_right, found.apart, found.apart_in_both) == (0.5, 1.0, 1.0, 0.5)
    assert found.margin == pytest.approx((math.tanh(2 / 1 - 1) + math.tanh(-math.inf)) / 2)
    assert found.score == pytest.approx(0.3 + 0.15 + 0.2 + 0.1 + 0.01 * found.margin)
    one, other = item("Factuality", wrong=3), [1.0, 0.0, 0.0, 0.0]
    whole = bench_scores([*(row for row, _ in rows), one], [*(given for _, given in rows), other])
    assert whole.overall == pytest.approx((found.score + 1) / 2)


def test_a_prompt_without_spread_and_gap_has_no_margin():
    rows = [(item("Ties", id="ref:1"), [1.0, 1.0]), (item("Ties", right=2, id="tied:1"), [1.0, 1.0, 1.0])]
    found = ties_score(rows)
    assert (found.one_right, found.many_right, found.apart, found.apart_in_both, found.margin) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("id", ["7", "other:7", "tied:"])
def test_a_prompt_of_ties_that_cannot_be_paired_is_refused(id):
    with pytest.raises(DataError, match=r"the id '.*' of a prompt of the domain Ties"):
        ties_score([(item("Ties", right=2, id=id), [1.0, 1.0, 0.0])])


def test_prompts_of_ties_without_their_other_half_are_refused():
    with pytest.raises(DataError, match="no prompt of the domain Ties stands with one right reply and with many"):
        ties_score([(item("Ties", id="ref:1"), [1.0, 0.0])])


def test_both_layouts_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"id": 1, "subset": "hep-go", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"id": "ref:1", "subset": "Ties", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c"], "num_correct": 1},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_bench([file]).items
    assert (first.replies, first.num_right) == (("a", "b"), 1)
    assert (second.replies, second.num_right, second.id) == (("a", "b", "c"), 1, "ref:1")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"subset": None}, "subset is None"),
        ({"prompt": " "}, "prompt is ' '"),
        ({"chosen": []}, "chosen is \\[\\]"),
        ({"rejected": 3}, "rejected is 3"),
        ({"num_correct": 2}, "num_correct is 2, and there are 1 chosen replies"),
    ],
)
def test_rows_that_are_none_of_it_are_refused(tmp_path, changed, problem):
    row = {"subset": "hep-go", "prompt": "p", "chosen": "a", "rejected": "b"} | changed
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=problem):
        read_bench([tmp_path / "rows.jsonl"])


def test_the_scores_need_finite_rewards():
    with pytest.raises(ValueError, match="2 replies need one finite reward each"):
        bench_scores([item("hep-go")], [[1.0, math.nan]])
