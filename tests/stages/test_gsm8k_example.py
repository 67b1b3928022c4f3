import json

import pytest

from tests.stages.commands import FAST, SHORT, rows, summary, trimtab
from trimtab import cli
from trimtab.core import config
from trimtab.rewards import ExactAnswer, Overlong, Regex
from trimtab.stages.online import OnlineSettings
from trimtab.stages.pipeline import resolve_stages

EXAMPLES = cli.examples_dir() / "gsm8k"


def test_the_run_file_verifies_answers():
    file = EXAMPLES / "grpo.toml"
    found = config.resolve(OnlineSettings, config.load_run_file(file), where=str(file))
    assert [type(r) for r in found.rewards] == [ExactAnswer, Regex, Overlong]
    assert found.sampling.max_new_tokens == found.rewards[2].max_tokens
    assert found.group_size > 1


def test_the_pipeline_makes_the_model_that_the_run_file_starts_from(tmp_path):
    values = config.load_run_file(EXAMPLES / "pipeline.toml")
    stages = resolve_stages(values, tmp_path, where="the pipeline")
    assert {name: stage for name, (stage, _) in stages.items()} == {"base": "pretrain", "sft": "sft"}
    assert config.load_run_file(EXAMPLES / "grpo.toml")["model"] == "runs/gsm8k/sft/model"


def test_the_run_file_trains_and_logs_every_part(tmp_path, base):
    data = tmp_path / "train.jsonl"
    problems = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(4)]
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    changed = {
        "model": base,
        "prompts": data,
        "prompts_per_step": 2,
        "group_size": 2,
        "num_steps": 2,
        "sample_every": 1,
    }
    changed |= {f"sampling.{k}": v for k, v in SHORT.items()} | {f"optimizer.{k}": v for k, v in FAST.items()}
    overrides = [f"{key}={value}" for key, value in changed.items()]
    out = tmp_path / "run"
    result = trimtab("online", EXAMPLES / "grpo.toml", *overrides, "--out", out)
    assert result.exit_code == 0, result.output
    for row in rows(out):
        parts = [row[f"reward/{name}"] for name in ("exact_answer", "regex", "overlong")]
        assert row["reward/mean"] == pytest.approx(parts[0] + 0.1 * parts[1] + 0.1 * parts[2])
        assert [row[f"reward/{name}_failed"] for name in ("exact_answer", "regex", "overlong")] == [0, 0, 0]
        assert 0 <= row["reward/exact_answer_found"] <= 1
        assert "policy/kl" in row
    assert summary(out)["num_steps"] == 2


def test_held_out_accuracy_is_one_command(tmp_path, base, other):
    data = tmp_path / "test.jsonl"
    problems = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(4)]
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    changed = {"model": other, "baseline": base, "prompts": data} | {f"sampling.{k}": v for k, v in SHORT.items()}
    overrides = [f"{key}={value}" for key, value in changed.items()]
    result = trimtab("evaluate", EXAMPLES / "evaluate.toml", *overrides, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert summary(tmp_path / "run")["judges"] == ["exact_answer"]
    assert "exact_answer: 0.00 [0.00, 0." in result.output
    assert "on 4 prompts, baseline 0.00" in result.output
