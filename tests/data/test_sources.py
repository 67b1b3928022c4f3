from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys

import pytest

from trimtab.data.sources import is_hub, read_rows, read_world
from trimtab.errors import DataError
from trimtab.types import Demonstration, Prompt

ROWS = [{"prompt": "a ☃", "completion": "b\u2028c"}, {"prompt": "d", "completion": "e"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.fixture(params=["jsonl", "jsonl.gz", "ndjson", "csv", "csv.gz", "parquet", "bom"])
def data_file(request, tmp_path):
    kind = request.param
    table = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    match kind:
        case "jsonl" | "ndjson":
            return write(tmp_path / f"d.{kind}", LINES)
        case "bom":
            return write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + LINES)
        case "jsonl.gz":
            return write(tmp_path / "d.jsonl.gz", gzip.compress(LINES))
        case "csv":
            return write(tmp_path / "d.csv", table.encode("utf-8-sig"))
        case "csv.gz":
            return write(tmp_path / "d.csv.gz", gzip.compress(table.encode()))
        case _:
            return write_parquet(tmp_path / "d.parquet")


def test_every_file_type_gives_the_same_rows_with_their_places(data_file):
    rows = read_rows(data_file)
    assert [row for _, row in rows.rows] == ROWS
    assert [where for where, _ in rows.rows] == [f"{data_file}, row 1", f"{data_file}, row 2"]
    assert rows.sha256 == hashlib.sha256(data_file.read_bytes()).hexdigest()
    assert rows.bad == []


def test_a_limit_reads_only_the_first_rows(data_file):
    assert [row for _, row in read_rows(data_file, limit=1).rows] == ROWS[:1]


def test_csv_cells_hold_commas_line_breaks_and_values(tmp_path):
    content = 'prompt,completion,label,margin\n"a, ""b""\nc",d,True,0.5\ne,f,false,\n'
    rows = [row for _, row in read_rows(write(tmp_path / "d.csv", content.encode())).rows]
    assert rows == [
        {"prompt": 'a, "b"\nc', "completion": "d", "label": True, "margin": 0.5},
        {"prompt": "e", "completion": "f", "label": False, "margin": None},
    ]


def test_a_csv_cell_may_be_very_long(tmp_path):
    path = write(tmp_path / "d.csv", b"prompt\n" + b"x" * 200_000 + b"\n")
    assert len(read_rows(path).rows[0][1]["prompt"]) == 200_000


def test_broken_rows_are_given_back_with_their_places(tmp_path):
    lines = [b'{"prompt": "a"}', b'{"prompt": ', b"", b'{"prompt": "\xe9"}', b"[1]", b'{"prompt": "b"}']
    rows = read_rows(write(tmp_path / "d.jsonl", b"\n".join(lines)))
    assert [where.rpartition(", ")[2] for where, _ in rows.rows] == ["row 1", "row 6"]
    assert [(bad.where.rpartition(", ")[2], bad.kind) for bad in rows.bad] == [
        ("row 2", "broken_json"),
        ("row 4", "not_utf8"),
        ("row 5", "broken_json"),
    ]
    assert "0xe9 at column 13" in rows.bad[1].problem


def test_a_csv_row_with_too_many_cells_is_given_back(tmp_path):
    (bad,) = read_rows(write(tmp_path / "d.csv", b"prompt,completion\na,b\na,b,c\n")).bad
    assert (bad.where.rpartition(", ")[2], bad.problem) == ("row 2", "3 cells under 2 column names")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "no rows"),
        ("d.jsonl", b"\n\n", "no rows"),
        ("d.csv", b"prompt,completion\n", "no rows"),
        ("d.csv", b"a,a\nb,c\n", "does not name the columns"),
        ("d.csv", b'prompt\n"a\n', "not a CSV file"),
        ("d.csv", b"prompt\na\n\xe9\n", "0xe9 is not UTF-8"),
        ("d.json", b'[{"prompt": "a"},]', "not a whole JSON document"),
        ("d.jsonl.gz", b"not gzip", "cut off or damaged"),
        ("d.jsonl.gz", gzip.compress(LINES)[:-12], "cut off or damaged"),
        ("d.parquet", b"PAR1", "not a whole Parquet file"),
        ("d.txt", b"a", "no known type"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_is_wrong_and_what_to_do(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert str(path) in caught.value.where
    assert caught.value.fix


def test_a_cut_gzip_file_says_how_much_of_it_could_be_read(tmp_path):
    lines = b"".join(json.dumps({"prompt": f"{i:05d}" * 100}).encode() + b"\n" for i in range(2000))
    whole = gzip.compress(lines)
    path = write(tmp_path / "d.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"\d{2,} whole lines could be read"):
        read_rows(path)


def test_a_missing_file_is_not_taken_for_a_hub_data_set(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read_rows("data/train.jsonl")
    with pytest.raises(DataError, match="no data file in the folder"):
        read_rows(tmp_path)


def test_hub_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("hub:openai/gsm8k?split=train")
    assert is_hub("openai/gsm8k")
    assert not is_hub("data/train.parquet")
    assert not is_hub("gsm8k")
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "gsm8k").touch()
    assert not is_hub("openai/gsm8k")


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("hub:org/name?split=test&config=main")
    assert asked == [("org/name", "main", "test", None)]
    assert rows.rows[1] == ("hub:org/name?split=test, row 2", ROWS[1])
    expected = b"".join(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n" for row in ROWS)
    assert rows.sha256 == hashlib.sha256(expected).hexdigest()


def test_a_hub_data_set_that_cannot_be_read_is_explained(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="'org/name' could not be read: ConnectionError: offline"):
        read_rows("org/name")
    with pytest.raises(DataError, match="no option is called 'splt'"):
        read_rows("hub:org/name?splt=train")


def test_a_world_is_a_source_of_prompts_and_demonstrations():
    prompts = read_world("world:helpdesk?split=validation&num=3&seed=1", demonstrations=False)
    assert [type(p) for p in prompts] == [Prompt] * 3
    assert [type(d) for d in read_world("world:helpdesk?num=2", demonstrations=True)] == [Demonstration] * 2
    assert prompts == read_world("world:helpdesk?split=validation&num=3&seed=1", demonstrations=False)
    assert prompts != read_world("world:helpdesk?split=validation&num=3&seed=2", demonstrations=False)


@pytest.mark.parametrize("options", ["split=dev", "num=many", "rows=3"])
def test_a_mistake_in_the_options_of_a_world_is_explained(options):
    with pytest.raises(DataError, match=options.split("=")[1] if "rows" not in options else "rows"):
        read_world(f"world:helpdesk?{options}", demonstrations=False)


def test_reading_data_does_not_load_torch():
    code = "import sys, trimtab.data.layouts, trimtab.data.preferences; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
