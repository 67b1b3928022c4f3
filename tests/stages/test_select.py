"""The select stage as a user runs it, and the pipelines that are made of it."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from tests.stages.commands import FAST, SHORT, rows, run_stage, summary, trimtab, without_times, write_run_file
from tests.stages.guarded import judge
from tests.stages.test_resume import kill_after, start, wait_for_rows
from trimtab import cli
from trimtab.core import config, registry
from trimtab.core.types import Demonstration, PreferencePair
from trimtab.data.layouts import load
from trimtab.stages.pipeline import resolve_stages

FILES = ("replies.jsonl", "best.jsonl", "pairs.jsonl")
EXAMPLES = cli.examples_dir() / "selection"


def settings(model, reward_run, **changed):
    return {
        "model": str(model),
        "prompts": "world:helpdesk?num=10",
        "rewards": [{"name": "model", "path": str(reward_run / "model")}],
        "world": "helpdesk",
        "replies_per_prompt": 4,
        "filter": {"finished": False},
        "pairs": "worst",
        "sampling": SHORT,
        "prompts_per_step": 3,
    } | changed


@pytest.fixture(scope="module")
def other_reward(tmp_path_factory, other, pairs):
    """A reward model that orders replies in another way than that of `reward_run`."""
    out = tmp_path_factory.mktemp("select") / "reward"
    return run_stage("reward", out, model=str(other), data=str(pairs), held_out=0.3, batch_size=10, optimizer=FAST)


def test_the_best_of_n_is_the_best_of_the_replies_on_file(tmp_path, base, reward_run):
    out = run_stage("select", tmp_path / "run", **settings(base, reward_run))
    best = load(Demonstration, out / "best.jsonl").records
    sampled = rows(out, "replies.jsonl")
    assert len(best) == len(sampled) == 10
    pairs = {p.prompt.id: p for p in load(PreferencePair, out / "pairs.jsonl").records}
    assert len(pairs) == 10
    for demonstration, row in zip(best, sampled, strict=True):
        assert len(row["replies"]) == 4
        ordered = sorted((r for r in row["replies"] if r["response"].strip()), key=lambda r: r["reward"])
        pair = pairs[demonstration.prompt.id]
        assert demonstration.response == pair.chosen == ordered[-1]["response"]
        assert pair.rejected == ordered[0]["response"]
        assert pair.margin == pytest.approx(ordered[-1]["reward"] - ordered[0]["reward"])
    found = summary(out)
    assert found["counts"]["replies"] == 40
    assert found["counts"]["chosen"] == found["counts"]["pairs"] == 10
    rewards = [[r["reward"] for r in row["replies"]] for row in sampled]
    curve = found["best_of"]["curve"]
    assert [point["n"] for point in curve] == [1, 2, 4]
    assert curve[0]["reward"] == pytest.approx(sum(map(sum, rewards)) / 40)
    assert curve[2]["reward"] == pytest.approx(sum(map(max, rewards)) / 10)
    assert "Reward of the best of n" in (out / "report.html").read_text(encoding="utf-8")
    assert len(rows(out, "samples.jsonl")) == 10


def test_the_seed_decides_and_the_size_of_a_step_does_not(tmp_path, base, reward_run):
    one, apart, other = (
        run_stage("select", tmp_path / name, **settings(base, reward_run, prompts_per_step=size, seed=seed))
        for name, size, seed in (("one", 10, 0), ("apart", 1, 0), ("other", 10, 1))
    )

    def texts(out):
        best = [d.response for d in load(Demonstration, out / "best.jsonl").records]
        pairs = [(p.chosen, p.rejected) for p in load(PreferencePair, out / "pairs.jsonl").records]
        return [[r["response"] for r in row["replies"]] for row in rows(out, "replies.jsonl")], best, pairs

    assert texts(one) == texts(apart)
    assert texts(one) != texts(other)
    rewards = [[r["reward"] for row in rows(out, FILES[0]) for r in row["replies"]] for out in (one, apart)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_fewer_replies_are_the_first_of_more(tmp_path, base, reward_run):
    few, many = (
        run_stage("select", tmp_path / str(n), **settings(base, reward_run, replies_per_prompt=n, pairs="none"))
        for n in (2, 5)
    )
    for one, other in zip(rows(few, FILES[0]), rows(many, FILES[0]), strict=True):
        assert [r["response"] for r in one["replies"]] == [r["response"] for r in other["replies"][:2]]


def test_killed_once_and_run_again_it_ends_with_the_same_files(tmp_path, base, reward_run):
    values = settings(base, reward_run, prompts_per_step=1, prompts="world:helpdesk?num=48")
    undisturbed = run_stage("select", tmp_path / "undisturbed", **values)
    run_file, out = write_run_file(tmp_path / "run.toml", values), tmp_path / "run"
    process = start("select", run_file, out)
    wait_for_rows(process, out, 3)
    assert kill_after(process, random.Random(0).uniform(0, 0.05)), "it was to be killed at work"
    assert not (out / "summary.json").exists()
    run_stage("select", out, **values)
    for name in (*FILES, "samples.jsonl", "summary.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert without_times(rows(out)) == without_times(rows(undisturbed))


def test_one_reward_may_decide_what_passes_and_their_sum_what_is_best(tmp_path, base, other_reward, reward_run):
    rewards = [{"name": "model", "path": str(run / "model")} for run in (reward_run, other_reward)]
    values = settings(base, reward_run, rewards=rewards, pairs="none")
    replies = [r for row in rows(run_stage("select", tmp_path / "all", **values), FILES[0]) for r in row["replies"]]
    for r in replies:
        assert r["reward"] == pytest.approx(r["parts"]["model"] + r["parts"]["model_2"], abs=1e-5)
    middle = statistics.median(r["parts"]["model_2"] for r in replies)
    values["filter"] = {"finished": False, "at_least": {"model_2": middle}}
    out = run_stage("select", tmp_path / "some", **values)
    able = [
        [r for r in row["replies"] if r["response"].strip() and r["parts"]["model_2"] >= middle]
        for row in rows(out, FILES[0])
    ]
    expected = [max(row, key=lambda r: r["reward"])["response"] for row in able if row]
    assert [d.response for d in load(Demonstration, out / "best.jsonl").records] == expected
    counts = summary(out)["counts"]
    assert counts["prompts_without_choice"] == 10 - len(expected)
    assert counts["dropped_below_at_least"] > 10


def test_rewards_on_scales_far_apart_are_named(tmp_path, base, reward_run):
    functions = [judge("length"), judge("length") | {"weight": 1e-3}]
    for number, rewards in enumerate((functions, [judge("length"), judge("length")])):
        run_file = write_run_file(tmp_path / f"{number}.toml", settings(base, reward_run, rewards=rewards))
        told = trimtab("select", run_file, "--out", tmp_path / str(number))
        assert told.exit_code == 0, told.output
        said = "in step 1, with its weight, the reward callable varies 1e+03 times as much as callable_2"
        assert told.stderr.count(said) == (number == 0)


def test_repeated_and_long_prompts_are_counted(tmp_path, base, reward_run):
    data = tmp_path / "prompts.jsonl"
    texts = ["one", "two", "one", "word " * 400, "three"]
    # What gold of arithmetic needs is among the facts.
    data.write_text("".join(json.dumps({"prompt": text, "answer": 1}) + "\n" for text in texts))
    rewards = [{"name": "gold", "world": "arithmetic"}]
    values = settings(base, reward_run, prompts=str(data), rewards=rewards, world="arithmetic", pairs="none")
    values["sampling"] = SHORT | {"max_prompt_tokens": 200}
    counts = summary(run_stage("select", tmp_path / "run", **values))["counts"]
    assert (counts["dropped_repeated_prompts"], counts["dropped_long_prompts"], counts["replies"]) == (1, 1, 12)


def test_many_prompts_that_are_left_out_are_said_at_once(tmp_path, base, reward_run):
    data = tmp_path / "prompts.jsonl"
    texts = ["one"] * 8 + [f"{i} " + "word " * 400 for i in range(7)]
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    values = settings(base, reward_run, prompts=str(data), pairs="none")
    values["sampling"] = SHORT | {"max_prompt_tokens": 200}
    del values["world"]
    result = trimtab("select", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert "note: 7 of 15 prompts are left out: they are longer than sampling.max_prompt_tokens = 200" in result.output
    assert "note: 7 of 15 prompts are left out: they repeat another" in result.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts": None}, "either prompts, or demonstrations"),
        ({"rewards": []}, "rewards is empty"),
        ({"rewards": [judge("length") | {"weight": 0.0}]}, "every reward has weight = 0"),
        ({"replies_per_prompt": 1}, "at least 2"),
        ({"pairs": "demonstration"}, "needs demonstrations"),
        ({"filter": {"at_least": {"goal": 1.0}}}, "name the sum of all rewards or one of them: reward, model"),
        ({"filter": {"top_fraction": 0.0}}, "it must be above 0 and at most 1"),
        ({"filter": {"at_least": {"reward": 1e6}}}, "passes the filter"),
        ({"pairs": "worse"}, "'worst', 'random'"),
    ],
)
def test_a_mistake_is_answered_with_what_to_change(tmp_path, base, reward_run, changed, said):
    values = {k: v for k, v in settings(base, reward_run, **changed).items() if v is not None}
    result = trimtab("select", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output


def test_two_prompts_of_one_id_are_refused(tmp_path, base, reward_run):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "id": "x"}) + "\n" for text in ("one", "two")))
    values = settings(base, reward_run, prompts=str(data))
    # These prompts are of no world.
    del values["world"]
    result = trimtab("select", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "two different prompts have the id 'x'" in result.output


def test_spin_needs_no_reward(tmp_path, base, reward_run):
    values = settings(
        base, reward_run, demonstrations="world:helpdesk?num=5", replies_per_prompt=2, pairs="demonstration"
    )
    for name in ("prompts", "rewards", "world"):
        del values[name]
    out = run_stage("select", tmp_path / "run", **values)
    shown = {d.prompt.id: d.response for d in load(Demonstration, "world:helpdesk?num=5").records}
    pairs = load(PreferencePair, out / "pairs.jsonl").records
    assert pairs
    assert all(p.chosen == shown[p.prompt.id] != p.rejected for p in pairs)
    assert not (out / "best.jsonl").exists()


# --- pipelines ---


def test_two_rounds_of_rejection_sampling_through_the_command_line(tmp_path, base, reward_run):
    sft = {"stage": "sft", "batch_size": 4, "optimizer": FAST}
    stages = {
        "select_1": {"stage": "select"} | settings(base, reward_run, pairs="none"),
        "sft_1": sft | {"model": str(base), "data": "@select_1/best.jsonl"},
        "select_2": {"like": "select_1", "model": "@sft_1", "sampling": {"batch_size": 8}},
        "sft_2": {"like": "sft_1", "model": "@sft_1", "data": "@select_2/best.jsonl"},
        "check": {
            "stage": "evaluate",
            "model": "@sft_2",
            "baseline": str(base),
            "prompts": "world:helpdesk?split=test&num=4",
            "world": "helpdesk",
            "sampling": SHORT,
        },
    }
    file = write_run_file(tmp_path / "rounds.toml", {"seed": 5, "stages": stages})
    result = trimtab("run", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    first, second = (rows(tmp_path / "out" / f"select_{i}", "replies.jsonl") for i in (1, 2))
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert [row["replies"] for row in first] != [row["replies"] for row in second], "the second policy is another"
    written = config.load_run_file(tmp_path / "out" / "pipeline.toml")["stages"]["select_2"]
    assert written["sampling"] == SHORT | {"batch_size": 8}
    assert "like" not in written


def test_like_names_a_stage_above(tmp_path):
    stages = {"a": {"stage": "sft", "model": "x", "data": "y"}, "b": {"like": "c"}}
    result = trimtab("run", write_run_file(tmp_path / "run.toml", {"stages": stages}), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "stages.b.like = 'c' names no earlier stage" in result.output
    assert "stages before this one: a" in result.output


def test_like_takes_over_a_choice_only_where_its_name_stays():
    tables = {
        "a": {
            "stage": "online",
            "model": "m",
            "prompts": "p",
            "rewards": [{"name": "gold", "world": "helpdesk"}],
            "kl": {"name": "fixed", "coef": 0.5},
        },
        "b": {"like": "a", "kl": {"name": "adaptive", "target": 3.0}},
        "c": {"like": "b", "kl": {"target": 4.0}},
    }
    found = {name: s.kl for name, (_, s) in resolve_stages({"stages": tables}, Path("x"), where="test").items()}
    assert found["a"].coef == 0.5
    assert (found["b"].coef, found["b"].target) == (type(found["b"])().coef, 3.0)
    assert type(found["c"]) is type(found["b"])
    assert found["c"].target == 4.0


SHIPPED = sorted(path.name for path in EXAMPLES.glob("*.toml"))


def needs(name):
    stages = config.load_run_file(EXAMPLES / name)["stages"].values()
    missing = {table["stage"] for table in stages if "stage" in table} - set(registry.modules("stage"))
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"needs the stage {', '.join(missing)}"))


def test_the_run_files_of_selection_are_shipped():
    assert SHIPPED == ["best_of_n.toml", "online_dpo.toml", "rejection_sampling.toml", "spin.toml"]


@pytest.mark.parametrize("name", [needs(name) for name in SHIPPED])
def test_a_shipped_run_file_runs_when_cut_down(tmp_path, base, reward_run, name):
    """The shipped file with the tiny model: fewer prompts, shorter replies, everything else as it is."""
    values = config.load_run_file(EXAMPLES / name)
    overrides = [f"variables.policy={base}", f"variables.reward_model={reward_run / 'model'}", "seed=1"]
    if "demonstrations" in values["variables"]:
        overrides.append("variables.demonstrations=world:helpdesk?num=6")
    for stage, table in values["stages"].items():
        whole = table if "like" not in table else values["stages"][table["like"]] | table
        if whole["stage"] == "select":
            overrides += [f"stages.{stage}.limit=6", f"stages.{stage}.filter.finished=false"]
            overrides += [f"stages.{stage}.sampling.max_new_tokens=8"]
            if whole["replies_per_prompt"] > 4:
                overrides.append(f"stages.{stage}.replies_per_prompt=4")
        if whole["stage"] == "evaluate":
            overrides += [f"stages.{stage}.num_prompts=4", f"stages.{stage}.sampling.max_new_tokens=8"]
    result = trimtab("run", EXAMPLES / name, *overrides, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = summary(tmp_path / "out")
    assert list(found["stages"]) == sorted(values["stages"])
    assert "reward_final" in found["policy"] or "gold_final" in found["policy"]
