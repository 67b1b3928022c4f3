import json

import pytest

from tests.stages.commands import SHORT, rows, run_stage, summary, trimtab, write_run_file


def settings(model, baseline, **changed):
    return {
        "model": str(model),
        "baseline": str(baseline),
        "prompts": "world:arithmetic?split=test&num=12",
        "world": "arithmetic",
        "sampling": SHORT,
    } | changed


def test_two_models_are_compared_by_gold_and_reward_with_best_of(tmp_path, base, other, reward_run):
    changed = {"reward_model": str(reward_run / "model"), "best_of": 6, "best_of_prompts": 5, "num_samples": 7}
    out = run_stage("evaluate", tmp_path / "run", **settings(other, base, **changed))
    found = summary(out)
    assert {"gold", "gold_low", "gold_high", "reward", "length_mean"} <= found["policy"].keys() & found[
        "baseline"
    ].keys()
    assert found["kl"]["kl_exact_low"] <= found["kl"]["kl_exact"] <= found["kl"]["kl_exact_high"]
    assert found["kl"]["kl_exact"] > 0
    for judge in ("gold", "reward"):
        rate = found[f"win_rate_by_{judge}"]
        assert 0 <= rate["win_rate_low"] <= rate["win_rate"] <= rate["win_rate_high"] <= 1
        ours, theirs = found["policy"][judge], found["baseline"][judge]
        assert found[f"{judge}_difference"]["difference"] == pytest.approx(ours - theirs, abs=1e-6)
    curve = found["best_of"]["curve"]
    assert [point["n"] for point in curve] == [1, 2, 4, 6]
    assert [point["gold"] for point in curve] == sorted(point["gold"] for point in curve)
    assert found["best_of"]["num_prompts"] == 5
    samples = rows(out, "samples.jsonl")
    assert len(samples) == 7
    assert {"prompt", "response", "baseline_response", "gold", "baseline_gold", "reward", "baseline_reward"} <= samples[
        0
    ].keys()


def test_a_model_against_itself_is_a_tie(tmp_path, base):
    out = run_stage("evaluate", tmp_path / "run", **settings(base, base))
    found = summary(out)
    assert found["win_rate_by_gold"]["win_rate"] == 0.5
    assert found["kl"]["kl_exact"] == pytest.approx(0, abs=1e-6)
    assert all(row["response"] == row["baseline_response"] for row in rows(out, "samples.jsonl"))


def test_killed_before_its_end_and_run_again_it_has_no_sample_twice(tmp_path, base, other):
    out = run_stage("evaluate", tmp_path / "run", **settings(other, base))
    first, samples = (out / "summary.json").read_bytes(), (out / "samples.jsonl").read_bytes()
    (out / "summary.json").unlink()  # what a kill after the samples leaves
    run_stage("evaluate", out, **settings(other, base))
    assert (out / "samples.jsonl").read_bytes() == samples
    assert (out / "summary.json").read_bytes() == first


def test_any_reward_scores_by_its_name_and_its_figures_are_printed(tmp_path, base, other):
    rewards = ["exact_answer", {"name": "length", "max_tokens": 4, "weight": 0.5}]
    values = settings(other, base, rewards=rewards)
    del values["world"]
    result = trimtab("evaluate", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = summary(tmp_path / "run")
    assert found["judges"] == ["exact_answer", "length", "reward"]
    policy = found["policy"]
    # The weighted sum, as online training adds rewards up; nan where one could not judge.
    parts = policy["exact_answer"] + 0.5 * policy["length"]
    assert policy["reward"] == pytest.approx(parts, abs=1e-6) or policy["num_exact_answer_failed"]
    assert found["length_difference"]["difference"] == pytest.approx(
        policy["length"] - found["baseline"]["length"], abs=1e-6
    )
    for judge in ("exact_answer", "length"):
        assert f"{judge}: {policy[judge]:.2f}" in result.output
    assert {"exact_answer", "baseline_exact_answer"} <= rows(tmp_path / "run", "samples.jsonl")[0].keys()


def test_a_model_is_measured_alone_and_the_figure_is_that_of_its_replies(tmp_path, base):
    values = settings(base, base, rewards=["exact_answer"], num_samples=12)
    for key in ("world", "baseline"):
        del values[key]
    result = trimtab("evaluate", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = summary(tmp_path / "run")
    assert "baseline" not in found
    assert "kl" not in found
    scores = [row["exact_answer"] for row in rows(tmp_path / "run", "samples.jsonl")]
    assert found["policy"]["exact_answer"] == pytest.approx(sum(scores) / len(scores))
    assert "The policy was measured." in result.output
    assert "exact_answer: 0.00" in result.output
    assert ">Baseline" not in (tmp_path / "run" / "report.html").read_text()


def test_a_reply_that_cannot_be_judged_is_left_out_and_counted(tmp_path, base, other):
    function = "tests.stages.reward_functions:patient"
    values = settings(other, base, rewards=[{"name": "callable", "function": function}])
    del values["world"]
    out = run_stage("evaluate", tmp_path / "run", **values)
    found = summary(out)
    failed = found["policy"]["num_callable_failed"]
    assert 0 < failed < 12
    known = [row["callable"] for row in rows(out, "samples.jsonl") if row["callable"] is not None]
    assert len(known) == 12 - failed
    assert found["policy"]["callable"] == pytest.approx(sum(known) / len(known))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"world": None}, "nothing to score by"),
        ({"world": None, "best_of": 4, "rewards": ["exact_answer"]}, "needs world and baseline"),
        ({"reward_model": "x", "rewards": ["exact_answer"]}, "name the reward model among the rewards"),
        ({"rewards": [{"name": "gold", "world": "arithmetic"}]}, "both are called gold"),
        ({"rewards": ["exact_anser"]}, "did you mean 'exact_answer'?"),
    ],
)
def test_a_mistake_is_answered_with_what_to_change(tmp_path, base, changed, said):
    values = {k: v for k, v in settings(base, base, **changed).items() if v is not None}
    result = trimtab("evaluate", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output


def test_replies_of_another_distribution_have_no_kl(tmp_path, base, other):
    values = settings(other, base, sampling=SHORT | {"top_k": 1})
    result = trimtab("evaluate", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "kl" not in summary(tmp_path / "run")
    assert "cannot be measured" in " ".join(result.output.split())


def test_rows_of_one_prompt_are_one_cluster_whatever_ids_they_have(tmp_path, base):
    """Rows with an id each were as many independent prompts, which made every interval too narrow."""
    data = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "What is 1 + 1?", "answer": "2", "id": f"row {i}"} for i in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = settings(base, base, prompts=str(data), rewards=[{"name": "length", "max_tokens": 4}])
    del values["world"]
    found = summary(run_stage("evaluate", tmp_path / "run", **values))
    assert found["policy"]["num_replies"] == 6
    assert found["policy"]["length_low"] is None
    assert found["kl"]["kl_exact_low"] is None
