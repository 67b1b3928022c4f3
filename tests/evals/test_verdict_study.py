from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from trimtab import cli
from trimtab.evals.length_control import OutcomeTable, difficulties
from trimtab.evals.verdict_files import read_verdicts
from trimtab.evals.verdict_study import study_verdicts
from trimtab.evals.verdicts import PairVerdict
from trimtab.evals.win_rate import by_matchup

ALPACA = Path(__file__).parents[2].parent / "shared" / "data" / "nc" / "alpaca_eval"
real_data = pytest.mark.skipif(not ALPACA.is_dir(), reason="needs the annotations in ../shared/data/nc/alpaca_eval")
STRENGTHS = {"base": 0.0, "good": 1.0, "fair": 0.3, "poor": -1.0}


def rows(num=150, models=("poor", "good", "fair"), **more):
    """Rows of verdicts that follow Bradley and Terry's model."""
    generator = np.random.default_rng(4)
    return [
        {"prompt": f"p{i}", "model": model, "baseline": "base", "verdict": float(generator.random() < chance), **more}
        for model in models
        for chance in [1 / (1 + np.exp(-STRENGTHS[model]))]
        for i in range(num)
    ]


def verdicts(given):
    return [PairVerdict(**row) for row in given]


@pytest.fixture
def command(tmp_path):
    """A function that writes rows to a file and runs `trimtab eval verdicts` on it."""

    def run(given, *options):
        path = tmp_path / "verdicts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        return CliRunner().invoke(cli.main, ["eval", "verdicts", str(path), *map(str, options)])

    return run


def test_models_are_in_the_order_of_their_rates_and_pairs_with_the_better_first():
    study = study_verdicts(verdicts(rows()))
    assert [row.model for row in study.win_rates] == ["good", "fair", "poor"]
    assert [(row.model, row.other) for row in study.differences] == [
        ("good", "fair"),
        ("good", "poor"),
        ("fair", "poor"),
    ]
    assert all(row.difference.value > 0 for row in study.differences)


def test_the_ladder_is_the_log_odds_where_all_compare_with_one_baseline():
    study = study_verdicts(verdicts(rows()))
    elo = {player.name: player.elo.value for player in study.ladder.players}
    for row in study.win_rates:
        odds = row.rate.value / (1 - row.rate.value)
        assert elo[row.model] - elo["base"] == pytest.approx(400 * np.log10(odds), abs=1e-3)


def test_two_models_need_no_ladder_and_models_that_cannot_be_rated_are_noted():
    assert study_verdicts(verdicts(rows(models=["good"]))).ladder is None
    won = [row | {"verdict": 1.0} for row in rows(models=["good", "fair"])]
    study = study_verdicts(verdicts(won))
    assert study.ladder is None
    assert any("no ladder" in note for note in study.notes)


def test_prompts_in_one_order_only_are_noted():
    study = study_verdicts(verdicts(rows(num=5, models=["good"], shown_first="model")))
    assert any("5 of 5 prompts were judged in one order only" in note for note in study.notes)


def test_two_models_with_swapped_sides_are_noted(command):
    given = rows(40, models=("good",))
    turned = [row | {"model": "base", "baseline": "good", "verdict": 1 - row["verdict"]} for row in given[:20]]
    result = command([*turned, *given[20:]])
    assert result.exit_code == 0, result.output
    assert "base and good are each the baseline of the other in some verdicts" in result.output
    whole = command([*turned, *given[20:]], "--baseline", "base")
    assert "each the baseline" not in whole.output
    assert f"{sum(row['verdict'] for row in given) / 40:.1%}" in whole.output


def test_orders_judged_unequally_often_are_noted_and_weigh_the_same_in_the_ladder():
    """With the model first thrice as often a judge of positions would put it at the top of the ladder too."""
    given = [
        {"prompt": f"p{i}", "model": model, "baseline": "base", "verdict": value, "shown_first": side, "judge": str(j)}
        for i in range(20)
        for model in ("often", "once")
        for side, value, num in (("model", 0.9, 3 if model == "often" else 1), ("baseline", 0.1, 1))
        for j in range(num)
    ]
    study = study_verdicts(verdicts(given))
    assert [row.rate.value for row in study.win_rates] == pytest.approx([0.5, 0.5])
    elo = [player.elo.value for player in study.ladder.players]
    assert elo == pytest.approx([elo[0]] * 3, abs=1e-6)
    noted = [note for note in study.notes if "more often in one order" in note]
    assert len(noted) == 1
    assert "often against base: 20 of 20 prompts" in noted[0]


def test_length_control_notes_that_variants_are_missing_and_that_nothing_is_left():
    given = [row | {"length": 5, "baseline_length": 6} for row in rows(num=100, models=["good", "fair"])]
    given = [row | {"verdict": 0.5} if row["model"] == "fair" else row for row in given]
    study = study_verdicts(verdicts(given), length_control=True)
    assert any("length control without --variant" in note for note in study.notes)
    assert [note[:17] for note in study.notes if "shrinks all weights to 0" in note] == ["fair against base"]
    named = study_verdicts(verdicts(given), length_control=True, variants=["fair"])
    assert not any("without --variant" in note for note in named.notes)


def test_few_models_and_extreme_changes_are_noted_by_length_control():
    longer = 1 + np.random.default_rng(0).normal(size=150)  # in spreads; what is longer wins
    given = [
        {**row, "baseline_length": 5000, "length": 5000 + int(500 * x), "verdict": 1 / (1 + np.exp(-2 * np.tanh(x)))}
        for row, x in zip(rows(models=["good"]), longer, strict=True)
    ]
    study = study_verdicts(verdicts(given), length_control=True)
    assert [row.model for row in study.length_controlled] == ["good"]
    assert any("fewer than 5 models" in note for note in study.notes)
    assert any("so far that the regression may have failed" in note for note in study.notes)


def test_the_command_prints_and_writes_everything(command, tmp_path):
    both = [row for side in ("model", "baseline") for row in rows(shown_first=side, length=10, baseline_length=12)]
    seen = {(row["model"], row["prompt"], row["shown_first"]): row for row in both}
    missing = {**both[0], "prompt": "another", "verdict": None}
    out = tmp_path / "found" / "study.json"
    result = command([*seen.values(), both[0], missing], "--length-control", "--out", out, "--half-width", "0.05")
    assert result.exit_code == 0, result.output
    for text in ("win rate", "at equal length", "reply shown first preferred", "p (Holm)", "ladder", "±5.0% takes"):
        assert text in result.output
    assert "1 judgements without a verdict are left out" in result.output
    assert "1 rows that repeat another exactly are left out" in result.output
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["num_verdicts"], written["num_missing"], written["num_repeated"]) == (900, 1, 1)
    assert written["settings"]["half_width"] == 0.05
    assert len(next(iter(written["sha256"].values()))) == 64
    assert len(written["study"]["win_rates"]) == 3
    assert written["study"]["win_rates"][0]["rate"]["count"] == 150


def test_names_are_printed_as_they_are_and_bounds_only_if_there_are_any(command):
    given = [
        {"prompt": f"p{i}", "model": model, "baseline": "base", "verdict": verdict}
        for i in range(4)
        for model, verdict in (("[b]one[/b]", 1.0), ("two", 0.0))
    ]
    result = command(given)
    assert result.exit_code == 0, result.output
    assert "[b]one[/b] and two against base" in result.output
    assert "+100.0 (n=4)" in result.output
    assert "nan" not in result.output
    assert "Shown are neighbours" not in result.output


def test_length_control_without_lengths_is_refused(command):
    result = command(rows(num=3), "--length-control")
    assert result.exit_code == 2
    assert "lacks the lengths" in result.output
    assert "row 1" in result.output


def test_a_variant_without_length_control_is_refused(command):
    result = command(rows(num=3), "--variant", "poor")
    assert result.exit_code == 2
    assert "--variant without --length-control" in result.output


@pytest.mark.parametrize("width", ["nan", "0", "0.6"])
def test_a_half_width_that_is_none_is_a_message(command, width):
    result = command(rows(num=3), "--half-width", width)
    assert result.exit_code == 2
    assert "Invalid value for '--half-width'" in result.output


def test_a_misspelt_column_is_told_and_names_cannot_steer_the_terminal(command, tmp_path):
    named = {"model": "\x1b[31mgood\x07", "shown_frist": "model"}
    given = [row | named for row in rows(20, models=("good",))]
    result = command(given, "--out", tmp_path / "study.json")
    assert result.exit_code == 0, result.output
    assert "columns that are not read: shown_frist" in result.output
    assert json.loads((tmp_path / "study.json").read_text())["not_read"] == ["shown_frist"]
    assert "␛[31mgood␇" in result.output
    assert "\x1b" not in result.output
    refused = command(given, "--baseline", "none")
    assert refused.exit_code == 2
    assert "good␇" in refused.output


def test_a_bad_verdict_is_a_message(command):
    result = command([*rows(num=3), rows(num=1)[0] | {"verdict": 7}])
    assert result.exit_code == 2
    assert "a verdict of 7" in result.output


@real_data
def test_raw_rates_of_alpaca_eval_are_the_published_ones_within_what_a_part_can_say():
    # The annotations here are 601 of 805 prompts. The mean of a part drawn without replacement has the standard error
    # sd sqrt(1 / 601 - 1 / 805), which is up to 0.8 points: not every model can be within 0.5.
    with gzip.open(ALPACA / "leaderboard.jsonl.gz", "rt") as file:
        board = {row["name"]: row for row in map(json.loads, file)}
    study = study_verdicts(read_verdicts([ALPACA / "annotations.jsonl.gz"]).verdicts)
    found = [row for row in study.win_rates if board[row.model]["leaderboard_win_rate"] is not None]
    assert len(found) == 24
    errors, scores = [], []
    for row in found:
        published = board[row.model]
        num, num_all = row.rate.count, published["n_total"]
        errors.append(100 * row.rate.value - published["leaderboard_win_rate"])
        spread = published["leaderboard_standard_error"] * num_all**0.5
        scores.append(errors[-1] / (spread * (1 / num - 1 / num_all) ** 0.5))
    assert np.abs(errors).max() < 1.2
    assert np.abs(scores).max() < 3
    assert np.mean(np.square(scores)) == pytest.approx(1, abs=0.6)  # models share prompts, so it varies widely


@real_data
def test_with_the_published_weight_of_length_the_rates_of_alpaca_eval_are_near_the_published_ones(monkeypatch):
    # Beside the prompts that are not here, only the difficulties differ: they are estimated from the other models.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    win_rates = importlib.import_module("win_rates")
    with gzip.open(ALPACA / "leaderboard.jsonl.gz", "rt") as file:
        board = {row["name"]: row["leaderboard_length_controlled_winrate"] for row in map(json.loads, file)}
    matchups = by_matchup(read_verdicts([ALPACA / "annotations.jsonl.gz"]).verdicts)
    tables = {model: OutcomeTable.of(rows) for (model, _), rows in matchups.items()}
    errors = []
    for model, phi in win_rates.PUBLISHED_PHI.items():
        hard = difficulties([table for name, table in tables.items() if name != model])
        errors.append(100 * win_rates.with_phi(tables[model], hard, phi) - board[model])
    assert len(errors) == 19
    assert np.abs(errors).mean() < 1.5
    assert np.abs(errors).max() < 3.5
