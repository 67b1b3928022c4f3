"""The rows of RewardBench through the command line."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.stages.commands import trimtab
from trimtab.models.load import load_tokenizer
from trimtab.models.save import save_model


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs_of_bench(tmp_path):
    subsets = ["llmbar-natural", "hep-go"]
    rows = [{"id": i, "subset": subsets[i % 2], "prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(6)]
    return write_rows(tmp_path / "filtered.jsonl", rows)


def test_a_constant_scorer_has_a_half_and_is_called_one(tmp_path, base, pairs_of_bench):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    tokenizer = load_tokenizer(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, tmp_path / "constant")
    out = tmp_path / "scores.json"
    told = trimtab("eval", "rewardbench", tmp_path / "constant", pairs_of_bench, "--out", out)
    assert told.exit_code == 0, told.output
    assert "the model amounts to a constant" in told.output
    assert "Reasoning lacks math-prm" in told.output
    scores = json.loads(out.read_text())
    assert (scores["overall"], scores["resembles"], scores["num_rows"]) == (0.5, "constant", 6)
    assert scores["sections"]["Chat Hard"]["count"] == 3


def test_ties_and_best_of_four_are_scored(tmp_path, reward_run):
    four = {"id": "1", "subset": "Focus", "prompt": "p?", "chosen": ["a"], "rejected": ["b", "c", "d"]}
    one = {"id": "ref:1", "subset": "Ties", "prompt": "p?", "chosen": ["a"], "rejected": ["b"]}
    many = {"id": "tied:1", "subset": "Ties", "prompt": "p?", "chosen": ["a", "c"], "rejected": ["b"]}
    rows, out = write_rows(tmp_path / "test.jsonl", [four, one, many]), tmp_path / "scores.json"
    told = trimtab("eval", "rewardbench", reward_run / "model", rows, "--out", out)
    assert told.exit_code == 0, told.output
    scores = json.loads(out.read_text())
    assert set(scores["subsets"]) == {"Focus", "Ties"}
    assert scores["overall"] == pytest.approx((scores["subsets"]["Focus"]["value"] + scores["ties"]["score"]) / 2)


def test_rows_that_the_model_cannot_read_are_counted(tmp_path, encoder, pairs_of_bench):
    most = AutoModelForSequenceClassification.from_pretrained(encoder).config.max_position_embeddings
    long = {"subset": "hep-go", "prompt": "p?", "chosen": "word " * most, "rejected": "b"}
    write_rows(tmp_path / "long.jsonl", [long])
    told = trimtab("eval", "rewardbench", encoder, pairs_of_bench, tmp_path / "long.jsonl")
    assert told.exit_code == 0, told.output
    assert "1 rows are left out" in told.output
    refused = trimtab("eval", "rewardbench", encoder, tmp_path / "long.jsonl")
    assert refused.exit_code == 2
    assert "none of 1 rows fits" in refused.output
