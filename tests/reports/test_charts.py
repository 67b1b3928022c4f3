from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import pytest

from tests.reports.fabricate import card, online_metrics
from trimtab.reports import charts
from trimtab.reports.collect import RunRecord, Series
from trimtab.stats import Interval


def series(values, steps=None) -> Series:
    return Series(np.arange(1.0, len(values) + 1) if steps is None else np.array(steps), np.array(values, dtype=float))


def online_run(name: str, leash: bool) -> RunRecord:
    rows = online_metrics(60, leash=leash)
    metrics = {key: series([row[key] for row in rows]) for key in rows[0] if key != "step"}
    return RunRecord(name=name, stage="online", metrics=metrics)


def test_every_figure_is_valid_plotly():
    known = card()
    figures = [
        charts.curves({"a": series([1, 2, math.nan])}, "nats"),
        charts.curves({"a": series(range(100)), "b": series([1.0])}, "seconds"),
        charts.stacked({"a": series([1, 2]), "b": series([3, 4])}, "seconds"),
        charts.proxy_against_gold([online_run("ppo", True), online_run("no leash", False)]),
        charts.reliability(known["reliability"]),
        charts.by_margin(known["by_margin"]),
        charts.by_length(known["by_length"]),
        charts.shares(
            [("a", Interval(0.5, 0.4, 0.6, 9), charts.BLUE), ("b", Interval(0.7, math.nan, math.nan, 0), "#fff")]
        ),
        charts.best_of_n(
            [{"n": 1, "gold": 0.5}, {"n": 4, "gold": 0.6, "gold_low": 0.5, "gold_high": 0.7}], {"gold": "gold"}, "score"
        ),
    ]
    for figure in figures:
        go.Figure(figure)  # raises ValueError for a property plotly does not know
        assert figure["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
        assert figure["layout"]["xaxis"]["title"]["text"]


def test_a_long_curve_is_thinned_and_smoothed_over_all_its_points():
    points, line = charts.curves({"loss": series(np.arange(2000) % 2)}, "nats")["data"]
    assert len(points["x"]) == len(line["x"]) == 400
    assert set(points["y"]) <= {0.0, 1.0}
    # an even number of neighbours averages the alternation away but for one point
    assert line["y"][200] == pytest.approx(0.5, abs=0.01)


def test_a_short_curve_is_drawn_as_it_is():
    (line,) = charts.curves({"loss": series([3.0, 2.0, 1.0])}, "nats")["data"]
    assert line["y"] == [3.0, 2.0, 1.0]
    assert line["mode"] == "lines+markers"


def test_proxy_and_gold_share_the_root_of_kl():
    run = RunRecord(
        name="ppo",
        stage="online",
        metrics={
            "policy/kl": series([-0.01, 4.0, 9.0], [1, 2, 3]),
            "reward/mean": series([0.0, 1.0, math.nan], [1, 2, 3]),
            "gold/mean": series([0.5, 0.9, 0.7], [1, 2, 3]),
            "gold/brevity": series([1.0, 0.4], [1, 3]),
        },
    )
    data = charts.proxy_against_gold([run])["data"]
    by_name = {}
    for trace in data:
        shape = "star" if trace.get("marker", {}).get("symbol") == "star" else trace["mode"]
        by_name[trace["yaxis"], trace.get("meta", {}).get("part"), shape] = trace
    # an estimated KL below zero counts as zero, and a step with an unknown value is left out
    assert by_name["y", None, "lines"]["x"] == [0.0, 2.0]
    assert by_name["y2", "", "lines"]["x"] == [0.0, 2.0, 3.0]
    assert by_name["y2", "", "star"]["x"] == [2.0]
    assert by_name["y2", "", "star"]["visible"]
    assert by_name["y2", "brevity", "lines"]["y"] == [1.0, 0.4]
    assert not by_name["y2", "brevity", "lines"]["visible"]


def test_texts_from_files_are_no_markup_to_plotly():
    hostile = "<a href='https://example.org'>x</a>" * 5
    name = charts.curves({hostile: series([1]), "b": series([2])}, "nats")["data"][0]["name"]
    assert "<" not in name
    assert len(charts.label("x" * 500)) == 60
