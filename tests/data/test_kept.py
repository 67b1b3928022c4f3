"""What is kept of a large file: found by content, made again if it is damaged, bounded, and whole."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from tests.data.conftest import make
from tests.data.pair_files import pair_rows, write
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Demonstration, PreferencePair
from trimtab.data import kept, prepare
from trimtab.data.chat import Chat


def test_what_is_kept_is_found_by_content_and_by_nothing_that_changed(tmp_path, large, cache):
    rows = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(12)]
    path = write(tmp_path / "pairs.jsonl", rows)
    chat = Chat(make("ours"))
    found = prepare.prepare(PreferencePair, path, chat)

    def num_kept():
        return len(list(cache.glob("*/meta.json")))

    (tmp_path / "copy").mkdir()
    prepare.prepare(PreferencePair, write(tmp_path / "copy" / "pairs.jsonl", rows), chat)
    assert num_kept() == 1
    changed = make("ours")
    changed.chat_template = chat.tokenizer.chat_template.replace("<|end|>'", "<|end|>\\n'")
    prepare.prepare(PreferencePair, path, Chat(changed))
    assert num_kept() == 2
    prepare.prepare(PreferencePair, path, Chat(make("chatml")))
    assert num_kept() == 3
    write(path, rows[::-1])
    assert prepare.prepare(PreferencePair, path, chat).sha256 != found.sha256
    assert num_kept() == 4
    with pytest.raises(DataError, match="another than when it was tokenised"):
        found.table.records()


def test_what_is_damaged_is_made_again(tmp_path, large, cache):
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    chat = Chat(make("ours"))
    ids = np.array(prepare.prepare(PreferencePair, path, chat, on_bad_row="drop").table.columns["ids"])
    for name in ("ids", "meta.json"):
        [file] = cache.glob(f"*/{name}")
        file.write_bytes(file.read_bytes()[:-9])
        again = prepare.prepare(PreferencePair, path, chat, on_bad_row="drop")
        assert (again.table.columns["ids"] == ids).all()


def test_what_is_kept_is_bounded(tmp_path, large, cache, monkeypatch):
    chat = Chat(make("ours"))
    for i in range(3):
        path = write(tmp_path / f"{i}.jsonl", pair_rows(seed=i))
        monkeypatch.setenv(kept.BOUND, "1e-5")
        found = prepare.prepare(PreferencePair, path, chat, on_bad_row="drop")
        assert len(list(cache.glob("*/meta.json"))) == 1
        assert len(found.table.records()) == len(found.table) == 58
    monkeypatch.setenv(kept.BOUND, "much")
    with pytest.raises(ConfigError, match="not a number"):
        prepare.prepare(PreferencePair, write(tmp_path / "4.jsonl", pair_rows(seed=4)), chat, on_bad_row="drop")


def test_a_bound_that_is_no_number_is_said_before_the_work(tmp_path, large, monkeypatch):
    monkeypatch.setenv(kept.BOUND, "much")
    monkeypatch.setattr(prepare, "tokenise", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(prepare, "num_processes", lambda _: 1)
    with pytest.raises(ConfigError, match="not a number"):
        prepare.prepare(PreferencePair, write(tmp_path / "pairs.jsonl", pair_rows()), Chat(make("ours")))


def test_two_processes_may_keep_the_same_and_a_third_remove_it(cache):
    """Runs of a sweep begin together. The second ended with "make room", and a removal between with an assertion."""
    columns = {name: np.arange(5).astype(dtype) for name, dtype in kept.DTYPES.items()}
    one, two = kept.Keeper("a" * 32), kept.Keeper("a" * 32)
    one.add(columns)
    two.add(columns)
    first, second = one.finish({}), two.finish({})
    assert [path.name for path in cache.iterdir()] == ["a" * 32]
    shutil.rmtree(cache)
    for found in (first, second):
        assert all((found[name] == columns[name]).all() for name in columns)


def test_columns_are_on_the_disk_before_they_get_their_name(cache, monkeypatch):
    synced: dict[int, int] = {}

    def sync(descriptor):
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    def name(keeper):
        found = [path.stat() for path in (*keeper._directory.iterdir(), keeper._directory)]
        assert len(found) == len(kept.DTYPES) + 2, "the columns, their note and the directory"
        assert all(synced[file.st_ino] == file.st_size for file in found)
        named.append(keeper)

    named: list[kept.Keeper] = []
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(kept.Keeper, "_give_name", name)
    keeper = kept.Keeper("a" * 32)
    keeper.add({name: np.arange(5).astype(dtype) for name, dtype in kept.DTYPES.items()})
    keeper.finish({})
    assert named == [keeper]


def test_what_a_kept_table_follows_from_is_in_its_name(tmp_path, monkeypatch):
    chat = Chat(make("ours"))
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    copy = write(tmp_path / "rows.ndjson", [{"prompt": "a"}])
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "a.csv", ["prompt"])

    def key(kind=PreferencePair, source=rows, limit=None, sha256="0"):
        return prepare.key_of(prepare.Records(kind, source, limit, chat), sha256)

    shards = key(source=tmp_path / "shards")
    (tmp_path / "shards" / "a.csv").rename(tmp_path / "shards" / "a.tsv")
    keys = [
        key(), key(kind=Demonstration), key(limit=3), key(sha256="1"), key(source=f"{rows}?ignore=id"),
        key(source=f"{rows}?columns=q:prompt"), key(source=copy), shards, key(source=tmp_path / "shards"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    chat.tokenizer.bos_token = "<|user|>"  # templates write it
    assert key() not in keys
    chat.tokenizer.bos_token = None
    assert key() == keys[0]
    for name in ("_code_hash", "importlib.metadata.version"):
        with monkeypatch.context() as changed:
            changed.setattr(f"trimtab.data.prepare.{name}", lambda *_: "another")
            assert key() not in keys
