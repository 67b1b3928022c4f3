"""What changed between two runs, and when it is called more than noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner

from tests.reports.fabricate import write_pipeline, write_run
from trimtab import cli
from trimtab.reports.collect import RunRecord, collect
from trimtab.reports.difference import differing, figure_rows, input_rows, judged, noise_sentences, settings_rows


def invoke(*arguments: object):
    return CliRunner().invoke(cli.main, [*map(str, arguments)], prog_name="trimtab")


def replies(gold: dict[str, list[float]], *, step: int = 1, **more: float) -> list[dict]:
    scores = [(prompt, score) for prompt, several in gold.items() for score in several]
    return [{"step": step, "prompt": prompt, "response": "r", "gold": score, **more} for prompt, score in scores]


def run(samples: list[dict], **other) -> RunRecord:
    return RunRecord(name="run", stage="online", samples=tuple(samples), **{"settings": {"world": "helpdesk"}} | other)


def test_settings_are_compared_by_key_path():
    first = {"seed": 0, "loss": {"name": "ppo"}, "rewards": [{"name": "gold"}], "same": [1, 2]}
    second = {"seed": 1, "loss": {"name": "ppo", "clip": 0.1}, "rewards": [{"name": "model"}], "same": [1, 2]}
    assert differing([first, second]) == [
        ("seed", "0", "1"),
        ("rewards.0.name", "gold", "model"),
        ("loss.clip", "–", "0.1"),
    ]
    assert settings_rows([RunRecord(name="a", stage="sft"), RunRecord(name="b", stage="online")]) == [
        ("stage", "sft", "online")
    ]


def test_data_and_models_are_compared_by_their_digests():
    first = RunRecord(name="a", stage="sft", data={"d": {"sha256": "1" * 64, "rows": 3}}, models={"m": {"sha256": "a"}})
    second = RunRecord(
        name="b", stage="sft", data={"d": {"sha256": "2" * 64, "rows": 3}}, models={"m": {"sha256": "a"}}
    )
    assert input_rows([first, second]) == [("data d", "1" * 16 + " (3 rows)", "2" * 16 + " (3 rows)")]


def test_the_difference_is_that_of_the_means_of_each_prompt():
    names = [f"p{i}" for i in range(12)]
    first = {name: [0.1, 0.3] for name in names} | {"only here": [9.0]}
    second = {name: [0.2 + 0.01 * i] for i, name in enumerate(names)}
    (found,) = judged(run(replies(first)), run(replies(second)))
    # the mean of 0.00, 0.01, …, 0.11 above a mean of 0.2
    assert found.difference.value == pytest.approx(0.055)
    assert found.difference.count == 12
    assert 0 < found.difference.low < 0.055 < found.difference.high
    assert "on 12 prompts, step 1 and step 1, p = " in found.sentence
    assert "more than the noise" in found.sentence
    test = scipy.stats.ttest_1samp(0.01 * np.arange(12), 0)
    bounds = test.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))
    assert found.p_value == pytest.approx(test.pvalue)


def test_only_the_last_step_counts():
    names = [f"p{i}" for i in range(10)]
    old = replies({name: [0.0] for name in names}, step=1)
    first = old + replies({name: [0.5] for name in names}, step=9)
    second = replies({name: [0.5] for name in names}, step=4)
    (found,) = judged(run(first), run(second))
    assert found.sentence == "gold: the same on all 10 prompts, step 9 and step 4."


def test_equal_runs_are_called_different_no_more_often_than_the_interval_says():
    generator = np.random.default_rng(0)
    called = 0
    for _ in range(1000):
        sides = generator.normal(size=(2, 10))
        first, second = ({f"p{i}": [value] for i, value in enumerate(side)} for side in sides.tolist())
        (found,) = judged(run(replies(first)), run(replies(second)))
        called += "more than" in found.sentence
        assert ("not told from noise" in found.sentence) != ("more than" in found.sentence)
    # 5% of 1000 is 50, with a deviation of 7; a percentile bootstrap of 10 prompts calls about 90
    assert 30 <= called <= 70


def test_several_scores_are_judged_together():
    names = [f"p{i}" for i in range(10)]
    shifts = np.random.default_rng(1).normal(size=(4, 10))
    shifts = (shifts - shifts.mean(axis=1, keepdims=True)) / shifts.std(axis=1, ddof=1, keepdims=True)
    shifts += np.array([[1.5], [0.82], [0.1], [0.0]])  # t is sqrt(10) times as much
    rows = [{"step": 1, "prompt": name, "response": "r"} for name in names]
    settings = {"rewards": [{"name": "length"}]}
    first = run([row | dict.fromkeys("abcd", 0.0) for row in rows], settings=settings)
    second = run(
        [row | dict(zip("abcd", column.tolist(), strict=True)) for row, column in zip(rows, shifts.T, strict=True)],
        settings=settings,
    )
    found = {one.judge: one for one in judged(first, second)}
    alone = {judge: scipy.stats.ttest_1samp(row, 0).pvalue for judge, row in zip("abcd", shifts, strict=True)}
    ranked, largest = sorted(alone, key=alone.__getitem__), 0.0
    for rank, judge in enumerate(ranked):  # Holm by hand
        largest = max(largest, min(1.0, alone[judge] * (4 - rank)))
        assert found[judge].p_value == pytest.approx(largest)
    between = [judge for judge in "abcd" if alone[judge] <= 0.05 < found[judge].p_value]
    assert between
    assert all("not told from noise" in found[judge].sentence for judge in between)


def test_few_prompts_in_common_say_nothing():
    first = run(replies({f"a{i}": [0.0] for i in range(20)}))
    second = run(replies({f"a{i}": [1.0] for i in range(9)}))
    assert "cannot be said: the samples have 9 prompts in common" in noise_sentences(first, second)[0]
    assert "no scored samples" in noise_sentences(run([]), run([]))[0]


def test_rewards_of_other_scales_are_not_compared():
    samples = replies({f"p{i}": [0.5] for i in range(12)}, reward=1.0)
    first, second = (
        run(samples, settings={"world": "w", "rewards": [{"path": "a"}]}),
        run(samples, settings={"world": "w", "rewards": [{"path": "b"}]}),
    )
    gold, reward = judged(first, second)
    assert gold.difference is not None
    assert reward.difference is None
    assert "no common scale" in reward.sentence


MODEL = {"name": "model", "path": "m"}


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"reward_model": "a"}, {"reward_model": "b"}, "reward_model of the two"),
        ({"rewards": [MODEL]}, {"rewards": [MODEL], "combine": {"name": "gate"}}, "combine of the two"),
        ({"rewards": [MODEL], "shaping": {"clip": 1.0}}, {"rewards": [MODEL]}, "shaping of the two"),
        ({"rewards": [MODEL], "whiten_rewards": True}, {"rewards": [MODEL]}, "whiten_rewards of the two"),
        ({"rewards": [MODEL], "cost": {"limit": 1.0}}, {"rewards": [MODEL]}, "cost of the two"),
        ({"rewards": [MODEL]}, {}, "missing or damaged"),
        ({"reward_model": "m", "seed": 1}, {"reward_model": "m", "seed": 2}, None),
        ({"rewards": [MODEL]}, {"rewards": [MODEL], "world": "w"}, None),
    ],
)
def test_whatever_makes_a_reward_must_be_the_same(first, second, why):
    samples = [{**row, "gold": None} for row in replies({f"p{i}": [0.5] for i in range(12)}, reward=1.0)]
    for sides in ((first, second), (second, first)):
        (found,) = judged(*(run(samples, settings=side) for side in sides))
        assert found.judge == "reward"
        assert (found.difference is None) == (why is not None)
        assert why is None or why in found.sentence


@pytest.mark.parametrize("name", ["rewards", "reward_model", "ensemble"])
def test_a_model_that_makes_a_reward_must_be_the_same(name: str):
    settings = {
        "rewards": {"rewards": [MODEL]},
        "reward_model": {"reward_model": "m"},
        "ensemble": {"rewards": [{"name": "ensemble", "paths": ["k", "m"]}]},
    }[name]
    samples = [{**row, "gold": None} for row in replies({f"p{i}": [0.5] for i in range(12)}, reward=1.0)]
    for digests in ("12", ("1", None)):
        first, second = (
            run(samples, settings=settings, models={"m": {"sha256": digest}} if digest else {}) for digest in digests
        )
        assert "the model m is another one" in judged(first, second)[0].sentence
    first, second = (run(samples, settings=settings, models={"policy": {"sha256": digest}}) for digest in "12")
    assert judged(first, second)[0].difference is not None


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"world": "a"}, {"world": "a"}, True),
        ({"world": "a", "rewards": [{"name": "model"}]}, {"world": "a", "rewards": [{"name": "length"}]}, True),
        ({"world": "a"}, {"world": "b"}, False),
        ({"world": "a"}, {"rewards": [{"name": "gold", "world": "a"}]}, False),
        ({"rewards": [{"name": "gold", "part": "x"}]}, {"rewards": [{"name": "gold", "part": "y"}]}, False),
        ({"rewards": [{"name": "gold", "part": "x"}]}, {"rewards": [{"name": "gold", "part": "x"}]}, True),
    ],
)
def test_gold_is_one_scale_only_of_one_world_and_one_part(first, second, same):
    samples = replies({f"p{i}": [0.5] for i in range(12)})
    for sides in ((first, second), (second, first)):
        (found,) = judged(*(run(samples, settings=side) for side in sides))
        assert (found.difference is not None) == same


def test_figures_are_means_of_the_last_tenth(tmp_path: Path):
    metrics = [{"step": i, "loss/train": float(i), "time/step_seconds": 1.0} for i in range(1, 21)]
    first = collect(write_run(tmp_path / "a", stage="sft", metrics=metrics))
    second = collect(write_run(tmp_path / "b", stage="sft", metrics=metrics[:10]))
    assert figure_rows([first, second]) == [("steps", "20", "10"), ("loss/train", "19.5", "10")]


def test_the_command_tells_what_changed_and_writes_a_page(tmp_path: Path):
    metrics = [{"step": i, "loss/train": 1 / i} for i in range(1, 30)]
    samples = replies({f"[red]p{i}": [0.1 * i] for i in range(12)})
    for name, seed in (("a", 1), ("b", 2)):
        write_run(
            tmp_path / name,
            stage="online",
            metrics=metrics,
            samples=samples,
            settings=f'world = "w"\nnote = "[b]{seed}"\n',
        )
    found = invoke("report", "diff", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "page.html")
    assert found.exit_code == 0, found.output
    assert "[b]1" in found.output
    assert "gold: the same on all 12 prompts" in found.output
    assert "The same: data and models, machine and libraries." in found.output
    page = (tmp_path / "page.html").read_text()
    assert page.count('<svg class="chart"') == 1
    assert "<script" not in page


def test_damage_and_what_is_missing_are_not_called_the_same(tmp_path: Path):
    for name in ("a", "b"):
        write_run(tmp_path / name, stage="sft", metrics=[{"step": 3, "loss/train": 1.0}], summary={})
    (tmp_path / "a" / "environment.json").unlink()
    (tmp_path / "b" / "environment.json").write_text("{")
    (tmp_path / "b" / "data.json").unlink()
    (tmp_path / "a" / "data.json").write_text("{}")
    (tmp_path / "b" / "summary.json").unlink()
    found = invoke("report", "diff", tmp_path / "a", tmp_path / "b").output
    assert "b: not finished: 3 steps are logged" in found
    assert "a: not finished" not in found
    assert "b: environment.json is not a readable JSON object" in found
    assert "The same: settings." in found
    assert "Not recorded in every run, so not known to be the same: data and models, machine and libraries." in found


def test_pipelines_are_compared_stage_by_stage(tmp_path: Path):
    for name in ("a", "b"):
        write_pipeline(tmp_path / name)
    settings = tmp_path / "b" / "ppo" / "settings.toml"
    settings.write_text(settings.read_text().replace("coef = 0.05", "coef = 0.5"))
    found = invoke("report", "diff", tmp_path / "a", tmp_path / "b")
    assert found.exit_code == 0, found.output
    assert next(line for line in found.output.splitlines() if "kl.coef" in line).split() == ["kl.coef", "0.05", "0.5"]
    assert "# evaluate" in found.output


def test_a_run_and_a_pipeline_are_not_compared(tmp_path: Path):
    write_pipeline(tmp_path / "a")
    found = invoke("report", "diff", tmp_path / "a", tmp_path / "a" / "ppo")
    assert found.exit_code == 2
    assert "are a run and a pipeline" in found.output


@pytest.mark.parametrize(
    "words", [["{run}"], ["page", "{run}"], ["--out", "{page}", "{run}"], ["{run}", "--out", "{page}"]]
)
def test_the_page_of_a_run_needs_no_name_of_its_command(tmp_path: Path, words: list[str]):
    write_run(tmp_path / "run", stage="sft", metrics=[{"step": 1, "loss/train": 1.0}])
    found = invoke("report", *(word.format(run=tmp_path / "run", page=tmp_path / "page.html") for word in words))
    assert found.exit_code == 0, found.output
    assert (tmp_path / "page.html").exists() or (tmp_path / "run" / "report.html").exists()
    assert "diff" in invoke("report", "--help").output


def test_damaged_digests_do_not_stop_a_comparison(tmp_path: Path):
    for name in ("a", "b"):
        write_run(tmp_path / name, stage="sft")
        (tmp_path / name / "data.json").write_text(json.dumps({"d": 3}))
    assert invoke("report", "diff", tmp_path / "a", tmp_path / "b").exit_code == 0
