"""Replies before and after: the same prompts of two models, bounded, and whatever they hold."""

from __future__ import annotations

from tests.reports.fabricate import evaluate_samples, rollout_samples
from trimtab.reports.before_after import MOST_CHARACTERS, NUM_SAMPLES, before_after, sample_parts, written
from trimtab.reports.collect import PipelineRecord, RunRecord


def run(name: str, stage: str = "online", samples=(), **other) -> RunRecord:
    return RunRecord(name=name, stage=stage, samples=tuple(samples), **other)


def test_an_evaluation_has_both_models_with_their_scores():
    settings = {"model": "runs/ppo/model", "baseline": "runs/sft/model"}
    models = {"runs/ppo/model": {"sha256": "ab"}}
    evaluated = run("evaluate", "evaluate", evaluate_samples(50), settings=settings, models=models)
    trained = run("ppo", samples=rollout_samples(9), decision={"model_is": "the chosen checkpoint"})
    record = PipelineRecord(name="p", runs=(trained, evaluated))
    found = before_after(record).as_json
    assert found["run"] == "evaluate"
    after = {"called": "Final policy", "model": "runs/ppo/model", "sha256": "ab", "checkpoint": "the chosen checkpoint"}
    assert found["after"] == after
    assert found["before"] == {"called": "Baseline", "model": "runs/sft/model", "sha256": None, "checkpoint": None}
    told = [part.text for part in sample_parts(before_after(record)) if part.kind == "text"]
    assert told[1] == "Baseline: runs/sft/model. Final policy: runs/ppo/model (the chosen checkpoint)."
    assert (found["num_available"], len(found["rows"])) == (50, NUM_SAMPLES)
    by_score = {row["gold"]: row for row in evaluate_samples(50)}
    for row in found["rows"]:
        told = by_score[row["after"]["scores"]["gold"]]
        assert row["prompt"] == told["prompt"]
        assert row["after"] == {"text": told["response"], "scores": {n: told[n] for n in ("gold", "reward")}}
        assert row["before"]["scores"] == {n: told[f"baseline_{n}"] for n in ("gold", "reward")}


def test_without_an_evaluation_prompts_that_training_drew_twice_are_compared():
    rows = [
        {"step": 1, "prompt": "a", "response": "first", "gold": 0.1, "kl": 0.0},
        {"step": 1, "prompt": "b", "response": "alone"},
        {"step": 5, "prompt": "a", "response": "between"},
        {"step": 9, "prompt": "a", "response": "last", "gold": 0.9, "kl": 3.0},
        {"step": 9, "prompt": "c", "response": "alone"},
    ]
    found = before_after(run("ppo", samples=rows, settings={"model": "sft"})).as_json
    assert found["rows"] == [
        {
            "prompt": "a",
            "before": {"text": "first", "scores": {"gold": 0.1}},
            "after": {"text": "last", "scores": {"gold": 0.9}},
        }
    ]
    assert found["before"] == {"called": "Step 1", "model": "sft", "sha256": None, "checkpoint": None}
    # a later first step has been trained already, so no model is named for it
    assert before_after(run("ppo", samples=rows[2:4], settings={"model": "sft"})).as_json["before"]["model"] is None


def test_where_no_prompt_was_answered_twice_there_is_nothing():
    assert before_after(run("ppo")) is None
    assert before_after(run("ppo", samples=[{"step": 1, "prompt": "a", "response": "x"}])) is None
    apart = [{"step": step, "prompt": str(step), "response": "x"} for step in (1, 2)]
    assert before_after(run("ppo", samples=apart)) is None
    alone = run("evaluate", "evaluate", [{"step": 0, "prompt": "a", "response": "x"}])
    assert before_after(PipelineRecord(name="p", runs=(alone,))) is None


def test_a_long_text_is_cut_and_says_so():
    assert written("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    assert written("x" * (MOST_CHARACTERS + 1234)).endswith("x… (1,234 further characters)")
    assert written(None) == "–"
    rows = [{"step": 0, "prompt": "p" * 10**6, "response": "r" * 10**6, "baseline_response": "b" * 10**6}] * 40
    (row, *_), text = (found := before_after(run("e", "evaluate", rows)).as_json)["rows"], str(found)
    assert len(row["after"]["text"]) < MOST_CHARACTERS + 50
    assert len(text) < 40 * NUM_SAMPLES * MOST_CHARACTERS
