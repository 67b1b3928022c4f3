"""Files of lm-eval are read as results of suites; what cannot be compared item by item is refused or named."""

from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest

from tests.evals.lm_eval_files import TIME, sample, write_run, write_samples
from trimtab.core.errors import DataError
from trimtab.evals.lm_eval import find_results, read_lm_eval, results_of
from trimtab.evals.suites.results import verdicts_of

SCHEMA = json.loads((files("trimtab.evals.suites") / "suite.schema.json").read_text(encoding="utf-8"))
EMPTY = {"higher_is_better": {}, "n-shot": {}, "config": {}}
ABOUT = {"model": "a", "model_sha256": None, "baseline": "b", "baseline_sha256": None, "engine": {}, "command": ""}


def test_two_runs_are_compared_document_by_document(tmp_path):
    ours = read_lm_eval(write_run(tmp_path / "a", right={"arc": [1, 1, 1, 0] * 20, "piqa": [0.0, 1.0]}))
    theirs = read_lm_eval(write_run(tmp_path / "b", right={"arc": [1, 1, 0, 0] * 20, "piqa": [1.0, 1.0]}))
    found = results_of(ours, theirs)
    assert list(found) == ["arc", "piqa"]
    acc, brier = found["arc"]["metrics"]
    assert (acc["name"], acc["better"], brier["name"], brier["better"]) == ("acc", "higher", "brier", "lower")
    assert acc["model"]["value"] == 0.75
    assert acc["baseline"]["value"] == 0.5
    assert acc["difference"]["value"] == 0.25
    assert acc["difference"]["low"] > 0  # paired: unpaired shares of 80 documents would leave 0 nearer
    assert brier["difference"]["value"] == -0.125
    assert found["arc"]["num_available"] == 100
    assert [v.verdict for v in verdicts_of([found["arc"]], margin=0.03)] == ["pass"]
    for result in found.values():
        whole = result | ABOUT | {"environment": {}, "seconds": {}}
        jsonschema.validate(json.loads(json.dumps(whole)), SCHEMA)


def test_documents_of_one_prompt_are_one_cluster(tmp_path):
    folder = write_run(tmp_path / "a", right={"arc": [1.0]})
    (path,) = find_results(folder)
    rows = [sample(number, prompt=f"prompt {number // 4}", acc=float(number % 4 == 0)) for number in range(40)]
    write_samples(path.parent, "arc", rows)
    result = results_of(read_lm_eval(folder))["arc"]
    assert (result["num_items"], result["num_clusters"]) == (40, 10)


def test_filters_are_metrics_of_their_own_and_the_first_is_the_figure(tmp_path):
    folder = write_run(tmp_path / "a", right={"gsm8k": [1.0]})
    (path,) = find_results(folder)
    rows = [sample(n, of=name, exact_match=float(n == 0 or name != "strict-match"))
            for n in range(2) for name in ("strict-match", "flexible-extract")]  # fmt: skip
    write_samples(path.parent, "gsm8k", rows)
    strict, flexible = results_of(read_lm_eval(folder))["gsm8k"]["metrics"]
    assert (strict["name"], strict["model"]["value"]) == ("exact_match,strict-match", 0.5)
    assert (flexible["name"], flexible["model"]["value"]) == ("exact_match,flexible-extract", 1.0)
    assert strict["better"] == "neither"  # lm-eval does not say


def test_what_is_no_share_of_a_document_is_named(tmp_path):
    folder = write_run(tmp_path / "a", right={"task": [1.0]}, limit=2.0)
    (path,) = find_results(folder)
    write_samples(path.parent, "task", [sample(n, acc=1.0, word_perplexity=[-9.0, 4]) for n in range(3)])
    result = results_of(read_lm_eval(folder))["task"]
    assert [row["name"] for row in result["metrics"]] == ["acc"]
    assert any("left out" in note and "word_perplexity" in note for note in result["notes"])
    assert any("first documents" in note for note in result["notes"])
    write_samples(path.parent, "task", [sample(0, word_perplexity=[-9.0, 4])])
    with pytest.raises(DataError, match=r"no metric of a document is a number from 0 to 1 \(word_perplexity\)"):
        read_lm_eval(folder)


def test_a_value_that_is_sometimes_no_number_leaves_its_metric_out(tmp_path):
    folder = write_run(tmp_path / "a", right={"task": [1.0]})
    (path,) = find_results(folder)
    write_samples(path.parent, "task", [sample(0, acc=1.0, f1=0.5), sample(1, acc=0.0, f1=float("nan"))])
    task = read_lm_eval(folder).tasks["task"]
    assert [metric.name for metric in task.metrics] == ["acc"]
    assert task.left_out == ("f1",)
    rows = [sample(n, of=of, acc=1.0) for of in ("none", "strict") for n in range(2)]
    write_samples(path.parent, "task", rows[:-1])  # the last filter was cut off
    task = read_lm_eval(folder).tasks["task"]
    assert [metric.name for metric in task.metrics] == ["acc"]
    assert task.left_out == ("acc,strict",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda there: (there / f"results_{TIME}.json").unlink(), "0 files results_"),
        (lambda there: (there / "results_later.json").write_text("{}"), "2 files results_"),
        (lambda there: (there / f"results_{TIME}.json").write_text("{}"), "no results of lm-eval"),
        (lambda there: (there / f"results_{TIME}.json").write_text("{"), "is damaged"),
        (
            lambda there: (there / f"results_{TIME}.json").write_text(json.dumps({"n-samples": {"arc": 3}, **EMPTY})),
            "no results",
        ),
        (lambda there: (there / f"samples_arc_{TIME}.jsonl").unlink(), "no such file"),
        (lambda there: (there / f"samples_arc_{TIME}.jsonl").write_text('{"doc_id": 0}\n'), "no sample of lm-eval"),
        (lambda there: (there / f"samples_arc_{TIME}.jsonl").write_text('{"doc_id": 0'), "samples_arc"),
        (lambda there: write_samples(there, "arc", [sample(0) | {"metrics": [None]}]), "no sample of lm-eval"),
        (lambda there: write_samples(there, "arc", [sample(0, acc=1.0)] * 2), "document 0 is there twice"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, change, said):
    folder = write_run(tmp_path / "a", right={"arc": [1.0, 0.0]})
    change(folder / "org__model")
    with pytest.raises(DataError, match=said):
        read_lm_eval(folder)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"right": {"piqa": [1.0, 0.0]}}, "the model has done arc, the baseline piqa"),
        ({"right": {"arc": [1.0]}}, "documents of arc are not the same"),
        ({"right": {"arc": [1.0, 0.0]}, "fewshot": 5}, "documents of arc are not the same"),
        ({"right": {"arc": [1.0, 0.0]}, "chat_template": None}, "chat_template = True and False"),
        ({"right": {"arc": [1.0, 0.0]}, "limit": 2.0}, "limit = None and 2.0"),
    ],
)
def test_runs_that_were_not_asked_the_same_are_not_compared(tmp_path, other, said):
    ours = read_lm_eval(write_run(tmp_path / "a", right={"arc": [1.0, 0.0]}))
    theirs = read_lm_eval(write_run(tmp_path / "b", **other))
    with pytest.raises(DataError, match=said):
        results_of(ours, theirs)
