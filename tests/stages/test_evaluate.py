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


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"world": None}, "nothing to score by"), ({"world": None, "best_of": 4, "reward_model": "x"}, "needs world")],
)
def test_a_mistake_is_answered_with_what_to_change(tmp_path, base, changed, said):
    values = {k: v for k, v in settings(base, base, **changed).items() if v is not None}
    result = trimtab("evaluate", write_run_file(tmp_path / "run.toml", values), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output
