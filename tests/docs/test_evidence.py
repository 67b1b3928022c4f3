"""The tables of the evidence pages are those that the scripts of the repository write from the committed data."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.core import registry
from trimtab.core.files import write_rows
from trimtab.evals.pareto import hypervolume
from trimtab.evals.suites.suite import load_suite

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"


def data(name):
    return json.loads((EVIDENCE / "data" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch):
    """A function that imports a benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def page_text(page):
    return (EVIDENCE / f"{page}.md").read_text(encoding="utf-8")


def assert_on_page(page, table):
    text = page_text(page).splitlines()
    missing = [line for line in table.splitlines() if line not in text]
    assert not missing, f"{page}.md lacks what its script writes from its data:\n" + "\n".join(missing)


def test_the_table_of_speed_is_that_of_its_data(script):
    for name in ("speed", "speed_avx512", "speed_avx2"):
        assert_on_page("speed", script("speed").table(data(name)["workloads"]))


def test_the_tables_of_large_files_are_those_of_their_data(script):
    for name in ("size", "size_avx512"):
        assert_on_page("firm-ground", script("size").table(data(name)["files"]))


def test_the_table_of_the_quickstart_over_seeds_is_that_of_its_data(script):
    assert_on_page("spine", script("spine").table(data("spine")))


def test_the_table_of_all_algorithms_is_that_of_its_data(script):
    found = data("algorithms")
    assert_on_page("algorithms", script("algorithms").table(found["runs"], found["over_seeds"]))


def test_the_table_of_runs_in_several_processes_is_that_of_its_data(script):
    assert_on_page("engines", script("workers").table(data("workers")))
    assert_on_page("engines", script("workers").table(data("engines_vllm")))


def test_the_table_of_rollouts_by_vllm_is_that_of_its_data(script):
    assert_on_page("engines", script("vllm_rollouts").table(data("vllm_rollouts")))


def test_the_tables_of_rollouts_that_lag_are_those_of_their_data(script):
    staleness, found = script("staleness"), data("staleness")
    assert found["compared_with_lag_0"] == staleness.compared(found["runs"])
    assert_on_page("engines", staleness.table(found["runs"]))
    assert_on_page("engines", staleness.table_of_differences(found["compared_with_lag_0"]))


def test_the_table_of_steps_on_a_gpu_is_that_of_its_data(script):
    assert_on_page("engines", script("gpu").table(data("gpu")))


def test_the_table_of_memory_of_several_processes_is_that_of_its_data(script):
    found = data("plan_processes")
    assert_on_page("engines", script("plan_memory").table(found))
    assert all(0.9 < row["ratio"] < 1.1 for row in found.values())


def test_the_tables_of_plans_on_paper_are_those_of_their_data(script):
    paper, found = script("paper_plans"), data("paper_plans")
    for table, name in ((paper.gpu_table, "gpu"), (paper.cpu_table, "cpu"), (paper.plans_table, "plans")):
        assert_on_page("engines", table(found[name]))


def test_plans_on_paper_are_made_again_as_they_are_committed(script):
    paper, found = script("paper_plans"), data("paper_plans")
    made = {"gpu": paper.on_the_gpu(data("gpu")), "cpu": paper.on_cpus(data("plan")), "plans": paper.of_large_models()}
    for name, rows in json.loads(json.dumps(made)).items():
        assert rows == found[name]


def test_the_table_of_sampling_beside_vllm_is_that_of_its_data(script):
    assert_on_page("engines", script("sampling_vllm").table(data("sampling_vllm")))


def test_the_table_of_the_house_is_that_of_its_data(script):
    assert_on_page("house", script("rooms").table(data("house")))
    long = data("house")["after"]["long_functions"].values()
    assert f"{len(long)} are left, the longest of {max(long)}." in page_text("house")


@pytest.mark.parametrize("part", ["kwise", "ensemble"])
def test_the_tables_of_reward_models_are_those_of_their_data(script, part):
    assert_on_page("reward-models", script("reward_models").TABLES[part](data("reward_models")[part]))


@pytest.mark.parametrize("part", ["length", "fair", "distil"])
def test_the_tables_of_corrections_and_students_are_those_of_their_data(script, part):
    assert_on_page("reward-models", script("reward_tools").TABLES[part](data("reward_tools")[part]))


def test_the_table_of_a_limit_on_harm_is_that_of_its_data(script):
    objectives, found = script("objectives"), data("objectives")
    assert found["over_seeds"] == objectives.over_seeds(found["runs"])
    assert_on_page("reward-models", objectives.table(found["runs"], found["over_seeds"]))


def test_the_table_of_the_front_is_that_of_its_data(script):
    front, found = script("front"), data("front")
    assert found["over_seeds"] == front.over_seeds(found["seeds"])
    for row in found["seeds"]:
        points = [(point["helpfulness"], point["harmless"]) for point in row["points"]]
        assert hypervolume(points, tuple(found["reference"])) == pytest.approx(row["hypervolume"])
        assert row["front"] == front.front_of(row["points"])
    assert_on_page("reward-models", front.table(found["seeds"], found["over_seeds"]))


def test_the_tables_of_process_rewards_are_those_of_their_data(script):
    process, found = script("process_rewards"), data("process_rewards")
    runs, means = found["runs"], found["over_seeds"]
    assert means == process.over_seeds(runs)
    assert_on_page("reward-models", process.choosing_table(means))
    assert_on_page("reward-models", process.ppo_table(runs, means))
    assert_on_page("reward-models", process.differences_table(runs, means))


def test_a_vote_is_the_mean_over_all_draws_of_so_many_replies(script):
    vote = script("process_rewards").vote
    answers, right = ["7", "7", "8", None, "8", "8"], np.array([0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    sizes = [1, 2, 3, 6]
    expected = []
    for n in sizes:
        outcomes = []
        for drawn in itertools.combinations(range(6), n):
            counts = Counter(answers[i] for i in drawn if answers[i] is not None)
            first = [answer for answer, count in counts.items() if count == max(counts.values())]
            outcomes.append(statistics.fmean(answer == "8" for answer in first) if first else 0.0)
        expected.append(statistics.fmean(outcomes))
    assert vote(answers, right, 0, sizes=sizes, trials=4000) == pytest.approx(expected, abs=0.02)
    assert vote(answers, right, 1, sizes=[6], trials=1) == 1.0
    assert vote([None, None], np.zeros(2), 0, sizes=[2], trials=1) == 0.0


def test_the_tables_of_overoptimisation_are_those_of_their_data(script):
    overoptimisation, found = script("overoptimisation"), data("overoptimisation")
    assert found["over_seeds"] == overoptimisation.over_seeds(found["runs"])
    assert_on_page("reward-models", overoptimisation.table(found["over_seeds"]))


def test_votes_are_turned_round_as_often_as_is_said(script, tmp_path):
    votes_of = script("overoptimisation").votes_of
    pairs = [
        {"prompt": {"id": f"p{i // 5}"}, "chosen": f"a{i}", "rejected": f"b{i}", "label": 1.0} for i in range(2000)
    ]
    (tmp_path / "compare").mkdir()
    write_rows(tmp_path / "compare" / "train.jsonl", pairs)
    write_rows(tmp_path / "compare" / "held_out.jsonl", [pair for pair in pairs[:400] for _ in range(3)])
    plain, noisy = (
        script("overoptimisation").rows_of(
            votes_of(tmp_path, tmp_path / f"noise-{noise}", 3, num_prompts=200, noise=noise).train
        )
        for noise in (0.0, 0.25)
    )
    assert script("overoptimisation").rows_of(tmp_path / "noise-0.25" / "few.jsonl") == pairs[:100]
    assert len({row["prompt"]["id"] for row in plain}) == 200
    assert all(row in pairs for row in plain)
    turned = [one != other for one, other in zip(plain, noisy, strict=True)]
    assert statistics.fmean(turned) == pytest.approx(0.25, abs=0.04)
    assert all(
        other == one | {"chosen": one["rejected"], "rejected": one["chosen"]}
        for one, other, is_turned in zip(plain, noisy, turned, strict=True)
        if is_turned
    )


def test_a_result_names_its_command_without_paths(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "front.py")])
    options = argparse.Namespace(out=tmp_path, seeds=[0, 1], weights=[], rate=2.0, train_prompts=8)
    command = "python benchmarks/front.py --seeds 0 1 --weights --rate 2.0 --train-prompts 8"
    assert script("results").command_of(options) == command


def test_the_tables_of_win_rates_are_those_of_their_data(script):
    win_rates, found = script("win_rates"), data("win_rates")
    assert_on_page("guard", win_rates.summary(found["alpaca_eval"]))
    assert_on_page("guard", win_rates.table(found["alpaca_eval"]))
    assert_on_page("guard", win_rates.null_table(found["null"]))
    assert_on_page("guard", win_rates.style_table(found["style"]))
    assert_on_page("guard", win_rates.style_rates_table(found["style"]))
    assert_on_page("guard", win_rates.people_table(found["people"]))
    assert f"the judge's win rate of {100 * found['null']['styled']['raw']:.0f}%" in page_text("guard")
    assert f"{found['people']['rows'][0]['pairs']} pairs of {found['people']['prompts']} questions" in page_text(
        "guard"
    )


def test_the_tables_of_failures_made_on_purpose_are_those_of_their_data(script):
    doctor, found = script("doctor"), data("doctor")
    assert_on_page("guard", doctor.summary(found["cases"]))
    assert_on_page("guard", doctor.table(found["cases"]))
    assert_on_page("guard", doctor.confusion_table(found["cases"]))
    assert found["confusion"] == doctor.confusion(found["cases"])


def test_a_failure_counts_as_mended_if_it_is_gone_and_the_run_is_not_worse(script):
    doctor = script("doctor")
    gone = [{"changes": {"kl.coef": 0.1}, "found": [], "error": ""}]
    row = {"case": "no KL coefficient", "expected": "reward_hacking", "found": ["reward_hacking"], "attempts": gone}

    def mended(**other):
        return doctor.is_mended(row | {"difference": [-0.01, -0.03, 0.01]} | other)

    assert mended()
    assert not mended(difference=[-0.03, -0.05, -0.01])
    assert not mended(difference=[None, None, None])
    assert not mended(found=["kl_explosion"])
    assert not mended(attempts=[])
    assert not mended(attempts=[gone[0] | {"found": ["reward_hacking"]}])
    assert not mended(attempts=[gone[0] | {"error": "EngineError: the loss became nan"}])
    # a reward that pays for the failure alone has no better policy
    assert "reward for length" in doctor.REWARD_IS_WRONG
    assert mended(case="reward for length", difference=[-0.3, -0.4, -0.2])
    without = {key: value for key, value in row.items() if key != "difference"}
    assert doctor.is_mended(without), "a run that ended in an error is no better than any"


@pytest.mark.parametrize("part", ["ifeval", "refusals", "coverage", "real", "truthful_qa"])
def test_the_tables_of_suites_are_those_of_their_data(script, part):
    for table in script("suites").TABLES[part]:
        assert_on_page("guard", table(data("suites")[part]))


def test_the_page_of_suites_has_the_agreement_with_people_and_every_suite():
    page = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")
    assert f"kappa is {data('suites')['refusals']['held out']['kappa'][0]:.2f}" in page
    for name in registry.modules("suite"):
        assert f"\n| `{name}` | " in page
        assert load_suite(name).files[0].split("/")[0] in page


def test_the_table_of_the_live_view_is_that_of_its_data(script):
    assert_on_page("ui", script("ui_speed").table(data("ui_speed")))


def test_memory_as_planned_is_that_of_its_data():
    text = (EVIDENCE / "speed.md").read_text(encoding="utf-8")
    for name, found in data("plan").items():
        cells = f"| {found['predicted_gb']:.2f} GB | {found['measured_gb']:.2f} GB | {found['ratio']:.2f} |"
        assert any(line.startswith(f"| {name}") and line.endswith(cells) for line in text.splitlines()), (name, cells)


@pytest.mark.parametrize("part", ["attention", "bits", "resume", "sft", "rl", "sampling"])
def test_the_script_for_a_gpu_runs_dry(script, part):
    gpu = script("gpu")
    found = gpu.PARTS[part](gpu.Place(torch.device("cpu"), dry=True))
    assert found
    assert "failed" not in found


def test_every_file_of_data_is_made_by_a_script_or_a_test_of_this_repository():
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("test_*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in scripts if path != Path(__file__))
    for path in (EVIDENCE / "data").glob("*.json"):
        assert path.name in sources, path.name


def test_the_table_of_passes_over_the_votes_is_that_of_its_data(script):
    assert_on_page("reward-models", script("reward_limit").table(data("reward_limit")["runs"]))


def test_the_tables_of_the_guard_are_those_of_their_data(script):
    guard = script("guard")
    assert_on_page("guard", guard.rates_table(data("guard_rates")["runs"]))
    runs = data("guard_runs")["runs"]
    assert_on_page("guard", guard.runs_table(runs))
    assert_on_page("guard", guard.runs_summary(runs))
    hacks, healthy = data("guard_hacks")["runs"], data("guard_healthy")["runs"]
    for table in (guard.hacks_summary(hacks), guard.hacks_table(hacks), guard.healthy_table(healthy)):
        assert_on_page("guard", table)


def test_the_false_alarms_of_the_guard_are_counted_again(script):
    guard = script("guard")
    again = guard.rates(40, 64)[0]
    assert again["num_alarms"] <= 6
    assert again["num_alarms_uncorrected"] > 20
