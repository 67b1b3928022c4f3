"""Files of the field as verdicts: MT-Bench (FastChat), Arena-Hard, and votes of people."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trimtab.core.errors import DataError
from trimtab.evals.answers import Answers
from trimtab.evals.verdict_files import read_verdicts
from trimtab.evals.verdict_study import mean_scores, study_verdicts
from trimtab.evals.verdicts import PairVerdict, verdict_row
from trimtab.evals.win_rate import by_matchup, win_rate_of

PAIR = {
    "question_id": 81,
    "model_1": "mine",
    "model_2": "base",
    "g1_winner": "model_1",
    "g2_winner": "tie",
    "judge": ["gpt-4", "pair-v2"],
    "g1_judgment": "[[A]]",
    "g2_judgment": "[[C]]",
    "turn": 1,
    "tstamp": 1686286924.8,
}
SINGLE = {
    "question_id": 81,
    "model": "mine",
    "judge": ["gpt-4", "single-v1"],
    "judgment": "Rating: [[8]]",
    "score": 8,
    "turn": 1,
}
GAMES = {
    "uid": "328c149e",
    "category": "hard_prompt",
    "judge": "gpt-4.1",
    "model": "mine",
    "baseline": "base",
    "games": [{"score": "A>>B", "judgment": {"answer": "[[A>>B]]"}}, {"score": "A>B"}],
}
HUMAN = {
    "question_id": 81,
    "model_a": "zephyr",
    "model_b": "alpaca",
    "winner": "model_a",
    "judge": "expert_0",
    "turn": 2,
    "conversation_a": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "second"},
    ],
    "conversation_b": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "eins"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "zwei"},
    ],
}
VOTE = {
    "item": "i1",
    "annotator": "anna",
    "choice": "B",
    "model_a": "base",
    "model_b": "mine",
    "shown_left": "A",
    "group": "g1",
    "purpose": "task",
    "banned": False,
}


@pytest.fixture
def read(tmp_path):
    """A function that writes rows to a file and reads it as verdicts."""

    def write_and_read(*rows, **options):
        path = tmp_path / "verdicts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_verdicts([path], **options)

    return write_and_read


def test_a_pair_of_mt_bench_is_judged_in_both_orders(read):
    first, second = read(PAIR).verdicts
    assert (first.prompt, first.model, first.baseline, first.judge, first.turn) == ("81", "mine", "base", "gpt-4", 1)
    assert (first.verdict, first.shown_first) == (1.0, "model")
    assert (second.verdict, second.shown_first) == (0.5, "baseline")


def test_games_with_an_error_are_missing_and_the_other_game_is_kept(read):
    found = read(PAIR | {"g2_winner": "error"}, PAIR | {"question_id": 82, "g1_winner": "model_2"})
    assert [v.verdict for v in found.verdicts] == [1.0, 0.0, 0.5]
    assert found.num_missing == 1
    assert "1 of 2 prompts were judged in one order only" in study_verdicts(found.verdicts).notes[0]


def test_pairs_that_were_scored_one_by_one_have_no_order_and_none_if_a_score_is_missing(read):
    scored = PAIR | {"g1_winner": "model_2", "g2_winner": "model_2", "m1_score": 5, "m2_score": 9}
    found = read(scored, scored | {"question_id": 82, "m2_score": -1})
    assert [(v.verdict, v.shown_first) for v in found.verdicts] == [(0.0, None)]
    assert found.num_missing == 1


def test_win_rates_of_mt_bench_are_those_of_its_own_script_if_both_games_say_something_else_than_one_tie(read):
    """FastChat's show_result.py: a win if both games agree, else a tie. A win beside a tie is a tie there, and three
    quarters of a win here."""
    generator = np.random.default_rng(0)
    rows = [
        PAIR | {"question_id": i, "turn": turn, "g1_winner": str(one), "g2_winner": str(one if same else other)}
        for i in range(40)
        for turn in (1, 2)
        for one, other in [generator.permutation(["model_1", "model_2"])]
        for same in [generator.random() < 0.7]
    ]
    results = [0.5 if r["g1_winner"] != r["g2_winner"] else float(r["g1_winner"] == "model_1") for r in rows]
    found = win_rate_of(read(*rows).verdicts)
    assert found.rate.value == pytest.approx(np.mean(results))
    assert found.rate.count == 40  # the turns of a question are one cluster
    assert found.num_verdicts == 160


def test_scores_are_compared_with_the_baselines_on_the_same_question_turn_and_judge(read):
    def score(question, model, value, turn=1, judge="single-v1"):
        return SINGLE | {
            "question_id": question,
            "model": model,
            "score": value,
            "turn": turn,
            "judge": ["gpt-4", judge],
        }

    rows = [
        score(1, "mine", 8), score(1, "base", 6),
        score(1, "mine", 5.1, turn=2, judge="single-v1-multi-turn"),
        score(1, "base", 5, turn=2, judge="single-v1-multi-turn"),
        score(2, "mine", -1), score(2, "base", 4),
        score(3, "mine", 2), score(3, "base", 9),
        score(4, "mine", 7),
    ]  # fmt: skip
    found = read(*rows, rows[0], baseline="base")
    assert [(v.prompt, v.turn, v.verdict) for v in found.verdicts] == [("1", 1, 1.0), ("1", 2, 0.5), ("3", 1, 0.0)]
    assert (found.num_missing, found.num_unpaired, found.num_repeated) == (1, 1, 1)
    means = mean_scores(found.scores)
    assert [(row.model, row.turn) for row in means] == [
        ("base", None), ("base", 1), ("base", 2), ("mine", None), ("mine", 1), ("mine", 2)
    ]  # fmt: skip
    assert means[3].score.value == pytest.approx((8 + 5.1 + 2 + 7) / 4)  # without the -1


def test_games_of_arena_hard_begin_with_the_baseline_and_strong_verdicts_count_three_times(read):
    first, second = read(GAMES).verdicts
    assert (first.prompt, first.model, first.baseline, first.judge) == ("328c149e", "mine", "base", "gpt-4.1")
    assert (first.verdict, first.weight, first.shown_first) == (0.0, 3, "baseline")
    assert (second.verdict, second.weight, second.shown_first) == (1.0, 1, "model")
    found = win_rate_of([first, second])
    assert found.rate.value == 0.5
    assert found.weighted.value == pytest.approx(1 / 4)
    assert found.weighted.count == 1


def test_the_weighted_rate_is_the_score_that_arena_hard_computes(read):
    """Its show_result.py, as a slow loop: each game is a list of battles for A, those of game 1 are turned, and the
    score is the mean over all battles."""
    battles = {"A>B": [1], "A>>B": [1] * 3, "A=B": [0.5], "A<<B": [0] * 3, "A<B": [0], "B>A": [0], "B>>A": [0] * 3,
               "B=A": [0.5], "B<<A": [1] * 3, "B<A": [1]}  # fmt: skip
    generator = np.random.default_rng(1)
    rows, scores = [], []
    for i in range(60):
        one, two = generator.choice(list(battles), size=2)
        rows.append(GAMES | {"uid": str(i), "games": [{"score": str(one)}, {"score": str(two)}]})
        scores += battles[two] + [1 - x for x in battles[one]]
    found = win_rate_of(read(*rows).verdicts)
    assert found.weighted.value == pytest.approx(np.mean(scores))
    assert found.weighted.low < found.weighted.value < found.weighted.high
    assert win_rate_of(read(PAIR).verdicts).weighted is None


def test_arena_hard_before_version_2_needs_the_name_of_its_baseline(read):
    old = {"question_id": "q", "model": "mine", "judge": "gpt-4", "games": [{"score": "A=B"}, {"score": None}]}
    found = read(old, baseline="gpt-4-0314")
    assert [(v.model, v.baseline, v.verdict) for v in found.verdicts] == [("mine", "gpt-4-0314", 0.5)]
    assert found.num_missing == 1
    with pytest.raises(DataError, match="the row has no baseline") as refused:
        read(old)
    assert "--baseline" in refused.value.fix


def test_games_without_an_answer_of_the_judge_are_missing(read):
    found = read(GAMES | {"games": [None, {"score": "B>A"}]})
    assert [v.verdict for v in found.verdicts] == [0.0]
    assert found.num_missing == 1


def test_peoples_votes_of_mt_bench_have_the_replies_of_their_turn_and_one_match_up_for_two_models(read):
    turned = HUMAN | {"model_a": "alpaca", "model_b": "zephyr", "winner": "tie (bothbad)", "judge": "expert_1"}
    found = read(HUMAN, turned).verdicts
    assert [(v.model, v.baseline, v.verdict) for v in found] == [("alpaca", "zephyr", 0.0), ("alpaca", "zephyr", 0.5)]
    assert (found[0].reply, found[0].baseline_reply, found[0].length) == ("zwei", "second", 4)
    assert list(by_matchup(found)) == [("alpaca", "zephyr")]


def test_votes_of_an_export_count_as_its_project_counts_them(read):
    rows = [
        VOTE,
        VOTE | {"annotator": "ben", "choice": "cannot_judge"},
        VOTE | {"annotator": "cleo", "banned": True},
        VOTE | {"annotator": "dan", "purpose": "gold"},
        VOTE | {"annotator": "eve", "choice": "both_bad", "shown_left": ""},
    ]
    found = read(*rows)
    assert [(v.prompt, v.model, v.baseline, v.judge) for v in found.verdicts] == [
        ("g1", "base", "mine", "anna"),
        ("g1", "base", "mine", "eve"),
    ]
    assert [(v.verdict, v.shown_first) for v in found.verdicts] == [(0.0, "model"), (0.5, None)]
    assert found.num_missing == 3
    against = read(*rows, baseline="base").verdicts[0]
    assert (against.model, against.verdict, against.shown_first) == ("mine", 1.0, "baseline")


def test_a_verdict_that_is_turned_twice_is_itself_and_is_read_back_from_its_row(read):
    verdict = PairVerdict(
        prompt="p", model="m", baseline="b", verdict=0.25, shown_first="model", judge="j", turn=2, weight=3
    ).with_replies("", "other")
    assert verdict.turned().turned() == verdict
    assert (verdict.turned().verdict, verdict.turned().shown_first, verdict.turned().reply) == (
        0.75,
        "baseline",
        "other",
    )
    (found,) = read(verdict_row(verdict)).verdicts
    assert verdict_row(found) == verdict_row(verdict)
    assert "weight" not in verdict_row(PairVerdict(prompt="p", model="m", baseline="b", verdict=0.0))


def test_the_same_judgement_from_both_sides_is_counted_once_with_a_baseline(read):
    row = {"prompt": "p", "model": "m", "baseline": "b", "verdict": 1.0, "shown_first": "model"}
    other = {"prompt": "p", "model": "b", "baseline": "m", "verdict": 0.0, "shown_first": "baseline"}
    found = read(row, other, baseline="b")
    assert (len(found.verdicts), found.num_repeated) == (1, 1)
    with pytest.raises(DataError, match="no verdict is on 'x'"):
        read(row, baseline="x")


@pytest.mark.parametrize(
    ("rows", "options", "problem", "where", "fix"),
    [
        ([PAIR, PAIR | {"question_id": 9, "g2_winner": "A"}], {}, "g2_winner is 'A'", "row 2", "model_1"),
        ([PAIR | {"question_id": None}], {}, "question_id is None", "row 1", "name of its question"),
        ([PAIR | {"model_2": 7}], {}, "the model_2 is 7", "row 1", "model_2 as text"),
        ([PAIR | {"turn": 0}], {}, "turn is 0", "row 1", "whole number"),
        ([PAIR, PAIR | {"g1_winner": "tie"}], {}, "contradict each other", "row 1 and", "remove one"),
        ([SINGLE], {}, "no verdicts without a baseline", "row 1", "--baseline with one of mine"),
        ([SINGLE], {"baseline": "x"}, "the baseline 'x' has no scores", "row 1", "one of mine"),
        ([SINGLE | {"score": 11}], {"baseline": "mine"}, "score is 11", "row 1", "-1"),
        ([SINGLE | {"score": "good"}], {"baseline": "mine"}, "score is 'good'", "row 1", "-1"),
        ([SINGLE, SINGLE | {"score": 3}], {"baseline": "mine"}, "two scores of 'mine'", "row 1 and", "remove one"),
        ([GAMES | {"games": [{"score": "A>>>B"}, {"score": "A>B"}]}], {}, "games[0].score is 'A>>>B'", "row 1", "null"),
        ([GAMES | {"games": [{"score": "A>B"}]}], {}, "two games are needed", "row 1", "pairwise"),
        ([HUMAN | {"winner": "left"}], {}, "winner is 'left'", "row 1", "model_a"),
        ([VOTE | {"choice": "4"}], {}, "choice is '4'", "row 1", "votes over two replies"),
        ([VOTE | {"shown_left": "x"}], {}, "shown_left is 'x'", "row 1", "A or B"),
        ([{"question_id": 1, "model_1": "a", "g1_winner": "tie"}], {}, "without model_2", "row 1", "fastchat_pair"),
    ],
)
def test_bad_rows_are_refused(read, rows, options, problem, where, fix):
    with pytest.raises(DataError) as refused:
        read(*rows, **options)
    assert problem in refused.value.problem
    assert where in refused.value.where
    assert fix in refused.value.fix


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"reply": 3}, "the reply is 3"),
        ({"reply": "abc", "length": 2}, "a length of 2, and the reply has 3 characters"),
        ({"weight": 1.5}, "weight is 1.5"),
    ],
)
def test_bad_cells_of_plain_rows_are_refused(read, more, problem):
    with pytest.raises(DataError) as refused:
        read({"prompt": "p", "model": "m", "baseline": "b", "verdict": 1.0} | more)
    assert problem in refused.value.problem


def test_replies_of_answers_are_those_of_the_turn_that_was_judged(read):
    turns = {("81", "mine"): ("a", "bb"), ("81", "base"): ("ccc", "dddd")}
    answers = Answers(turns=turns, sha256={"answers": ""})
    rows = [PAIR, PAIR | {"turn": 2}, PAIR | {"question_id": 82}]
    found = read(*rows, answers=answers)
    assert [(v.reply, v.baseline_reply) for v in found.verdicts] == [
        ("a", "ccc"), ("a", "ccc"), ("bb", "dddd"), ("bb", "dddd"), (None, None), (None, None)
    ]  # fmt: skip
    assert (found.verdicts[2].length, found.verdicts[2].baseline_length) == (2, 4)
    assert found.num_unanswered == 2
    with pytest.raises(DataError, match="hold no two replies that were compared") as refused:
        read(PAIR | {"question_id": 82}, answers=answers)
    assert "of all models" in refused.value.fix
