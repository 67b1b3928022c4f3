"""The tables of the evidence pages are those that the scripts of the repository write from the committed data."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from trimtab.core import registry
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
    for name in ("speed", "speed_avx512"):
        assert_on_page("speed", script("speed").table(data(name)["workloads"]))


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
    assert found["confusion"] == doctor.confusion(found["cases"])


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


def test_the_tables_of_the_guard_are_those_of_their_data(script):
    guard = script("guard")
    assert_on_page("guard", guard.rates_table(data("guard_rates")["runs"]))
    assert_on_page("guard", guard.runs_table(data("guard_runs")["runs"]))
    hacks, healthy = data("guard_hacks")["runs"], data("guard_healthy")["runs"]
    for table in (guard.hacks_summary(hacks), guard.hacks_table(hacks), guard.healthy_table(healthy)):
        assert_on_page("guard", table)


def test_the_false_alarms_of_the_guard_are_counted_again(script):
    guard = script("guard")
    again = guard.rates(40, 64)[0]
    assert again["num_alarms"] <= 6
    assert again["num_alarms_uncorrected"] > 20
