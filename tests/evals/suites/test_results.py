"""Files of results: what is read for the tax, in which direction, and what is refused."""

from __future__ import annotations

import json

import pytest

from trimtab.core.errors import DataError
from trimtab.evals.suites.results import read_results, verdicts_of


def result(better="higher", **changes):
    """A model that has 1 on 40 items of which its baseline has 0 on half."""
    items = [
        {"id": str(i), "cluster": str(i), "scores": {"m": [1.0]}, "baseline_scores": {"m": [float(i % 2)]}}
        for i in range(40)
    ]
    metrics = [{"name": "m", "better": better}]
    return {"version": 1, "suite": "s", "model": "a", "baseline": "b", "metrics": metrics, "items": items} | changes


def test_more_is_a_gain_or_a_loss_by_the_direction_of_the_metric():
    (up,) = verdicts_of([result()], margin=0.03)
    (down,) = verdicts_of([result("lower")], margin=0.03)
    assert (up.difference.value, up.verdict) == (0.5, "pass")
    assert (down.difference.value, down.verdict) == (-0.5, "fail")


def item(scores, **others):
    return {"items": [{"cluster": "a", "scores": scores, "baseline_scores": {}} | others]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 99}, "version 99"),
        ({"metrics": []}, "metrics or the items"),
        ({"metrics": [{"name": "m"}]}, "metrics or the items"),
        ({"items": [3]}, "metrics or the items"),
        ({"items": [{"cluster": "a"}]}, "metrics or the items"),
        (item({}, baseline_scores=None), "without its scores"),
        (item({"m": None}), "no list of numbers"),
        (item({"m": [1.0]}, cluster=["a"]), "cluster is no text"),
        (item({"m": [None]}), "no list of numbers"),
        (item({"m": [1e9]}), "from 0 to 1"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path, changes, said):
    path = tmp_path / "found.json"
    path.write_text(json.dumps(result()))
    assert read_results([path]) == [result()]
    path.write_text(json.dumps(result(**changes)))
    with pytest.raises(DataError, match=said) as refused:
        read_results([path])
    assert "found.json" in str(refused.value)
