from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.reports.fabricate import card, online_metrics
from trimtab.reports import charts
from trimtab.reports.charts import Axis, Chart
from trimtab.reports.collect import RunRecord, Series
from trimtab.stats import Interval
from trimtab.ui.thin import ThinnedSeries


def series(values, steps=None) -> Series:
    return Series(np.arange(1.0, len(values) + 1) if steps is None else np.array(steps), np.array(values, dtype=float))


def online_run(name: str, leash: bool) -> RunRecord:
    rows = online_metrics(60, leash=leash)
    metrics = {key: series([row[key] for row in rows]) for key in rows[0] if key != "step"}
    return RunRecord(name=name, stage="online", metrics=metrics)


def drawn(chart: Chart) -> ElementTree.Element:
    """The SVG of a chart, read by an XML parser; what stands outside of its frame is an error."""
    text = str(chart.__html__())
    root = ElementTree.fromstring(text[text.index('<svg class="chart"') :])
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for name, bound in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.attrib.get(name, 0)) <= bound, (element.tag, element.attrib)
    return root


def said(chart: Chart) -> list[str]:
    return [element.text or "" for element in drawn(chart).iter("title")]


def test_every_chart_is_well_formed_and_stays_in_its_frame():
    known = card()
    ends = Interval(0.5, 0.4, 0.6, 9), Interval(0.7, math.nan, math.nan, 0)
    for chart in (
        charts.curves({"a": series([1, 2, math.nan])}, "nats"),
        charts.curves({"a": series(range(100)), "b": series([1.0])}, "seconds"),
        charts.curves({"constant": series([5e-5] * 9)}, "rate"),
        charts.stacked({"a": series([1, 2]), "b": series([3, 4])}, "seconds"),
        charts.over_kl([online_run("ppo", True), online_run("no leash", False)], "reward/mean", "reward", wide=True),
        charts.reliability(known["reliability"]),
        charts.by_margin(known["by_margin"]),
        charts.by_length(known["by_length"]),
        charts.shares([("a", ends[0], charts.BLUE), ("b", ends[1], "#fff")]),
        charts.dots([("x" * 99, ends[0], charts.BLUE), ("b", ends[1], "#fff")], "share", line=0.5),
        charts.columns([0.5, 1.0], [3, 4], "x", "y"),
        charts.columns([0, 1, 2], [3, 0, 4], "", "answers", labels=["may", "june", "july"]),
        charts.matrix(["a", "b"], [[math.nan, 0.4], [0.4, math.nan]]),
        charts.best_of_n([{"n": 1, "gold": 0.5}, {"n": 4, "gold": 0.6}], {"gold": "gold"}, "score"),
    ):
        assert sum(1 for element in drawn(chart).iter() if element.tag in ("circle", "rect", "path")) >= 2


def test_a_point_stands_where_its_value_is():
    chart = Chart(Axis("x", 0, 10), Axis("y", 0, 1))
    chart.dots([0, 5, 10], [0, 0.5, 1], ["#000"], ["a", "b", "c"])
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn(chart).iter("circle")]
    (x0, y0), (x1, y1), (x2, y2) = circles
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2
    assert y0 > y2
    ticks = {t.text: (t.attrib.get("x"), t.attrib.get("y")) for t in drawn(chart).iter("text")}
    assert float(ticks["10"][0]) == pytest.approx(x2)
    assert float(ticks["1"][1]) == pytest.approx(y2 + 4)


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_the_ticks_of_any_range_are_few_and_round_and_inside(low, length):
    high = low + length
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = Axis().ticks_in(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low - length / 1e6 <= at <= high + length / 1e6 for at, _ in ticks)
    steps = np.diff([at for at, _ in ticks])
    assert all(re.fullmatch(r"[125]0*e.*", f"{step:.3e}".replace(".", "")) for step in steps)


def test_a_long_curve_is_thinned_and_smoothed_over_all_its_points():
    line, points = charts.curves({"loss": series(np.arange(2000) % 2)}, "nats").marks
    assert len(points.x) == len(line.x) == 200
    assert set(points.y) <= {0.0, 1.0}
    # an even number of neighbours averages the alternation away but for one point
    assert line.y[100] == pytest.approx(0.5, abs=0.01)


def test_no_spike_of_a_long_curve_is_left_out():
    values = np.zeros(10_000)
    values[[1234, 7001]] = 50.0, -20.0
    _, points = charts.curves({"loss": series(values)}, "nats").marks
    assert len(points.x) <= charts.MAX_POINTS
    assert {50.0, -20.0} <= set(points.y)
    assert dict(zip(points.y.tolist(), points.x.tolist(), strict=True))[50.0] == 1235
    assert points.x.tolist() == sorted(points.x)


def test_the_band_of_a_thinned_curve_reaches_its_spikes():
    values = np.zeros(10_000)
    values[[1234, 7001]] = 50.0, -20.0
    values[64:96] = np.nan
    thinned = ThinnedSeries()
    thinned.add(series(values))
    chart = charts.curves({"loss": thinned.series}, "nats")
    band, _, points = chart.marks
    assert (band.shape, band.y.max(), band.y.min()) == ("area", 50.0, -20.0)
    assert len(points.x) <= charts.MAX_POINTS
    assert any(text.endswith("from 0 to 50") for text in said(chart))
    drawn(chart)


def test_a_short_curve_is_drawn_as_it_is_and_every_value_can_be_read():
    chart = charts.curves({"loss": series([3.0, 2.0, 1.0])}, "nats")
    assert chart.marks[0].y.tolist() == [3.0, 2.0, 1.0]
    assert said(chart) == ["step 1: 3", "step 2: 2", "step 3: 1"]


def test_a_value_that_is_unknown_is_left_out_and_shifts_no_other():
    assert said(charts.curves({"loss": series([3.0, math.nan, 1.0])}, "nats")) == ["step 1: 3", "step 3: 1"]


def test_areas_are_stacked_on_each_other():
    first, second = charts.stacked({"a": series([1.0, 2.0]), "b": series([10.0, 20.0])}, "seconds").marks
    assert first.y.tolist() == [0.0, 0.0, 2.0, 1.0]
    assert second.y.tolist() == [1.0, 2.0, 22.0, 11.0]


def test_proxy_and_gold_share_the_root_of_kl():
    run = RunRecord(
        name="ppo",
        stage="online",
        metrics={
            "policy/kl": series([-0.01, 4.0, 9.0], [1, 2, 3]),
            "reward/mean": series([0.0, 1.0, math.nan], [1, 2, 3]),
            "gold/mean": series([0.5, 0.9, 0.7], [1, 2, 3]),
        },
    )
    reward = charts.over_kl([run], "reward/mean", "reward")
    gold = charts.over_kl([run], "gold/mean", "gold", peak=True)
    # an estimated KL below zero counts as zero, and a step with an unknown value is left out
    assert reward.marks[0].x.tolist() == [0.0, 2.0]
    points, line, peak = gold.marks
    assert points.x.tolist() == line.x.tolist() == [0.0, 2.0, 3.0]
    assert (peak.x.tolist(), peak.texts) == ([2.0], ["ppo, highest: 0.9 at step 2"])
    assert reward.x == gold.x


def test_rows_are_as_many_as_their_names_and_those_without_a_value_are_left_out():
    rows = [
        ("a", Interval(0.5, 0.4, 0.7, 10), charts.BLUE),
        ("b", Interval(math.nan, math.nan, math.nan, 0), charts.BLUE),
        ("a", Interval(0.2, math.nan, math.nan, 3), charts.ROSE),
    ]
    chart = charts.dots(rows, "share", line=0.5)
    assert chart.y.names == ("a",)
    circles = list(drawn(chart).iter("circle"))
    assert len(circles) == 2
    assert circles[1].attrib["fill"] == charts.ROSE


@given(st.lists(st.floats(allow_infinity=False), min_size=1, max_size=4), st.sampled_from([None, 0.0]))
@example([0.0, 5e-324], None)
@example([1.7e308, -1.7e308], None)
@example([1e9, 1e9 + 1e-6], None)
def test_there_is_a_chart_of_any_numbers(values, low):
    chart = Chart(Axis("x", low), Axis("y", low))
    chart.dots(values, values, ["#000"], ["value"] * len(values))
    text = str(chart.__html__())
    assert "nan" not in text
    assert text.count('class="grid"') <= 14


def test_a_chart_without_values_says_so():
    for chart in (charts.dots([], "share"), charts.columns([], [], "", "", labels=[]), charts.curves({}, "nats")):
        assert "Nothing to show yet" in str(chart.__html__())


def test_texts_from_files_are_no_markup_and_not_too_long():
    hostile = "<a href='https://example.org'>x</a>\u202e" * 5
    for chart in (
        charts.curves({hostile: series([1]), "b": series([2])}, "nats"),
        charts.dots([(hostile, Interval(0.5, 0.4, 0.6, 9), charts.BLUE)], hostile),
        charts.matrix([hostile, "b"], [[1.0, 0.5], [0.5, 1.0]]),
    ):
        text = str(chart.__html__())
        assert "<a" not in text
        assert "\u202e" not in text
    names = [
        text.text or "" for text in drawn(charts.dots([("x" * 500, Interval(1, 1, 1, 1), "#000")], "")).iter("text")
    ]
    assert max(map(len, names)) == 28
