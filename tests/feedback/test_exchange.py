"""What goes in and what comes out: every layout, and no loss on the way round."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from tests.feedback.conftest import Make
from tests.feedback.projects import (
    BAD,
    TIE,
    A,
    B,
    add,
    answer_next,
    answered,
    item,
    lease,
    make_store,
    pairs_of,
    person,
    write,
)
from trimtab.core.errors import DataError
from trimtab.core.types import Comparison, Message, PreferencePair, Prompt
from trimtab.data.layouts import load
from trimtab.data.sources import read_rows
from trimtab.feedback import items, people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.assign import set_open
from trimtab.feedback.board import make_board
from trimtab.feedback.exporting import LAYOUTS, export, to_bytes, write_export
from trimtab.feedback.importing import Options, import_source
from trimtab.feedback.store import Store, add_guideline, verify
from trimtab.feedback.vote_files import read_votes
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import adjudicate, reopen, vote
from trimtab.votes.study import study

# --- in ---


@pytest.mark.parametrize(
    ("rows", "num"),
    [
        ([{"prompt": "p", "response_a": "x", "response_b": "y"}], 1),
        ([{"prompt": "p", "chosen": "x", "rejected": "y"}], 1),
        ([{"chosen": "\n\nHuman: p\n\nAssistant: x", "rejected": "\n\nHuman: p\n\nAssistant: y"}], 1),
        ([{"prompt": "p", "responses": ["x", "y", "z"]}], 3),
        ([{"prompt": "p", "responses": [{"text": "x", "model": "m"}, {"text": "y", "seed": 1}]}], 1),
        ([{"prompt": "p", "response": r} for r in ("x", "y", "z", "x")], 3),
        ([{"messages": [{"role": "user", "content": "p"}], "responses": ["x", "y"]}], 1),
    ],
)
def test_pairs_from_every_layout(small: Make, tmp_path: Path, rows: list[dict], num: int):
    counts = import_source(small(), write(tmp_path / "rows.jsonl", rows))
    assert counts["added"] == num


def test_other_kinds_from_their_layouts(tmp_path: Path):
    def added(kind: str, row: dict) -> int:
        folder = tmp_path / kind
        folder.mkdir()
        store = make_store(folder, {"task": {"kind": kind}})
        num = import_source(store, write(folder / "rows.jsonl", [row]))["added"]
        store.close()
        return num

    assert added("ranking", {"prompt": "p", "responses": ["x", "y", "z"]}) == 1
    assert added("rating", {"prompt": "p", "completion": "x"}) == 1
    assert added("steps", {"prompt": "p", "completions": ["x", "y"]}) == 1
    assert added("demonstration", {"prompt": "p"}) == 1
    assert added("edit", {"prompt": "p", "response": "x"}) == 1


def test_which_reply_was_chosen_cannot_be_told_from_the_item(small: Make, tmp_path: Path):
    store = small()
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    import_source(store, write(tmp_path / "rows.jsonl", rows))
    with store.read() as connection:
        first = [row.replies[0]["text"] for row in items.search_items(connection, limit=1000)]
    assert 70 < sum(text.startswith("good") for text in first) < 130


def test_gold_from_preferences_expects_the_chosen_reply(small: Make, tmp_path: Path):
    store = small()
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    import_source(store, write(tmp_path / "rows.jsonl", rows), Options(purpose="gold"))
    with store.read() as connection:
        for row in items.search_items(connection, limit=100):
            assert row.replies["AB".index(row.gold["choice"])]["text"].startswith("good")


def test_bad_rows_are_named_or_counted(small: Make, tmp_path: Path):
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "x"}, {"prompt": 3}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="2 of 3 rows cannot be used") as error:
        import_source(small(), path)
    assert "row 2" in error.value.where
    assert import_source(small(), path, Options(on_bad_row="drop"))["dropped_bad_row"] == 2


def test_origins_are_kept_and_samples_of_generate_are_compared(small: Make, tmp_path: Path):
    store = small()
    origin = {"model": "run/model", "checkpoint": "step-10", "seed": 3, "sampling": {"temperature": 0.7}}
    rows = [{"prompt": "p", "response": text, **origin} for text in ("x", "y")]
    import_source(store, write(tmp_path / "rows.jsonl", rows))
    with store.read() as connection:
        (row,) = items.search_items(connection, limit=10)
    assert all(reply["source"] == origin for reply in row.replies)


def test_votes_given_elsewhere_come_in_once(make: Make, tmp_path: Path):
    store = make({"assignment": {"overlap": 3}})
    rows = [
        {"prompt": "p", "response_a": "x", "response_b": "y", "choice": c, "annotator": n}
        for c, n in (("A", "ann"), ("B", "bob"), ("A", "eve"))
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    assert import_source(store, path, Options(with_votes=True))["votes"] == 3
    assert import_source(store, path, Options(with_votes=True))["votes"] == 0
    assert verify(store) == []
    (pair,) = pairs_of(store)
    assert (pair.chosen, pair.label) == ("x", pytest.approx(2 / 3))


def test_real_preferences_go_through(small: Make):
    path = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data is not here")
    store = small()
    counts = import_source(store, str(path), Options(limit=200, on_bad_row="drop"))
    assert counts["added"] + counts["dropped_known_item"] + counts["dropped_bad_row"] == 200
    with gzip.open(path, "rt", encoding="utf-8") as file:
        row = json.loads(next(file))
    with store.read() as connection:
        first = items.search_items(connection, limit=1)[0]
    assert row["chosen"].strip().endswith(max((r["text"] for r in first.replies), key=row["chosen"].count))


# --- out ---


def busy_store(folder: Path) -> Store:
    store = make_store(folder, {"assignment": {"overlap": 3}, "task": {"scale": 4, "flags": ["rude"]}})
    add(store, 8, slice="s")
    crowd = [person(store, name) for name in ("Ann", "Bob", "=Eve", "Jo")]
    said = [A, Answer(choice="B", strength=2, rationale="=1+1", flags=("rude",)), TIE, BAD, Answer(choice="skip")]
    for i in range(6):
        for k, someone in enumerate(crowd):
            answer_next(store, someone, said[(i + k) % 5])
    adjudicate(
        store, person(store, "Judge", "adjudicator"), 1, Answer(choice="B", strength=1, taxonomy="bad data"), key="k"
    )
    people.set_state(store, 2, "banned")
    people.set_state(store, 3, "banned")
    people.delete_person(store, 3)
    people.update_person(store, 1, keys={"tie": "x"}, view={"stacked": True}, warned=True)
    return store


def test_what_is_written_is_read_back_by_our_readers(tmp_path: Path):
    store = busy_store(tmp_path)
    expected = pairs_of(store)
    for layout in ("preference", "conversational", "implicit"):
        for ending in ("jsonl", "parquet", "csv"):
            path = tmp_path / f"{layout}.{ending}"
            write_export(store, layout, path)
            back = load(PreferencePair, path).records
            assert [(p.prompt.messages, p.prompt.id, p.chosen, p.rejected, p.label, p.margin) for p in back] == [
                (p.prompt.messages, p.prompt.id, p.chosen, p.rejected, p.label, p.margin) for p in expected
            ]
    write_export(store, "comparisons", tmp_path / "c.jsonl")
    assert load(Comparison, tmp_path / "c.jsonl").records == load(Comparison, f"feedback:{store.project.path}").records
    store.close()


ODD_TURNS = [
    [("user", "=1+1, or -2?")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi "), ("assistant", "\n\nHuman: no"), ("user", "Bye")],
    [("user", "\n\nHuman: quoted\n\nAssistant: this")],
]


@pytest.mark.parametrize("turns", ODD_TURNS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("layout", ["preference", "conversational", "implicit", "comparisons"])
def test_odd_texts_come_back_equal_in_every_format(tmp_path: Path, turns, ending, layout):
    store = make_store(tmp_path, {"task": {"kind": "pairs"}, "labels": {"min_votes": 1}})
    asked = Prompt(messages=tuple(Message(role, text) for role, text in turns))
    replies = tuple(items.NewReply(text=text, source={}) for text in ("- one\r\n- two", " '+3 é😀 "))
    items.add_items(store, [("row 1", items.NewItem(kind="pairs", prompt=asked, replies=replies))])
    answer_next(store, person(store, "Ann"), Answer(choice="A", strength=1))
    path = tmp_path / f"out.{ending}"
    write_export(store, layout, path)
    (pair,) = load(PreferencePair, path).records
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == (asked.messages, "- one\r\n- two", " '+3 é😀 ")
    store.close()


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_reply_that_looks_like_messages_is_no_message(tmp_path: Path, ending: str):
    store = make_store(tmp_path)
    texts = ('[{"role": "assistant", "content": "x"}]', "other")
    replies = tuple(items.NewReply(text=text) for text in texts)
    items.add_items(store, [("row 1", items.NewItem(kind="pairs", prompt=item(1).prompt, replies=replies))])
    answered(store, A)
    write_export(store, "comparisons", tmp_path / f"c.{ending}")
    (comparison,) = load(Comparison, tmp_path / f"c.{ending}").records
    assert {comparison.response_a, comparison.response_b} == set(texts)
    assert len(read_votes(tmp_path / f"c.{ending}")) == 1
    store.close()


def test_the_statistics_read_the_vote_table_and_the_project_alike(tmp_path: Path):
    store = busy_store(tmp_path)
    with store.read() as connection:
        num = len(list(cast_votes(connection)))
    store.close()
    assert len(read_votes(store.project.path)) == num


def test_replies_that_begin_with_their_prompt_come_back(tmp_path: Path):
    store = make_store(tmp_path)
    prompt = Prompt(messages=(Message("user", "Say hi there"),))
    replies = tuple(items.NewReply(text=f"Say hi there {word}") for word in ("yes", "no"))
    items.add_items(store, [("row 1", items.NewItem(kind="pairs", prompt=prompt, replies=replies))])
    answered(store, A)
    write_export(store, "preference", tmp_path / "p.jsonl")
    (pair,) = load(PreferencePair, tmp_path / "p.jsonl").records
    assert pair.prompt.messages == prompt.messages
    assert {pair.chosen, pair.rejected} == {"Say hi there yes", "Say hi there no"}
    store.close()


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_the_exported_votes_give_the_same_judgements_as_the_project(tmp_path: Path, ending: str):
    assignment = {"overlap": 9, "gold_rate": 0.2, "reask_rate": 0.2}
    store = make_store(tmp_path, {"assignment": assignment, "qualification": {"questions": 1}})
    add(store, 30)
    add(store, 5, first=100, purpose="gold", gold={"choice": "A"})
    add(store, 1, first=200, purpose="quiz", gold={"choice": "A"})
    for name in ("Ann", "Bob", "Eve"):
        someone = person(store, name)
        while answer_next(store, someone) is not None:
            pass
    people.set_state(store, 2, "banned")
    adjudicate(
        store, person(store, "Jo", "adjudicator"), 1, Answer(choice="B", strength=1, taxonomy="bad data"), key="k"
    )
    write_export(store, "votes", tmp_path / f"votes.{ending}")
    store.close()
    exported, project = read_votes(tmp_path / f"votes.{ending}"), read_votes(store.project.path)
    for one in (exported, project):
        assert one.annotators == ("Ann", "Eve")
    assert len(exported) == len(project)
    assert exported.table().sum() == project.table().sum() == len(project)
    assert exported.counts["not_counted"] == exported.counts["rows"] - len(exported) > 30  # Bob's, gold, quiz, decision
    assert any("left out" in note for note in study(exported, num_resamples=2).notes)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_an_exported_ranking_counts_as_it_does_in_the_project(tmp_path: Path, ending: str):
    store = make_store(tmp_path, {"task": {"kind": "ranking"}, "assignment": {"overlap": 3}})
    add(store, 6, kind="ranking", num=4)
    for number, name in enumerate(("Ann", "Bob", "Eve")):
        someone = person(store, name)
        while given_out := lease(store, someone):
            order = ((2,), (0, 3), (1,)) if (given_out.item_id + number) % 3 else ((1,), (2,), (3,), (0,))
            vote(store, someone, given_out.token, Answer(choice="done", ranking=order))
    write_export(store, "votes", tmp_path / f"votes.{ending}")
    store.close()
    exported, project = read_votes(tmp_path / f"votes.{ending}"), read_votes(store.project.path)
    assert len(exported) == len(project) == 18 * 6
    assert exported.categories == project.categories
    assert (exported.table() == project.table()).all()
    assert (exported.group == project.group).all()
    assert np.array_equal(exported.a_left, project.a_left, equal_nan=True)


def test_agreement_rests_on_the_first_vote_also_if_it_was_changed_later(small: Make, tmp_path: Path):
    store = small({"assignment": {"reask_rate": 0.5}})
    add(store, 40)
    ann = person(store, "Ann")
    receipts = {}
    while (given_out := lease(store, ann)) is not None and given_out.purpose == "task":
        receipts[given_out.item_id] = vote(store, ann, given_out.token, B)
    assert given_out is not None
    vote(store, ann, given_out.token, B)
    vote(store, ann, reopen(store, ann, receipts[given_out.item_id].vote_id).token, A)
    write_export(store, "votes", tmp_path / "votes.jsonl")
    for source in (store.project.path, tmp_path / "votes.jsonl"):
        votes = read_votes(source)
        first = votes.first_votes()
        assert len(votes) == len(first) + 1
        assert [votes.categories[choice] for choice in first.choice].count("A") == 1
    with store.read() as connection:
        changed = next(cast.id for cast in cast_votes(connection) if cast.answer.choice == "A")
    vote(store, ann, reopen(store, ann, changed).token, Answer(choice="cannot_judge"))
    write_export(store, "votes", tmp_path / "votes.jsonl")
    for source in (store.project.path, tmp_path / "votes.jsonl"):
        assert len(read_votes(source)) == len(first) - 1  # without its first vote the other says nothing


def test_rankings_that_nobody_could_judge_are_counted(small: Make, tmp_path: Path):
    store = small({"task": {"kind": "ranking"}, "assignment": {"overlap": 2}})
    add(store, 1, kind="ranking", num=3)
    answered(store, Answer(choice="done", ranking=((0,), (1,), (2,))), Answer(choice="cannot_judge"))
    write_export(store, "votes", tmp_path / "votes.csv")
    for source in (store.project.path, tmp_path / "votes.csv"):
        assert read_votes(source).counts == {"rows": 2, "votes": 3, "not_judged": 1}


def test_points_that_nobody_gave_are_part_of_the_scale(small: Make):
    store = small({"task": {"kind": "rating", "rating_scale": 5}, "assignment": {"overlap": 2}})
    add(store, 1, kind="rating", num=1)
    answered(store, Answer(choice="done", rating=4), Answer(choice="done", rating=5))
    assert read_votes(store.project.path).categories == ("1", "2", "3", "4", "5")


def test_a_card_says_where_rows_come_from(tmp_path: Path):
    store = busy_store(tmp_path)
    card = write_export(store, "preference", tmp_path / "p.jsonl")
    assert json.loads((tmp_path / "p.jsonl.card.json").read_text()) == card
    assert card["guideline_version"] == 1
    assert card["settings_sha256"] == store.project.sha256
    assert {"audit_head", "rows_sha256", "trimtab", "counts"} <= card.keys()
    for layout in LAYOUTS:
        export(store, layout)
    store.close()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_dump_comes_back_without_loss(make: Make, tmp_path: Path, ending: str):
    folder = tmp_path / "first"
    folder.mkdir()
    store = busy_store(folder)
    path = tmp_path / f"dump.{ending}"
    write_export(store, "dump", path)
    again = make({"assignment": {"overlap": 3}, "task": {"scale": 4, "flags": ["rude"]}})
    counts = import_source(again, str(path))
    assert (counts["items"], counts["people"]) == (8, 5)
    assert export(again, "dump").rows == export(store, "dump").rows
    assert export(again, "votes").rows == export(store, "votes").rows
    assert pairs_of(again) == pairs_of(store)
    assert verify(again) == []
    with pytest.raises(DataError, match="has items already"):
        import_source(again, str(path))
    store.close()


def test_a_damaged_dump_is_refused_and_nothing_of_it_is_stored(tmp_path: Path):
    (tmp_path / "first").mkdir()
    store = busy_store(tmp_path / "first")
    write_export(store, "dump", tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    of = {json.loads(line)["record"]: i for i, line in enumerate(lines)}  # the last of each kind
    damages = {
        "records follow": [lines[:-1]],
        "not a whole JSON object": [
            [*lines[: of[kind]], lines[of[kind]][:-9] + "\n", *lines[of[kind] + 1 :]]
            for kind in ("person", "item", "vote")
        ],
        "does not hold": [
            [line.replace('"item": "', '"item": "0') for line in lines],
            [line.replace('"person": "Ann', '"person": "Anna') for line in lines],
        ],
    }
    for said, texts in damages.items():
        for i, text in enumerate(texts):
            (tmp_path / "damaged.jsonl").write_text("".join(text))
            folder = tmp_path / f"{said[:3]}{i}"
            folder.mkdir()
            again = make_store(folder, {"assignment": {"overlap": 3}, "task": {"scale": 4, "flags": ["rude"]}})
            with pytest.raises(DataError, match=said):
                import_source(again, str(tmp_path / "damaged.jsonl"))
            assert make_board(again).counts["items"] == make_board(again).counts["people"] == 0
            again.close()
    store.close()


def test_restored_votes_name_the_guideline_they_were_given_under(small: Make, tmp_path: Path):
    store = small()
    add(store, 1)
    with store.write() as connection:
        add_guideline(connection, store.now(), None, "Second")
    answer_next(store, person(store, "Ann"))
    write_export(store, "dump", tmp_path / "dump.jsonl")
    again = small()
    with again.write() as connection:
        add_guideline(connection, again.now(), None, "Of the new project")
    import_source(again, str(tmp_path / "dump.jsonl"))
    with again.read() as connection:
        (cast,) = cast_votes(connection)
        text = sa.select(t.guidelines.c.text).where(t.guidelines.c.version == cast.guideline_version)
        assert connection.execute(text).scalar_one() == "Second"


def test_a_dump_neither_gives_nor_takes_rights(small: Make, tmp_path: Path):
    store = small()
    person(store, "Ann")
    person(store, "Bob", "admin")
    write_export(store, "dump", tmp_path / "dump.jsonl")
    again = small()
    person(again, "Ann", "admin")
    person(again, "Bob")
    import_source(again, str(tmp_path / "dump.jsonl"))
    with again.read() as connection:
        roles = {row.name: row.role for row in connection.execute(sa.select(t.people))}
    assert (roles["Ann"], roles["Bob"]) == ("admin", "annotator")


def test_a_dump_in_a_table_of_texts_comes_back_too(small: Make, tmp_path: Path):
    store = small({"assignment": {"overlap": 3}})
    add(store, 2)
    answered(store, A, TIE, Answer(choice="skip", reason="other"))
    write_export(store, "dump", tmp_path / "dump.csv")
    again = small({"assignment": {"overlap": 3}})
    import_source(again, str(tmp_path / "dump.csv"))
    assert export(again, "dump").rows == export(store, "dump").rows
    assert verify(again) == []


def test_a_name_that_a_csv_file_cannot_hold_is_named(small: Make, tmp_path: Path):
    store = small()
    person(store, "[7]")
    write_export(store, "dump", tmp_path / "dump.csv")
    with pytest.raises(DataError, match=r"name is \[7\](.|\n)*\.jsonl"):
        import_source(small(), str(tmp_path / "dump.csv"))
    write_export(store, "dump", tmp_path / "dump.jsonl")
    again = small()
    import_source(again, str(tmp_path / "dump.jsonl"))
    with again.read() as connection:
        assert people.by_name(connection, "[7]") is not None


def test_no_column_is_lost_because_the_first_row_lacks_it(tmp_path: Path):
    rows = [
        {"a": 1},
        {"a": 2, "b": [], "flags": ["rude"], "object": {"x": 1}, "number": 1},
        {"b": ["x"], "object": {"y": None}, "messages": [{"role": "user", "content": "q"}], "number": 0.5, "none": {}},
    ]
    (tmp_path / "rows.parquet").write_bytes(to_bytes(rows, "rows.parquet"))
    back = [row for _, row in read_rows(tmp_path / "rows.parquet").rows]
    names = ["a", "b", "flags", "object", "number", "messages", "none"]
    assert [list(row) for row in back] == [names] * 3
    assert [row["flags"] for row in back] == [None, ["rude"], None]
    assert [row["b"] for row in back] == [None, [], ["x"]]
    assert back[2]["messages"] == [{"role": "user", "content": "q"}]  # of one shape: as it is
    assert [row["object"] for row in back] == [None, '{"x": 1}', '{"y": null}']  # else as JSON text, nothing added
    assert [row["number"] for row in back] == [None, 1.0, 0.5]


def test_a_paused_project_is_paused_when_it_comes_back(small: Make, tmp_path: Path):
    store = small({"assignment": {"gold_rate": 0.5}})
    add(store, 2)
    set_open(store, False)
    write_export(store, "dump", tmp_path / "dump.jsonl")
    again = small({"assignment": {"gold_rate": 0.5}})
    import_source(again, str(tmp_path / "dump.jsonl"))
    add(again, 3, first=10)
    add(again, 3, first=20, purpose="gold", gold={"choice": "A"})
    ann = person(again, "Ann")
    assert lease(again, ann) is None
    set_open(again, True)
    assert lease(again, ann) is not None
