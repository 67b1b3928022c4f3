"""Files that grow, are cut and replaced while they are read, and long series as means."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.reports.collect import RunRecord, Series, series_of
from trimtab.ui import tail as reading
from trimtab.ui import thin
from trimtab.ui.tail import Tail, last_row
from trimtab.ui.thin import ThinnedSeries

LATER = time.monotonic() + 1e6


def lines(first: int, last: int, mark: str = "") -> str:
    return "".join(json.dumps({"step": step, "time": f"{mark}{step}"}) + "\n" for step in range(first, last + 1))


def steps(new: reading.NewRows) -> list[int]:
    return [row["step"] for row in new.rows]


def test_only_whole_new_lines_are_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read(LATER) == reading.NewRows([], False)
    path.write_text(lines(1, 2) + '{"step": 3, ')
    assert steps(tail.read(LATER)) == [1, 2]
    assert steps(tail.read(LATER)) == []
    with path.open("a") as file:
        file.write('"a": 1}\n' + lines(4, 4))
    assert steps(tail.read(LATER)) == [3, 4]
    assert tail.num_damaged == 0
    assert tail.share_read == 1


def test_what_was_read_before_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 5000))
    tail = Tail(path)
    tail.read(LATER)
    loads, parsed = json.loads, []
    monkeypatch.setattr(reading.json, "loads", lambda line: parsed.append(line) or loads(line))
    with path.open("a") as file:
        file.write(lines(5001, 5001))
    assert steps(tail.read(LATER)) == [5001]
    assert len(parsed) == 1


def test_a_run_that_went_back_to_a_checkpoint_is_read_from_the_start(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 10))
    tail = Tail(path)
    tail.read(LATER)
    os.truncate(path, len(lines(1, 5)))
    new = tail.read(LATER)
    assert (new.from_start, steps(new)) == (True, [1, 2, 3, 4, 5])


def test_steps_done_again_are_noticed_in_a_file_as_long_as_before_and_in_a_longer_one(tmp_path: Path):
    for further in (10, 12):
        path = tmp_path / f"{further}.jsonl"
        path.write_text(lines(1, 5) + lines(6, 10, "a"))
        tail = Tail(path)
        tail.read(LATER)
        os.truncate(path, len(lines(1, 5)))
        with path.open("a") as file:
            file.write(lines(6, further, "b"))
        new = tail.read(LATER)
        assert new.from_start
        assert [row["time"] for row in new.rows][5:7] == ["b6", "b7"]


def test_a_file_that_was_replaced_or_removed_is_another(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 3))
    tail = Tail(path)
    tail.read(LATER)
    path.unlink()
    assert tail.read(LATER) == reading.NewRows([], True)
    path.write_text(lines(1, 4))
    assert steps(tail.read(LATER)) == [1, 2, 3, 4]


def test_a_long_file_is_read_in_portions_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "CHUNK", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 50))
    tail, found, shares = Tail(path), [], [0.0]
    while tail.share_read < 1:
        found += steps(tail.read(until=0.0))
        shares.append(tail.share_read)
    assert found == list(range(1, 51))
    assert shares == sorted(shares)
    assert len(shares) > 10


def test_a_line_longer_than_a_portion_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "CHUNK", 10)
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "response": "x" * 1000}) + "\n")
    assert steps(Tail(path).read(until=0.0)) == [1]


def test_damaged_lines_are_counted(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\n[1]\n{"step": 2}\n')
    tail = Tail(path)
    assert steps(tail.read(LATER)) == [1, 2]
    assert tail.num_damaged == 2


def test_the_end_of_a_long_file_can_be_read_alone(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    path.write_text(lines(1, 100))
    found = steps(Tail(path, last_bytes=200).read(LATER))
    assert found == list(range(found[0], 101))
    assert 2 < len(found) < 10
    assert steps(Tail(path, last_bytes=10**6).read(LATER)) == list(range(1, 101))
    assert last_row(path, [])["step"] == 100
    with path.open("a") as file:
        file.write('damaged\n{"step": 101')
    assert last_row(path, [])["step"] == 100
    assert last_row(tmp_path / "none", []) == {}


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=200),
    st.lists(st.integers(0, 200), max_size=6),
)
def test_points_are_the_means_of_neighbours_in_whatever_portions_they_come(values: list[float], cuts: list[int]):
    row, at = np.array(values), np.arange(1.0, len(values) + 1)
    most, thin.MOST_POINTS = thin.MOST_POINTS, 16
    try:
        thinned = ThinnedSeries()
        for part in np.split(np.arange(len(row)), sorted(min(cut, len(row)) for cut in cuts)):
            thinned.add(Series(at[part], row[part]))
    finally:
        thin.MOST_POINTS = most
    found, each = thinned.series, thinned.num_each
    assert len(found) <= 16
    assert len(found) > 8 or each == 1
    for i in range(len(found)):  # the slow way
        part, known = slice(i * each, (i + 1) * each), [v for v in row[i * each : (i + 1) * each] if v == v]
        assert found.steps[i] == pytest.approx(at[part].mean())
        assert found.values[i] == pytest.approx(sum(known) / len(known) if known else np.nan, nan_ok=True, abs=1e-6)
        assert found.low[i] == pytest.approx(min(known, default=np.nan), nan_ok=True)
        assert found.high[i] == pytest.approx(max(known, default=np.nan), nan_ok=True)
    assert found.last_step == len(row)
    assert found.num_unknown == np.isnan(row).sum()
    assert found.total == pytest.approx(np.nansum(row), abs=1e-3)


def test_the_figures_of_a_thinned_series_are_those_of_the_values():
    values = np.where(np.arange(10_000) % 7, np.arange(10_000.0), np.nan)
    values[5000:9000] = np.nan
    whole, thinned = Series(np.arange(1.0, 10_001), values), ThinnedSeries()
    thinned.add(whole)
    assert thinned.num_each == 16
    assert thinned.series.mean_of_last() == pytest.approx(whole.mean_of_last(), abs=4)
    assert thinned.series.mean_of_first() == pytest.approx(whole.mean_of_first(), abs=4)
    known = values[~np.isnan(values)]
    assert whole.mean_of_last() == pytest.approx(known[-(len(known) // 10) :].mean())
    assert RunRecord(name="r", stage="online", metrics={"a": thinned.series}).num_steps == 10_000


def test_a_line_without_an_end_is_not_read_on_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST_LINE", 1000)
    monkeypatch.setattr(reading, "CHUNK", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2) + "x" * 5000)
    tail = Tail(path)
    assert steps(tail.read(LATER)) == [1, 2]
    assert "longer than" in tail.problem
    with path.open("a") as file:
        file.write("\n" + lines(3, 3))
    assert steps(tail.read(LATER)) == []
    assert tail.problem
    os.truncate(path, len(lines(1, 2)))  # the run went back to its last whole row
    assert steps(tail.read(LATER)) == [1, 2]
    assert not tail.problem


def test_a_long_line_costs_what_its_length_is(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    seconds = []
    for megabytes in (4, 24):
        path.write_bytes(b"x" * (megabytes * 2**20))
        began = time.process_time()
        Tail(path).read(LATER)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 18 * max(seconds[0], 0.01)  # six times as long; 36 times if each part copied all before it


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_first_look_at_a_half_written_line_begins_at_a_whole_one(tmp_path: Path, is_whole: bool):
    path = tmp_path / "samples.jsonl"
    long = json.dumps({"step": 4, "response": "x" * 1000}) + "\n"
    path.write_text(lines(1, 3) + (long if is_whole else long[:-10]))
    tail = Tail(path, last_bytes=200)
    assert steps(tail.read(LATER)) == ([1, 2, 3, 4] if is_whole else [1, 2, 3])
    with path.open("a") as file:
        file.write(("" if is_whole else long[-10:]) + lines(5, 5))
    assert steps(tail.read(LATER)) == ([5] if is_whole else [4, 5])
    assert tail.num_damaged == 0


def test_a_file_that_can_be_read_again_is(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    tail, problems = Tail(path), []
    assert steps(tail.read(LATER)) == []
    assert "cannot be read" in tail.problem
    assert last_row(path, problems) == {}
    assert "cannot be read" in problems[0]
    path.rmdir()
    path.write_text(lines(1, 2) + "[" * 200_000 + "\n")
    assert steps(tail.read(LATER)) == [1, 2]
    assert (tail.problem, tail.num_damaged) == ("", 1)


def test_series_keep_what_is_a_number_and_nothing_else():
    rows = [
        {"step": 1, "a": 1, "b": "x", "c": None},
        {"step": 2, "a": True, "c": 10**400},
        {"a": 3},
        {"step": 3, "a": 2.5},
    ]
    found = series_of(rows)
    assert list(found) == ["a", "c"]
    np.testing.assert_array_equal(found["a"].values, [1, np.nan, 2.5])
    np.testing.assert_array_equal(found["a"].steps, [1, 2, 3])
    assert np.isnan(found["c"].values).all()
