"""A source as a table, against the plain way, record by record."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data import row_by_row
from tests.data.conftest import make
from tests.data.pair_files import pair_rows, prompt_of, says, write
from trimtab.core.errors import DataError, EngineError
from trimtab.core.types import Demonstration, LabelledResponse, Message, PreferencePair, Prompt
from trimtab.data import kept, prepare
from trimtab.data.chat import Chat
from trimtab.data.pairs import group_pairs, group_replies
from trimtab.data.tokens import table_of
from trimtab.stages.sft import demonstration_trees

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=["ours", "llama3", "llama2"], scope="module")
def chat(request):
    return Chat(make(request.param))


FITS = [(200, "truncate_prompt_left"), (24, "truncate_prompt_left"), (24, "drop")]


def same_pairs(chat, path, max_tokens, on_too_long, limit=None):
    plain_counts = {}
    fits = {"max_tokens": max_tokens, "on_too_long": on_too_long}
    train, held_out, read = row_by_row.split(PreferencePair, path, held_out=0.3, on_bad_row="drop", limit=limit)
    found = prepare.prepare(PreferencePair, path, chat, on_bad_row="drop", limit=limit)
    assert found.counts == read
    parts = found.table.split(0.3)
    counts = {}
    for records, part in zip((train, held_out), parts, strict=True):
        trees, compared, pairs = row_by_row.pairs(records, chat, **fits, counts=plain_counts)
        table = group_pairs(part, chat, **fits, counts=counts)
        assert list(table.trees) == trees
        assert list(table.compared) == compared
        assert table.pairs() == pairs
        assert table.pairs(3) == pairs[:3]
        assert table.num_pairs == len(pairs)
        if trees:
            batch, pieces = table.batch(), [table.batch([i]) for i in range(len(trees))]
            assert batch.labels.tolist() == pytest.approx([p.label for p in pairs])
            assert [tree for piece in pieces for tree in piece.trees.trees] == list(batch.trees.trees)
    assert counts == plain_counts
    return found


@pytest.mark.parametrize(("max_tokens", "on_too_long"), FITS)
def test_pairs_are_those_of_the_plain_way(tmp_path, chat, max_tokens, on_too_long):
    same_pairs(chat, write(tmp_path / "pairs.jsonl", pair_rows()), max_tokens, on_too_long)


@pytest.mark.parametrize(("max_tokens", "on_too_long"), FITS)
def test_pairs_of_a_large_file_are_those_of_the_plain_way_and_kept(
    tmp_path, chat, large, cache, monkeypatch, max_tokens, on_too_long
):
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    first = same_pairs(chat, path, max_tokens, on_too_long)
    assert len(list(cache.glob("*/meta.json"))) == 1
    monkeypatch.setattr(prepare, "_build", lambda *_: pytest.fail("it was kept"))
    again = same_pairs(chat, path, max_tokens, on_too_long)
    assert again.dropped == first.dropped
    assert "row 6" in again.dropped[0]


def test_the_first_rows_of_a_large_file_are_kept_apart(tmp_path, large, cache):
    chat = Chat(make("ours"))
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    assert len(same_pairs(chat, path, 200, "drop", limit=20).table) == 19
    assert len(same_pairs(chat, path, 200, "drop").table) == 58
    assert len(list(cache.glob("*/meta.json"))) == 2


def test_judged_replies_are_those_of_the_plain_way(tmp_path, chat):
    random_ = random.Random(1)
    prompts, replies = [prompt_of(random_) for _ in range(6)], [says(random_) for _ in range(9)]
    rows = [
        {"prompt": random_.choice(prompts), "completion": random_.choice(replies), "label": random_.random() < 0.5}
        for _ in range(50)
    ]
    path = write(tmp_path / "thumbs.jsonl", rows)
    for max_tokens, on_too_long in FITS:
        counts, plain_counts = {}, {}
        fits = {"max_tokens": max_tokens, "on_too_long": on_too_long}
        train, _, read = row_by_row.split(LabelledResponse, path, held_out=0.3)
        found = prepare.prepare(LabelledResponse, path, chat)
        table = group_replies(found.table.split(0.3)[0], chat, **fits, counts=counts)
        trees, good, bad = row_by_row.judgements(train, chat, **fits, counts=plain_counts)
        assert (list(table.trees), list(table.desirable), list(table.undesirable)) == (trees, good, bad)
        assert table.totals == (sum(map(sum, good)), sum(map(sum, bad)))
        assert (found.counts, counts) == (read, plain_counts)


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_demonstrations_are_those_of_the_plain_way(tmp_path, chat, large, train_on):
    random_ = random.Random(2)
    path = write(
        tmp_path / "shown.jsonl", [{"prompt": prompt_of(random_), "completion": says(random_)} for _ in range(40)]
    )
    for max_tokens, on_too_long in FITS:
        counts, plain_counts = {}, {}
        fits = {"train_on": train_on, "max_tokens": max_tokens, "on_too_long": on_too_long}
        table = prepare.prepare(Demonstration, path, chat, by_prompt=False).table
        train, held_out, _ = row_by_row.split(Demonstration, path, held_out=0.3)
        for part, records in zip(table.split(0.3), (train, held_out), strict=True):
            found = demonstration_trees(part, chat, SimpleNamespace(**fits), counts)
            assert list(found) == row_by_row.demonstrations(records, chat, **fits, counts=plain_counts)
        assert counts == plain_counts


def test_turns_that_are_not_to_be_learnt_from_are_not_trained(tmp_path):
    chat = Chat(make("ours"))
    turns = ["a", "one", "b", "two", "c", "three"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[1]["weight"] = 0
    path = write(tmp_path / "talk.jsonl", [{"messages": messages}])
    table = prepare.prepare(Demonstration, path, chat, by_prompt=False).table
    options = SimpleNamespace(train_on="all", max_tokens=200, on_too_long="drop")
    [tree] = demonstration_trees(table, chat, options, {})
    trained = [i for i, m in zip(tree.branches[0].ids, tree.branches[0].mask, strict=True) if m]
    assert trained == chat.encode_response("two") + chat.encode_response("three")


def test_chosen_replies_as_demonstrations(tmp_path, large):
    chat = Chat(make("ours"))
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    rows = [row for row in pair_rows() if isinstance(row, dict)]
    rows += [{"prompt": rows[0]["prompt"], "chosen": rows[0]["chosen"], "rejected": "xy"}]  # chosen twice
    rows += [{"prompt": rows[1]["prompt"], "chosen": "xy", "rejected": rows[1]["chosen"]}]  # beaten in another pair
    table = prepare.prepare(
        PreferencePair, write(path, rows), chat, on_bad_row="drop", by_prompt=False
    ).table.best_replies()
    train, _, _ = row_by_row.split(PreferencePair, path, held_out=0.0, on_bad_row="drop")
    beaten = {(p.prompt.messages, p.rejected) for p in train}
    best = {(p.prompt.messages, p.chosen): Demonstration(prompt=p.prompt, response=p.chosen) for p in train}
    shown = [d for key, d in best.items() if key not in beaten]
    assert len(shown) < len(train) - 1
    for train_on in ("last", "all"):
        fits = {"train_on": train_on, "max_tokens": 30, "on_too_long": "truncate_prompt_left"}
        found = demonstration_trees(table, chat, SimpleNamespace(**fits), {})
        assert list(found) == row_by_row.demonstrations(shown, chat, **fits, counts={})


@pytest.mark.parametrize("sized", [False, True])
def test_bad_rows_stop_with_all_of_them_counted(tmp_path, sized, request):
    if sized:
        request.getfixturevalue("large")
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    chat = Chat(make("ours"))
    if sized:
        prepare.prepare(PreferencePair, path, chat, on_bad_row="drop")  # what is kept must not hide them
    with pytest.raises(DataError, match="2 of 60 rows cannot be used: 1 broken_json, 1 empty_response") as error:
        prepare.prepare(PreferencePair, path, chat)
    assert error.value.where.endswith("row 6")


@pytest.mark.parametrize("sized", [False, True])
def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path, sized, request):
    if sized:
        request.getfixturevalue("large")
    rows = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(12)]
    rows[8]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write(tmp_path / "pairs.jsonl", rows)
    chat = Chat(make("llama2"))
    with pytest.raises(DataError, match="1 of 12 rows cannot be used: 1 template_refuses") as error:
        prepare.prepare(PreferencePair, path, chat)
    assert error.value.where == f"{path}, row 9"
    found = prepare.prepare(PreferencePair, path, chat, on_bad_row="drop")
    assert found.counts == {"rows": 12, "records": 11, "dropped_template_refuses": 1}
    assert [p.prompt.text for p in found.table.records()] == [r["prompt"] for i, r in enumerate(rows) if i != 8]


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("kind", [PreferencePair, LabelledResponse])
def test_two_prompts_with_one_id_are_refused_or_the_later_is_left_out(tmp_path, sized, kind, request):
    """They were put together under the first prompt."""
    if sized:
        request.getfixturevalue("large")
    pair = {"chosen": "yes", "rejected": "no"} if kind is PreferencePair else {"completion": "yes", "label": True}
    names = [(1, "What is 2+2?"), (2, "Why?"), (1, "What is 2+2?"), (1, "Capital of France?"), (2, "How?")]
    path = write(tmp_path / "rows.jsonl", [{"id": i, "prompt": text, **pair} for i, text in names])
    chat = Chat(make("ours"))
    with pytest.raises(DataError, match="the id '1' is that of another prompt: here 'Capital of France") as error:
        prepare.prepare(kind, path, chat)
    assert error.value.where == f"{path}, row 4"
    assert f"{path}, row 1 'What is 2" in error.value.problem
    assert "2 of 5 rows" in error.value.problem
    found = prepare.prepare(kind, path, chat, on_bad_row="drop")
    assert found.counts == {"rows": 5, "records": 3, "dropped_id_of_another_prompt": 2}
    assert [r.prompt.text for r in found.table.records()] == ["What is 2+2?", "Why?", "What is 2+2?"]


def test_a_json_document_is_held_in_memory_by_one_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda _: range(4))
    rows = [{"prompt": "Hi", "completion": "Yo"}]
    document, lines = tmp_path / "rows.json", write(tmp_path / "lines.json", rows)
    document.write_text(json.dumps(rows, indent=1))
    assert prepare.num_processes(lines) == 4
    assert prepare.num_processes(document) == prepare.num_processes(f"{lines},{document}") == 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("times", [2, 0])  # a second time the rows, or only the beginning of a write
def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(
    tmp_path, large, cache, monkeypatch, processes, times
):
    """Its tokens were kept under the hash of what it was before."""
    path = write(
        tmp_path / "pairs.jsonl", [{"prompt": f"Question {i}?", "chosen": "y", "rejected": "n"} for i in range(20)]
    )
    plain, real = path.read_text(), prepare.tokenise
    monkeypatch.setattr(prepare, "num_processes", lambda _: processes)

    def while_it_is_written(chat, records, rows):
        path.write_text(plain * times)
        if times == 0:
            raise DataError("there are no rows in it", where=str(path), fix="name a file that holds data")
        return real(chat, records, rows)

    monkeypatch.setattr(prepare, "tokenise", while_it_is_written)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare.prepare(PreferencePair, path, Chat(make("ours")))
    assert not list(cache.iterdir())


@pytest.mark.parametrize("sized", [False, True])
def test_rows_that_give_no_record_are_refused(tmp_path, sized, request):
    if sized:
        request.getfixturevalue("large")
    said = [{"text": text, "role": "assistant", "replies": []} for text in ("a", "b")]  # nobody ranked them
    path = write(
        tmp_path / "trees.jsonl",
        [{"message_tree_id": "1", "prompt": {"text": "Hi", "role": "prompter", "replies": said}}],
    )
    with pytest.raises(DataError, match="no PreferencePair can be made of 1 rows"):
        prepare.prepare(PreferencePair, path, Chat(make("ours")))


def test_ids_above_the_number_of_tokens_are_kept_whole():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<|end|>": 1, "far": 70_000}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", unk_token="<unk>"))
    table = table_of(
        chat, Demonstration, [Demonstration(prompt=Prompt(messages=(Message("user", "Why?"),)), response="far far")]
    )
    assert table.replies(0)[0][1] == [70_000, 70_000, 1]


def test_where_nothing_can_be_kept_tokens_stay_in_memory(tmp_path, large, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", ["x"])))
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    same_pairs(Chat(make("ours")), path, 200, "drop")
    assert "tokens stay in memory" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, large, cache, monkeypatch):
    def full(self, columns):
        raise kept._no_room(OSError(28, "No space left on device"))

    monkeypatch.setattr(kept.Keeper, "add", full)
    path = write(tmp_path / "pairs.jsonl", pair_rows())
    with pytest.raises(EngineError, match="No space left"):
        prepare.prepare(PreferencePair, path, Chat(make("ours")), on_bad_row="drop")
    assert not list(cache.iterdir())


def test_what_a_process_raises_is_raised_here(tmp_path, large):
    import gzip

    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in pair_rows(300)[30:]).encode())
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="cut off or damaged"):
        prepare.prepare(PreferencePair, path, Chat(make("ours")))


ENDLESS = """
import multiprocessing, time
from trimtab.data import prepare

class Work:
    def blocks(self, part, num_parts):
        while True:
            yield "x" * 100_000

for _ in prepare._in_order(Work(), 2):
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see whether a process lives")
def test_processes_that_tokenise_end_with_the_one_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, children))
