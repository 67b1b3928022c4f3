from __future__ import annotations

import csv
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.feedback.published import votes_of
from trimtab.core.errors import DataError
from trimtab.feedback.vote_files import read_votes
from trimtab.votes.table import style_difference, style_of, votes_from_rows

ROWS = [
    {"item": "1", "annotator": "ann", "choice": "A", "shown_left": "B", "seconds": 4.5, "slice": "math"},
    {"item": "1", "annotator": "bob", "choice": "tie", "shown_left": "A", "seconds": 3.0, "slice": "math"},
    {"item": "2", "annotator": "ann", "choice": "B", "shown_left": None, "seconds": None, "slice": ""},
    {"item": "2", "annotator": "bob", "choice": "cannot_judge", "shown_left": "A", "seconds": 9.0, "slice": ""},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_votes(tmp_path, ending):
    votes = read_votes(write(tmp_path / f"votes.{ending}", ROWS))
    assert votes.items == ("1", "2")
    assert votes.annotators == ("ann", "bob")
    assert votes.categories == ("A", "tie", "B")
    assert [votes.categories[c] for c in votes.choice] == ["A", "tie", "B"]
    np.testing.assert_array_equal(votes.a_left, [0, 1, math.nan])
    np.testing.assert_array_equal(votes.seconds, [4.5, 3, math.nan])
    assert [votes.slices[s] if s >= 0 else "" for s in votes.slice] == ["math", "math", ""]
    assert votes.counts == {"rows": 4, "votes": 3, "not_judged": 1}
    assert votes.table().tolist() == [[1, 1, 0], [0, 0, 1]]
    assert votes.swap is not None
    assert votes.swap.tolist() == [2, 1, 0]


def test_the_first_vote_of_an_annotator_on_an_item_stands_for_agreement():
    votes = votes_of([("1", "ann", "A"), ("1", "bob", "B"), ("1", "ann", "B"), ("2", "ann", "B")])
    first = votes.first_votes()
    assert [(first.item[i], first.annotator[i], first.categories[first.choice[i]]) for i in range(3)] == [
        (0, 0, "A"),
        (0, 1, "B"),
        (1, 0, "B"),
    ]


def test_comparisons_of_the_same_replies_are_one_item_whichever_was_a(tmp_path):
    row = {"prompt": "Hi", "response_a": "yes", "response_b": "no", "choice": "A", "annotator": "ann"}
    turned = {**row, "response_a": "no", "response_b": "yes", "choice": "B", "annotator": "bob", "shown_left": "A"}
    other = {**row, "prompt": "Bye"}
    votes = read_votes(write(tmp_path / "comparisons.jsonl", [row, turned, other]))
    assert votes.item.tolist() == [0, 0, 1]
    assert len({votes.categories[c] for c in votes.choice}) == 1
    assert votes.a_left[1] == 1  # "no" is A of the item, and was on the left
    assert votes.characters.tolist() == [5, 5]
    assert votes.style is not None


def test_models_follow_the_sides(tmp_path):
    row = {"prompt": "Hi", "response_a": "b", "response_b": "a", "choice": "A", "annotator": "ann"}
    votes = read_votes(write(tmp_path / "x.jsonl", [{**row, "model_a": "gpt", "model_b": "llama"}]))
    assert votes.models == (("llama", "gpt"),)
    assert votes.categories[votes.choice[0]] == "B"


def test_other_tables_are_read_by_naming_their_columns(tmp_path):
    rows = [
        {"doc": 7, "system": "x", "worker": 1.0, "verdict": True},
        {"doc": 7, "system": "y", "worker": 2.0, "verdict": False},
    ]
    votes = read_votes(
        write(tmp_path / "x.jsonl", rows), columns={"item": "doc+system", "annotator": "worker", "choice": "verdict"}
    )
    assert votes.items == ("7 + x", "7 + y")
    assert votes.annotators == ("1", "2")
    assert votes.categories == ("false", "true")
    wide = [{"id": "p", "ann": 0, "bob": 2}, {"id": "q", "ann": 10, "bob": None}]
    votes = read_votes(write(tmp_path / "y.jsonl", wide), columns={"item": "id"}, annotator_columns=["ann", "bob"])
    assert votes.categories == ("0", "2", "10")  # in the order of numbers
    assert votes.values is not None
    assert votes.ordered
    assert votes.counts["not_judged"] == 1


def test_an_order_of_categories_is_taken_as_given(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"item": "1", "annotator": "a", "choice": c} for c in ("good", "bad", "fair")])
    votes = read_votes(path, order=["bad", "fair", "good"])
    assert votes.categories == ("bad", "fair", "good")
    with pytest.raises(DataError, match="'fair' has no place"):
        read_votes(path, order=["bad", "good"])


def test_strength_makes_a_scale_through_the_tie():
    rows = [("A", 2), ("B", 1), ("tie", None), ("A", None)]
    votes = votes_from_rows([("", {"item": "1", "annotator": c + str(s), "choice": c, "strength": s}) for c, s in rows])
    graded = votes.graded()
    assert graded is not None
    assert graded.categories == ("-2", "-1", "0", "1", "2")
    assert [graded.categories[c] for c in graded.choice] == ["2", "-1", "0"]
    assert graded.swap is not None
    assert graded.swap.tolist() == [4, 3, 2, 1, 0]
    assert votes_of([("1", "a", "A")]).graded() is None


def test_both_bad_is_a_choice_of_its_own_and_a_tie_on_a_scale():
    votes = votes_of([("1", "a", "A"), ("1", "b", "both_bad"), ("1", "c", "B")])
    assert votes.categories == ("A", "both_bad", "B")
    assert not votes.ordered
    assert votes.bad_as_ties().table().tolist() == [[1, 1, 1]]
    assert votes.bad_as_ties().categories == ("A", "tie", "B")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"item": "1", "choice": "A"}, "no annotator"),
        ({"annotator": "1", "choice": "A"}, "no item"),
        ({"item": "1", "annotator": "a", "choice": "A", "shown_left": "left"}, "it names a side, A or B"),
        ({"item": "1", "annotator": "a", "choice": "A", "seconds": -3}, "seconds is -3"),
        ({"item": "1", "annotator": "a", "choice": "A", "seconds": "long"}, "seconds is 'long'"),
    ],
)
def test_a_row_that_is_no_vote_is_refused_by_name(tmp_path, row, problem):
    with pytest.raises(DataError, match=problem) as caught:
        read_votes(write(tmp_path / "x.jsonl", [row]))
    assert caught.value.where.endswith("x.jsonl, row 1")


def test_mistakes_of_the_command_line_are_explained(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"item": "1", "annotator": "a", "choice": "A"}])
    with pytest.raises(DataError, match="no column is called 'worker'"):
        read_votes(path, columns={"annotator": "worker"})
    with pytest.raises(DataError, match="'rater' is no column of a vote table"):
        read_votes(path, columns={"rater": "annotator"})
    with pytest.raises(DataError, match="no column is called 'ann'"):
        read_votes(path, annotator_columns=["ann"])
    with pytest.raises(DataError, match="no file"):
        read_votes(tmp_path / "project.toml")
    rows = [{"item": "1", "annotator": "a", "choice": "A", "model_a": x, "model_b": "z"} for x in "xy"]
    with pytest.raises(DataError, match="other replies or models"):
        read_votes(write(tmp_path / "z.jsonl", rows))
    path.write_text("{broken\n")
    with pytest.raises(DataError, match="not a JSON object"):
        read_votes(path)


def test_style_is_counted_and_its_difference_turns_with_the_sides():
    text = "# Title\n\nSome **bold** words\n- one\n2. two\n#hash"
    assert style_of(text).tolist() == [10, 1, 2, 1]
    a, b = style_of(text), style_of("plain")
    np.testing.assert_allclose(style_difference(a, b), -style_difference(b, a))


def test_a_csv_column_with_a_gap_has_the_same_categories(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("item,r1,r2\n1,3,3.0\n2,4,4.0\n3,5,\n")
    table = read_votes(path, annotator_columns=("r1", "r2"))
    assert list(table.categories) == ["3", "4", "5"]
