from __future__ import annotations

import json

import pytest

from trimtab.core.errors import DataError
from trimtab.evals.verdict_files import read_verdicts

ROW = {"prompt": "Is 7 prime?", "model": "mine", "baseline": "base", "verdict": 1.0}
ALPACA = {
    "instruction": "Is 7 prime?",
    "output_1": "Yes, it is.",
    "output_2": "Yes.",
    "generator_1": "base",
    "generator_2": "mine",
    "preference": 1.75,
}


@pytest.fixture
def read(tmp_path):
    """A function that writes rows to a file and reads it as verdicts."""

    def write_and_read(*rows):
        path = tmp_path / "verdicts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_verdicts([path])

    return write_and_read


def test_a_plain_row_is_read_whole(read):
    row = ROW | {"length": 4, "baseline_length": 11, "shown_first": "baseline", "judge": "anna"}
    (found,) = read(row).verdicts
    assert {name: getattr(found, name) for name in row} == row
    assert found.where.endswith("row 1")


def test_a_row_of_alpaca_eval_is_read_whole(read):
    (found,) = read(ALPACA | {"annotator": "gpt4"}).verdicts
    assert (found.prompt, found.model, found.baseline) == ("Is 7 prime?", "mine", "base")
    assert (found.verdict, found.length, found.baseline_length, found.judge) == (0.75, 4, 11, "gpt4")
    assert found.shown_first is None


def test_a_preference_of_0_is_a_tie_in_alpaca_eval(read):
    assert read(ALPACA | {"preference": 0}).verdicts[0].verdict == 0.5


def test_rows_without_a_verdict_and_exact_repeats_are_counted(read):
    found = read(ROW, ROW, ROW | {"prompt": "Is 8?", "verdict": None})
    assert len(found.verdicts) == 1
    assert (found.num_missing, found.num_repeated) == (1, 1)


def test_a_verdict_on_another_length_is_no_repeat(read):
    row = {"prompt": "p", "model": "m", "baseline": "b", "verdict": 1.0, "baseline_length": 4}
    found = read(row | {"length": 3}, row | {"length": 9}, row | {"length": 9})
    assert [one.length for one in found.verdicts] == [3, 9]
    assert found.num_repeated == 1


def test_columns_that_are_not_read_are_named(read):
    found = read(ROW | {"shown_frist": "model"}, ALPACA | {"dataset": "koala", "shown_frist": 1})
    assert found.not_read == ("shown_frist", "dataset")
    assert read(ROW, ALPACA).not_read == ()


def test_a_table_of_text_is_read_like_numbers(tmp_path):
    path = tmp_path / "verdicts.csv"
    path.write_text(
        "prompt,model,baseline,verdict,length,baseline_length,shown_first,judge\n"
        "p,m,b,0.5,10,20,model,anna\nq,m,b,1,,,,\nr,m,b,,1,2,,\n",
        encoding="utf-8",
    )
    found = read_verdicts([path])
    assert [(v.verdict, v.length, v.shown_first, v.judge) for v in found.verdicts] == [
        (0.5, 10, "model", "anna"),
        (1.0, None, None, ""),
    ]
    assert found.num_missing == 1


def test_both_orders_and_several_judges_do_not_contradict(read):
    orders = [ROW | {"shown_first": "model"}, ROW | {"shown_first": "baseline", "verdict": 0.0}]
    assert len(read(*orders, ROW | {"judge": "anna"}, ROW | {"judge": "ben", "verdict": 0.5}).verdicts) == 4


@pytest.mark.parametrize(
    ("rows", "problem", "where", "fix"),
    [
        ([ROW | {"verdict": 1.2}], "a verdict of 1.2", "row 1", "write 1 if"),
        ([ROW | {"verdict": True}], "a verdict of True", "row 1", "write 1 if"),
        ([ROW | {"verdict": "A"}], "a verdict of 'A'", "row 1", "write 1 if"),
        ([ALPACA | {"preference": 2.5}], "a verdict of 2.5", "row 1", "write 2 if"),
        ([ROW, ROW | {"prompt": ""}], "the prompt is ''", "row 2", "its prompt"),
        ([ROW | {"model": None}], "the model is None", "row 1", "its model"),
        ([{"prompt": "p", "model": "m", "verdict": 1}], "without baseline", "row 1", "columns prompt"),
        ([ROW | {"length": -1, "baseline_length": 3}], "a length of -1", "row 1", "number of characters"),
        ([ALPACA | {"output_1": ["Yes."]}], "a length of ['Yes.']", "row 1", "number of characters"),
        ([ROW | {"length": 2.5, "baseline_length": 3}], "a length of 2.5", "row 1", "number of characters"),
        ([ROW | {"length": "long", "baseline_length": 3}], "a length of 'long'", "row 1", "number of characters"),
        ([ROW | {"verdict": 10**400}], "a verdict of 1000", "row 1", "write 1 if"),
        ([ROW | {"shown_first": "left"}], "shown_first is 'left'", "row 1", "model or baseline"),
        ([ROW, ROW | {"verdict": 0.0}], "contradict each other: 1 and 0", "row 1 and", "`judge`"),
        ([ROW | {"verdict": None}], "none of the 1 rows", "verdicts.jsonl", "judged"),
    ],
)
def test_bad_rows_are_refused(read, rows, problem, where, fix):
    with pytest.raises(DataError) as refused:
        read(*rows)
    assert problem in refused.value.problem
    assert where in refused.value.where
    assert fix in refused.value.fix


def test_a_file_with_broken_rows_is_refused(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    path.write_text(json.dumps(ROW) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 rows cannot be read") as refused:
        read_verdicts([path])
    assert "row 2" in refused.value.where
