from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys

import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, Prompt
from trimtab.data.layouts import load
from trimtab.data.sources import is_hub, read_rows
from trimtab.worlds.source import read_world

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


def test_a_csv_row_that_names_the_columns_again_is_given_back(tmp_path):
    rows = read_rows(write(tmp_path / "d.csv", b"prompt,completion\na,b\nprompt,completion\nc,d\n"))
    assert [row["prompt"] for _, row in rows.rows] == ["a", "c"]
    assert [(bad.where.rpartition(", ")[2], bad.kind) for bad in rows.bad] == [("row 2", "repeated_header")]


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
        # without the time, which would be a part of the name of the test
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "cut off or damaged"),
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


TABLE = [{"prompt": "a", "completion": "b, c"}, {"prompt": "d; e", "completion": "f"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", json.dumps(TABLE)),
        ("d.jsonl", json.dumps(TABLE, indent=1)),
        ("d.json", json.dumps({"version": 1, "data": TABLE})),
        ("d.json", "".join(json.dumps(row) + "\n" for row in TABLE)),
        ("d.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in TABLE)),
        ("d.tsv", "prompt\tcompletion\na\tb, c\nd; e\tf\n"),
        ("d.csv", "prompt\tcompletion\na\tb, c\nd; e\tf\n"),
        ("d.csv", 'prompt;completion\na;b, c\n"d; e";f\n'),
        ("d.csv", 'sep=;\r\nprompt;completion\r\na;b, c\r\n"d; e";f\r\n'),
        ("d.csv", "prompt|completion\na|b, c\nd; e|f\n"),
        ("d.csv", '\n  \nprompt,completion\na,"b, c"\nd; e,f\n'),
        ("d.CSV", 'prompt,completion\na,"b, c"\nd; e,f\n'),
    ],
)
def test_json_documents_and_other_separators_are_read(tmp_path, name, content):
    rows = read_rows(write(tmp_path / name, content.encode()))
    assert [row for _, row in rows.rows] == TABLE
    assert not rows.bad


def test_the_row_numbers_that_pandas_writes_are_a_column_of_their_own(tmp_path):
    ((_, row),) = read_rows(write(tmp_path / "d.csv", b",prompt\n0,a\n")).rows
    assert row == {"Unnamed: 0": "0", "prompt": "a"}


LIKE_FORMULAS = ("- a list", "=1+1", "+3", "@you", " - b", "'-c", "''=d", "\tx", "NaN", "'NaN", "it's", "'q'")


@pytest.mark.parametrize("text", LIKE_FORMULAS)
def test_a_csv_cell_that_looks_like_a_formula_comes_back_as_it_was(tmp_path, text):
    from trimtab.feedback.exporting import to_bytes

    content = to_bytes([{"prompt": text, "chosen": [text], "n": 1}], "d.csv")
    ((_, row),) = read_rows(write(tmp_path / "d.csv", content)).rows
    assert row["prompt"] == text


@pytest.mark.parametrize("column", ["prompt", "Prompt", "target", "output_1", "response-chosen", "User Prompt"])
def test_a_csv_cell_of_a_prompt_or_reply_is_a_text_although_it_looks_like_a_list(tmp_path, column):
    ((_, row),) = read_rows(write(tmp_path / "d.csv", f'{column},n\n"[1, 2]",3\n'.encode())).rows
    assert row[column] == "[1, 2]"


@pytest.mark.parametrize(
    ("text", "value"),
    [("[1, 2]", [1, 2]), ("['a', 'b']", ["a", "b"]), ("['a' 'b']", "['a' 'b']"), ("[True, False]", [True, False])],
)
def test_a_list_in_a_csv_cell_is_read_where_no_text_is_meant(tmp_path, text, value):
    ((_, row),) = read_rows(write(tmp_path / "d.csv", f'prompt,steps\n"{text}","{text}"\n'.encode())).rows
    assert row == {"prompt": text, "steps": value}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"prompt": "cut \\ud83d"}', "half_character"),
        (b'{"prompt": [{"role": "user", "content": "\\uDE00 cut"}]}', "half_character"),
        (b'{"cut \\ud83d": 1}', "half_character"),
        (b'{"prompt": "a", "prompt": "b"}', "repeated_name"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "broken_json"),
        (b'{"a":' * 100_000, "broken_json"),
    ],
)
def test_rows_of_other_faults_have_kinds_of_their_own(tmp_path, line, kind):
    rows = read_rows(write(tmp_path / "d.jsonl", b'{"prompt": "whole \\ud83d\\ude00"}\n' + line + b"\n"))
    assert [row for _, row in rows.rows] == [{"prompt": "whole 😀"}]
    assert [(bad.where[-5:], bad.kind) for bad in rows.bad] == [("row 2", kind)]


def test_an_object_with_earlier_turns_is_one_row(tmp_path):
    row = {"instruction": "And now?", "history": [{"role": "user", "content": "Hi"}], "output": "Bye."}
    assert [found for _, found in read_rows(write(tmp_path / "d.json", json.dumps(row).encode())).rows] == [row]


@pytest.mark.parametrize("column", ["messages", "dialogue", "label", "steps", "meta"])
def test_half_a_character_in_a_csv_cell_is_a_bad_row(tmp_path, column):
    content = f'{column}\n"[{{""content"": ""cut \\ud83d""}}]"\n"[1]"\n'
    rows = read_rows(write(tmp_path / "d.csv", content.encode()))
    assert [row for _, row in rows.rows] == [{column: [1]}]
    assert [(bad.where[-5:], bad.kind) for bad in rows.bad] == [("row 1", "half_character")]


def test_half_a_character_is_a_bad_row_where_fields_are_left_out(tmp_path):
    content = 'prompt,source\n"[{""role"": ""user"", ""content"": ""cut \\ud83d""}]",x\nHi,x\n'
    rows = read_rows(f"{write(tmp_path / 'd.csv', content.encode())}?ignore=source")
    assert [row for _, row in rows.rows] == [{"prompt": "Hi"}]
    assert [bad.kind for bad in rows.bad] == ["half_character"]


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("d.json", b'{"system": "Be brief.", "data": [{"prompt": "a"}]}', "write it into every row"),
        ("d.txt", b"a", "a text file has no columns"),
        ("d.jsonl.zst", b"a", "zstd -d"),
        ("d.xlsx", b"a", "save the sheet as CSV"),
        ("d.pkl", b"a", "a pickle can run code"),
        ("d.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "iconv -f utf-16"),
        ("d.csv", "prompt\na\n".encode("utf-16"), "iconv -f utf-16"),
        ("d.json", b'{"prompt": {"0": "a"}, "completion": {"0": "b"}}', "orient='records'"),
        ("d.csv", b"prompt\ra\rb\r", "convert it: tr"),
        ("d.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}\r', "convert it: tr"),
        ("d.jsonl.gz", b'{"prompt": "a"}\n', "take .gz off its name"),
    ],
)
def test_what_is_not_read_names_the_way_out(tmp_path, name, content, fix):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / name, content))
    assert fix in caught.value.fix


def names(rows) -> list[str]:
    return [row["prompt"] for _, row in rows.rows]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in (0, 1):
        write(folder / f"train-0000{i}-of-00002.jsonl", f'{{"prompt": "{i}"}}\n'.encode())
    return folder


def test_folders_patterns_and_lists_of_shards_are_one_source(shards):
    first, second = sorted(shards.iterdir())
    for source in (shards, f"{shards}/*.jsonl", f"{first},{second}", f"{first}, {second}"):
        rows = read_rows(source)
        assert names(rows) == ["0", "1"]
        assert [where for where, _ in rows.rows] == [f"{first}, row 1", f"{second}, row 1"]
    assert read_rows(shards).sha256 == read_rows(f"{first},{second}").sha256 != read_rows(f"{second},{first}").sha256
    assert names(read_rows(shards, limit=1)) == ["0"]
    assert names(read_rows(f"{shards}?columns=prompt:prompt")) == ["0", "1"]


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "prompt", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="two columns are called 'prompt'"):
        read_rows(tmp_path / "d.parquet")


def test_a_decimal_of_a_table_is_a_number(tmp_path):
    import decimal

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "rating": [decimal.Decimal("1.50")]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert read_rows(tmp_path / "d.parquet").rows[0][1]["rating"] == 1.5
    with pytest.raises(DataError, match=r"rating is 1\.5: it judges the replies"):
        load(Demonstration, tmp_path / "d.parquet")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_in_a_wide_encoding_is_converted_by_the_command_that_is_named(tmp_path, encoding):
    path = write(tmp_path / "d.jsonl", LINES.decode().encode(encoding))
    with pytest.raises(DataError, match="not UTF-8") as caught:
        read_rows(path)
    command = caught.value.fix.removeprefix("convert it: ").split()
    (tmp_path / "e.jsonl").write_bytes(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout)
    assert [row for _, row in read_rows(tmp_path / "e.jsonl").rows] == ROWS


def test_a_folder_with_several_splits_asks_which(shards):
    write(shards / "test.jsonl", b'{"prompt": "t"}\n')
    with pytest.raises(DataError, match="the splits test, train") as caught:
        read_rows(shards)
    assert f"{shards}?split=test" in caught.value.fix
    assert names(read_rows(f"{shards}?split=train")) == ["0", "1"]


def test_a_folder_that_lacks_a_shard_or_mixes_types_is_refused(shards):
    write(shards / "train.csv", b"prompt\na\n")
    with pytest.raises(DataError, match="several types: csv, jsonl"):
        read_rows(shards)
    (shards / "train.csv").unlink()
    (shards / "train-00000-of-00002.jsonl").unlink()
    with pytest.raises(DataError, match="number 0 is missing"):
        read_rows(shards)


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("data_train.jsonl", "data_test.jsonl", "test"),
        ("sft-train.jsonl", "sft-val.jsonl", "validation"),
        ("helpful_train-00000-of-00001.jsonl", "helpful.eval.jsonl", "test"),
    ],
)
def test_a_split_is_named_anywhere_in_the_name_of_a_file(tmp_path, train, other, split):
    write(tmp_path / train, b'{"prompt": "a"}\n')
    write(tmp_path / other, b'{"prompt": "b"}\n')
    with pytest.raises(DataError, match="the splits"):
        read_rows(tmp_path)
    assert names(read_rows(f"{tmp_path}?split=train")) == ["a"]
    assert names(read_rows(f"{tmp_path}?split={split}")) == ["b"]


@pytest.mark.parametrize("name", ["part2.jsonl.zst", "part2.jsonl.bz2", "part2.zip", "more.xlsx", "part2.txt", "part2"])
def test_a_folder_with_data_of_a_type_that_is_not_read_is_refused(tmp_path, name):
    write(tmp_path / "part1.jsonl", b'{"prompt": "a"}\n')
    write(tmp_path / name, b"b")
    with pytest.raises(DataError, match="of no type that is read") as caught:
        read_rows(tmp_path)
    assert name in caught.value.problem
    assert names(read_rows(f"{tmp_path}/*.jsonl")) == ["a"]


def test_a_folder_may_hold_what_is_no_data_and_endings_in_capitals(tmp_path):
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", "train-1.py", "test.jsonl.zst"):
        write(tmp_path / name, b"b")
    write(tmp_path / "train-1.jsonl", b'{"prompt": "a"}\n')
    write(tmp_path / "train-2.JSONL", b'{"prompt": "b"}\n')
    assert names(read_rows(tmp_path)) == ["a", "b"]


def test_a_saved_data_set_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(TABLE).save_to_disk(tmp_path / "one")
    assert [row for _, row in read_rows(tmp_path / "one").rows] == TABLE
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(TABLE) for name in ("train", "test")})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="the splits train, test"):
        read_rows(tmp_path / "both")
    assert [row for _, row in read_rows(f"{tmp_path}/both?split=test").rows] == TABLE


def test_a_missing_file_is_not_taken_for_a_hub_data_set(tmp_path):
    with pytest.raises(DataError, match="no data file in the folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"there is no file 'data/train\.jsonl'"):
        read_rows("data/train.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl\? Or name a file"):
        read_rows(tmp_path / "folder" / "trian.jsonl")


def test_a_file_in_the_home_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/rows.jsonl", "~/rows.jsonl?columns=prompt:question", f"{tmp_path}/rows.jsonl,~/rows.jsonl"):
        assert read_rows(source).rows


@pytest.mark.parametrize("source", ["", " ", "?columns=a:prompt"])
def test_an_empty_name_is_not_the_current_directory(tmp_path, monkeypatch, source):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no source is named"):
        read_rows(source)


def test_a_limit_that_reads_nothing_is_refused(data_file):
    with pytest.raises(DataError, match="a limit of -5 reads no row"):
        read_rows(data_file, limit=-5)


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


def test_one_folder_of_a_hub_data_set_is_read(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, **options):
        asked.append(options)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_rows("hub:org/name?data_dir=harmless&split=test")
    assert asked == [{"split": "test", "revision": None, "data_dir": "harmless"}]


def test_a_hub_data_set_without_a_network_says_which_file_to_copy_and_what_to_set(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_rows("hub:org/name?data_dir=harmless&split=test")
    assert "copy its file (harmless, test) here" in caught.value.fix
    assert "variables.rows=FILE" in caught.value.fix


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


def test_a_line_that_is_no_json_is_quoted_where_it_breaks(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": c}\n{"prompt": "d"}\n')
    whole, wrong = (read_rows(path).bad[i].problem for i in (0, 1))
    assert 'the line ends after \'{"prompt": "b"\'' in whole
    assert "at column 12: '{\"prompt\": c}'" in wrong
