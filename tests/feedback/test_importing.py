"""Importing: nothing is lost when it is cut short, nothing is stored twice, and mistakes come before any change."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from tests.feedback.projects import PASSWORD, add, lease, make_store, person
from trimtab.core.errors import DataError
from trimtab.feedback import items, people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.exporting import to_bytes, write_export
from trimtab.feedback.importing import Options, import_source, seed_items
from trimtab.feedback.store import verify
from trimtab.feedback.vote_files import read_votes
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import vote


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"p{i}", "response_a": "x", "response_b": "y", **more}


def num_items(store) -> int:
    with store.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(t.items)).scalar_one())


# --- the project's own data ---


def test_a_first_import_that_is_cut_short_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "rows.jsonl", [pair(i) for i in range(10)])
    monkeypatch.setattr(items, "CHUNK", 4)
    store = make_store(tmp_path, {"data": ["rows.jsonl"]})
    add_items, done = items._add, []

    def killed(*args: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(add_items(*args))

    monkeypatch.setattr(items, "_add", killed)
    with pytest.raises(KeyboardInterrupt):
        seed_items(store)
    assert num_items(store) == 4
    monkeypatch.setattr(items, "_add", add_items)
    assert seed_items(store)["added"] == 6
    assert seed_items(store) == {}
    write(tmp_path / "rows.jsonl", [pair(i) for i in range(12)])  # the file has grown
    assert seed_items(store)["added"] == 2
    store.close()


def test_a_bad_row_of_the_second_file_does_not_end_the_import_for_good(tmp_path: Path):
    write(tmp_path / "a.jsonl", [pair(1)])
    write(tmp_path / "b.jsonl", [{"prompt": "p"}])
    store = make_store(tmp_path, {"data": ["a.jsonl", "b.jsonl"]})
    with pytest.raises(DataError):
        seed_items(store)
    write(tmp_path / "b.jsonl", [pair(2)])
    assert seed_items(store)["added"] == 1
    assert num_items(store) == 2
    store.close()


# --- one question is one item ---


def test_sides_and_ids_of_rows_make_no_other_question(small: Make, tmp_path: Path):
    rows = [pair(1, id="row 1"), {"prompt": "p1", "response_a": "y", "response_b": "x", "id": "row 2"}, pair(1, id="3")]
    counts = import_source(small(), write(tmp_path / "rows.jsonl", rows))
    assert counts["added"] == 1
    assert counts["dropped_known_item"] == 2


def test_gold_of_exchanged_sides_is_the_same_gold_and_another_answer_is_not(small: Make, tmp_path: Path):
    turned = {"prompt": "p1", "response_a": "y", "response_b": "x"}
    rows = [pair(1, gold={"choice": "A"}), {**turned, "gold": {"choice": "B"}}, pair(2, choice="tie")]
    store = small()
    assert import_source(store, write(tmp_path / "rows.jsonl", rows), Options(purpose="gold"))["added"] == 2


def test_samples_of_one_prompt_are_compared_whatever_ids_their_rows_have(small: Make, tmp_path: Path):
    rows = [{"prompt": "p", "id": str(i), "response": text} for i, text in enumerate("xyz")]
    rows += [{"prompt": "another", "id": "0", "response": text} for text in "uv"]
    assert import_source(small(), write(tmp_path / "rows.jsonl", rows))["added"] == 3 + 1


def test_what_one_sample_says_is_true_of_the_prompt(small: Make, tmp_path: Path):
    rows: list[dict[str, Any]] = [{"prompt": "p", "response": text} for text in "xy"]
    rows[1] |= {"sensitive": True, "slice": "s", "priority": 5}
    store = small()
    import_source(store, write(tmp_path / "rows.jsonl", rows))
    with store.read() as connection:
        row = connection.execute(sa.select(t.items, t.queue.c.given).join(t.queue)).one()
    assert (row.sensitive, row.slice, row.given) == (True, "s", 5.0)
    rows[0]["slice"] = "another"
    with pytest.raises(DataError, match="have the slice 'another' and 's'"):
        import_source(small(), write(tmp_path / "rows.jsonl", rows))


# --- votes given elsewhere ---

SAID = ["a", "both_bad", "tie", "upper", "1", "", "A "]


def test_choices_that_are_none_are_named_before_anything_is_stored(small: Make, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [pair(i, choice=said, annotator="ann") for i, said in enumerate(SAID)])
    store = small()
    with pytest.raises(DataError, match="2 of 7 rows cannot be used") as error:
        import_source(store, path, Options(with_votes=True))
    assert "'upper'" in str(error.value)
    assert num_items(store) == 0
    counts = import_source(store, path, Options(with_votes=True, on_bad_row="drop"))
    assert (counts["votes"], counts["dropped_bad_row"], counts["not_judged"]) == (4, 2, 1)
    with store.read() as connection:
        assert [cast.answer.choice for cast in cast_votes(connection)] == ["A", "both_bad", "tie", "A"]


@pytest.mark.parametrize(
    "more",
    [
        {"strength": "high"}, {"strength": 3}, {"strength": 0}, {"strength": 1.5}, {"seconds": "fast"},
        {"seconds": -1}, {"shown_left": "left"}, {"rationale": "\ud83d"}, {"annotator": "\ud83d"},
        {"annotator": "deleted-1"},
    ],
)  # fmt: skip
def test_everything_else_of_a_vote_is_checked_too(small: Make, tmp_path: Path, more: dict):
    store = small({"task": {"scale": 4}})
    path = write(tmp_path / "rows.jsonl", [pair(1, **{"choice": "A", "annotator": "ann", **more})])
    with pytest.raises(DataError, match=r"strength|seconds|shown_left|D83D|deleted-1"):
        import_source(store, path, Options(with_votes=True))
    assert num_items(store) == 0


@pytest.mark.parametrize("kind", ["ranking", "rating", "edit", "demonstration", "steps"])
def test_projects_without_sides_refuse_the_votes_of_a_file(tmp_path: Path, kind: str):
    store = make_store(tmp_path, {"task": {"kind": kind}})
    path = write(tmp_path / "rows.jsonl", [pair(1, choice="A", annotator="ann")])
    with pytest.raises(DataError, match="votes of a file"):
        import_source(store, path, Options(with_votes=True))
    assert num_items(store) == 0
    store.close()


def test_a_file_without_choices_has_no_votes_and_says_so(small: Make, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match="no vote over two replies"):
        import_source(small(), path, Options(with_votes=True))


def test_votes_over_exchanged_sides_are_about_the_same_replies(make: Make, tmp_path: Path):
    turned = {"prompt": "p1", "response_a": "y", "response_b": "x"}
    rows = [
        pair(1, choice="A", annotator="ann", shown_left="A"),
        {**turned, "choice": "B", "annotator": "bob", "shown_left": "A"},
        {**turned, "choice": "tie", "annotator": "eve"},
    ]
    store = make({"assignment": {"overlap": 3}})
    counts = import_source(store, write(tmp_path / "rows.jsonl", rows), Options(with_votes=True))
    assert (counts["added"], counts["votes"]) == (1, 3)
    with store.read() as connection:
        assert [(c.answer.choice, c.shown_left) for c in cast_votes(connection)] == [
            ("A", "A"),
            ("A", "B"),
            ("tie", None),
        ]
    assert verify(store) == []


def test_a_second_vote_measures_consistency_and_a_third_is_counted_as_left_out(make: Make, tmp_path: Path):
    said = [("ann", "A"), ("ann", "B"), ("ann", "B"), ("bob", "A")]
    path = write(tmp_path / "rows.jsonl", [pair(1, choice=choice, annotator=name) for name, choice in said])
    store = make({"assignment": {"overlap": 2}})
    counts = import_source(store, path, Options(with_votes=True))
    assert (counts["votes"], counts["repeated_votes"], counts["dropped_repeated_vote"]) == (3, 1, 1)
    again = import_source(store, path, Options(with_votes=True))
    assert (again["votes"], again["dropped_known_vote"], again["dropped_repeated_vote"]) == (0, 3, 1)
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["A", "A"]
        assert [c.answer.choice for c in cast_votes(connection, purposes=("reask",))] == ["B"]
    assert len(read_votes(store.project.path)) == 3
    assert verify(store) == []


@pytest.mark.parametrize("left", ["A", "B", None])
@pytest.mark.parametrize("restored", [False, True])
def test_whoever_voted_elsewhere_can_change_and_undo_that_vote(small: Make, tmp_path: Path, left, restored: bool):
    store = small({"assignment": {"overlap": 2}})
    rows = [pair(i, choice="A", annotator="Ann", shown_left=left) for i in range(2)]
    import_source(store, write(tmp_path / "rows.jsonl", rows), Options(with_votes=True))
    if restored:
        write_export(store, "dump", tmp_path / "dump.jsonl")
        store = small({"assignment": {"overlap": 2}})
        import_source(store, str(tmp_path / "dump.jsonl"))
    browser = Browser(store)
    with store.read() as connection:
        ann = people.by_name(connection, "Ann")
    assert ann is not None
    browser.get("/join")
    browser.post("/join", token=people.make_link(store, ann.id), name="Ann", password=PASSWORD)
    browser.read_guideline()
    said = {"A": "left, strength 1", "B": "right, strength 1", None: "one of the two, strength 1"}[left]
    assert browser.get("/mine").text.count(said) == 2
    assert browser.post("/mine/1").status_code == 200
    browser.post(f"/task/{browser.lease()}", position="1")
    with store.read() as connection:
        changed = list(cast_votes(connection))[-1]
    assert changed.answer.choice == changed.shown_left == (left or changed.shown_left)
    assert browser.post("/undo").status_code == 200
    assert browser.replies() == (["x", "y"] if changed.shown_left == "A" else ["y", "x"])
    assert verify(store) == []


def test_votes_of_somebody_who_is_banned_take_no_places(make: Make, tmp_path: Path):
    store = make()
    spam = person(store, "spam")
    people.set_state(store, spam.id, "banned")
    path = write(tmp_path / "rows.jsonl", [pair(1, choice="A", annotator="spam")])
    assert import_source(store, path, Options(with_votes=True))["votes"] == 1
    assert verify(store) == []
    assert lease(store, person(store, "Ann")) is not None
    people.set_state(store, spam.id, "active")
    assert verify(store) == []


@pytest.mark.parametrize("name", ["Bob  Smith", " worker 7 ", "f" * 64])
def test_whoever_is_named_in_a_file_can_use_their_link(small: Make, tmp_path: Path, name: str):
    store = small()
    path = write(tmp_path / "rows.jsonl", [pair(1, choice="A", annotator=name)])
    import_source(store, path, Options(with_votes=True))
    assert people.join(store, people.make_link(store, 1), name, PASSWORD).id == 1


def test_names_that_are_numbers_are_read_as_the_statistics_read_them(small: Make, tmp_path: Path):
    rows = [pair(1, choice="A", annotator=7.0), pair(2, choice="B", annotator=None)]
    (tmp_path / "rows.parquet").write_bytes(to_bytes(rows, "rows.parquet"))
    store = small()
    import_source(store, str(tmp_path / "rows.parquet"), Options(with_votes=True))
    with store.read() as connection:
        assert [someone.name for someone in people.everyone(connection)] == ["7", "imported"]
    assert read_votes(tmp_path / "rows.parquet").annotators == ("7", "(unnamed)")


def test_a_vote_given_elsewhere_is_asked_again_with_its_sides_swapped(small: Make, tmp_path: Path):
    store = small({"assignment": {"reask_rate": 0.5}})
    rows = [pair(i, choice="A", annotator="Ann", shown_left="B") for i in range(60)]
    import_source(store, write(tmp_path / "rows.jsonl", rows), Options(with_votes=True))
    with store.read() as connection:
        ann = people.by_name(connection, "Ann")
    assert ann is not None
    add(store, 10)
    while (again := lease(store, ann)) is not None and again.purpose == "task":
        vote(store, ann, again.token, Answer(choice="A", strength=1))
    assert again is not None
    assert (again.purpose, again.shown_order) == ("reask", (0, 1))


# --- columns of a file ---


def test_columns_of_another_name_are_named(small: Make, tmp_path: Path):
    rows = [{"instruction": "Add", "input": "1 2", "one": "3", "two": "4", "winner": "A", "who": "ann"}]
    path = write(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "instruction+input", "response_a": "one", "response_b": "two", "choice": "winner"}
    store = small()
    counts = import_source(store, path, Options(columns={**columns, "annotator": "who"}, with_votes=True))
    assert counts["votes"] == 1
    with store.read() as connection:
        (cast,) = cast_votes(connection)
    assert (cast.prompt["messages"][0]["content"], cast.annotator) == ("Add\n\n1 2", "ann")
    with pytest.raises(DataError, match="no column is called 'three'"):
        import_source(small(), path, Options(columns={**columns, "response_b": "three"}))


# --- what else a row says ---


@pytest.mark.parametrize(
    ("kind", "gold"),
    [
        ("pairs", "A"), ("pairs", {"choice": "left"}), ("pairs", {"answer": "A"}), ("pairs", {"choice": "skip"}),
        ("pairs", {"choice": ["A"]}), ("rating", {"label": 5}), ("rating", {"rating": 3}), ("rating", {"rating": "2"}),
        ("ranking", {"ranking": [[0]]}), ("ranking", {"ranking": 3}), ("edit", {"text": "x"}),
        ("steps", {"steps": [1]}),
    ],
)  # fmt: skip
def test_an_expected_answer_that_nobody_can_give_is_refused(tmp_path: Path, kind: str, gold: object):
    store = make_store(tmp_path, {"task": {"kind": kind}})
    rows: dict[str, dict[str, object]] = {
        "pairs": pair(1), "ranking": {"prompt": "p", "responses": ["x", "y"]},
        "steps": {"prompt": "p", "steps": ["x", "y"]},
    }  # fmt: skip
    row = {**rows.get(kind, {"prompt": "p", "completion": "x"}), "gold": gold}
    with pytest.raises(DataError, match=r"gold|expected answer"):
        import_source(store, write(tmp_path / "rows.jsonl", [row]), Options(purpose="quiz"))
    store.close()


def test_expected_answers_of_every_kind_are_taken(tmp_path: Path):
    for kind, row in {
        "pairs": pair(1, gold={"choice": "both_bad", "why": "neither"}),
        "ranking": {"prompt": "p", "responses": ["x", "y", "z"], "gold": {"ranking": [[1], [0, 2]]}},
        "rating": {"prompt": "p", "completion": "x", "gold": {"rating": 2}},
        "steps": {"prompt": "p", "steps": ["x", "y"], "gold": {"steps": [-1, None]}},
    }.items():
        folder = tmp_path / kind
        folder.mkdir()
        store = make_store(folder, {"task": {"kind": kind}})
        assert import_source(store, write(folder / "r.jsonl", [row]), Options(purpose="gold"))["added"] == 1
        store.close()


def test_cells_of_a_csv_file_mean_what_they_say(small: Make, tmp_path: Path):
    rows = [
        {"sensitive": "False", "priority": "2.5", "gold": "", "scores": '{"rm": [1, 0]}'},
        {"sensitive": "0", "priority": "", "gold": "", "scores": ""},
        {"sensitive": "true", "priority": "1", "gold": "", "scores": ""},
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*pair(0), *rows[0]])
        writer.writeheader()
        writer.writerows(pair(i) | row for i, row in enumerate(rows))
    store = small({"assignment": {"policy": "given"}})
    assert import_source(store, str(tmp_path / "rows.csv"))["added"] == 3
    with store.read() as connection:
        found = connection.execute(
            sa.select(t.items.c.sensitive, t.queue.c.given, t.queue.c.scores).join(t.queue)
        ).all()
    assert [tuple(row) for row in found] == [(False, 2.5, {"rm": [1, 0]}), (False, 0.0, {}), (True, 1.0, {})]


@pytest.mark.parametrize(
    "more",
    [
        {"priority": "high"}, {"sensitive": "perhaps"}, {"scores": [1, 2]}, {"scores": {"rm": "12"}},
        {"scores": {"rm": [1, float("nan")]}}, {"seed": float("nan")}, {"sampling": {"t": float("inf")}},
        {"facts": {"x": float("nan")}}, {"slice": "\ud83d"}, {"id": "\ud83d"},
    ],
)  # fmt: skip
def test_values_that_cannot_be_stored_are_named_with_their_row(small: Make, tmp_path: Path, more: dict):
    path = write(tmp_path / "rows.jsonl", [pair(0), pair(1, **more)])
    with pytest.raises(DataError) as error:
        import_source(small(), path)
    assert "row 2" in error.value.where
    assert import_source(small(), path, Options(on_bad_row="drop"))["dropped_bad_row"] == 1


def test_scores_of_many_replies_go_with_each_pair(small: Make, tmp_path: Path):
    store = small({"assignment": {"policy": "uncertainty"}})
    row = {"prompt": "p", "responses": ["x", "y", "z"], "scores": {"rm": [3, 1, 2]}}
    import_source(store, write(tmp_path / "rows.jsonl", [row]))
    with store.read() as connection:
        scores = [row.scores["rm"] for row in connection.execute(sa.select(t.queue))]
    assert scores == [[3, 1], [3, 2], [1, 2]]


def test_many_votes_are_imported_in_few_steps(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # statements grow with transactions and not with votes
    said = [pair(i, choice="AB"[(i + k) % 2], annotator=f"a{k}") for i in range(200) for k in range(3)]
    store = small()
    statements: list[str] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    counts = import_source(store, write(tmp_path / "rows.jsonl", said), Options(with_votes=True))
    assert counts["votes"] == 600
    assert len(statements) < 100


# --- columns that would change what is judged ---


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Answer the question.", "question": "What is 2+2?", "response_a": "4", "response_b": "5"},
        {"prompt": "Pick one.", "choices": ["Oslo", "Rome"], "response_a": "A", "response_b": "B"},
        {"prompt": "Answer.", "question": "What is 2+2?", "response": "4"},
    ],
)
def test_a_question_that_nobody_would_see_is_refused(small: Make, tmp_path: Path, row: dict):
    with pytest.raises(DataError, match="no part of the prompt, and would not be shown"):
        import_source(small(), write(tmp_path / "rows.jsonl", [row]))


def test_a_question_that_the_prompt_states_is_no_second_one(small: Make, tmp_path: Path):
    row = {"prompt": "Q: What is 2+2?", "question": "What is 2+2?", "response_a": "4", "response_b": "5"}
    assert import_source(small(), write(tmp_path / "rows.jsonl", [row]))["items"] == 1


def test_a_system_turn_is_used_and_tools_are_refused_in_any_spelling(small: Make, tmp_path: Path):
    store = small()
    import_source(store, write(tmp_path / "rows.jsonl", [pair(1) | {"System Prompt": "Answer in French."}]))
    with store.read() as connection:
        (prompt,) = connection.execute(sa.select(t.items.c.prompt)).scalars()
    assert prompt["messages"][0] == {"role": "system", "content": "Answer in French."}
    with pytest.raises(DataError, match="tools"):
        import_source(store, write(tmp_path / "rows.jsonl", [pair(2) | {"Tools": [{"name": "f"}]}]))
    both = pair(3) | {"system_prompt": "a", "System Prompt": "b"}
    with pytest.raises(DataError, match="are the same column"):
        import_source(store, write(tmp_path / "rows.jsonl", [both]))


def test_equal_samples_are_counted_and_belong_to_the_first_model(small: Make, tmp_path: Path):
    store = small()
    rows = [{"prompt": "p", "response": text, "model": model} for text, model in (("x", "a"), ("x", "b"), ("y", "c"))]
    assert import_source(store, write(tmp_path / "rows.jsonl", rows))["dropped_same_reply"] == 1
    with store.read() as connection:
        (replies,) = connection.execute(sa.select(t.items.c.replies)).scalars()
    assert {r["text"]: r["source"]["model"] for r in replies} == {"x": "a", "y": "c"}


def test_data_of_a_project_may_be_a_folder_that_grows_or_have_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "project" / "shards").mkdir(parents=True)
    write(tmp_path / "project" / "shards" / "1.jsonl", [pair(1)])
    write(tmp_path / "project" / "more.jsonl", [{"question": "q", "response_a": "x", "response_b": "y"}])
    settings = {"data": ["shards", "more.jsonl?columns=question:prompt"]}
    store = make_store(tmp_path / "project", settings)
    monkeypatch.chdir(tmp_path)
    seed_items(store)
    assert num_items(store) == 2
    assert seed_items(store) == {}
    write(tmp_path / "project" / "shards" / "2.jsonl", [pair(2)])
    seed_items(store)
    assert num_items(store) == 3


def test_scores_of_several_models_are_set_one_by_one(small: Make):
    store = small()
    add(store, 1)
    with store.read() as connection:
        sha256 = connection.execute(sa.select(t.items.c.sha256)).scalar_one()
    items.set_scores(store, {sha256: {"a": [0.1, 0.2]}})
    items.set_scores(store, {sha256: {"b": [0.4, 0.1]}})
    with store.read() as connection:
        assert set(connection.execute(sa.select(t.queue.c.scores)).scalar_one()) == {"a", "b"}


def test_a_file_that_comes_again_makes_nobody_anew_who_was_deleted(small: Make, tmp_path: Path):
    path = write(tmp_path / "votes.jsonl", [pair(1, choice="A", annotator="Ann")])
    store = small()
    import_source(store, path, Options(with_votes=True))
    people.delete_person(store, 1)
    again = import_source(store, path, Options(with_votes=True))
    assert (again["votes"], again["dropped_known_vote"]) == (0, 1)
    with store.read() as connection:
        assert [p.name for p in people.everyone(connection)] == ["deleted-1"]


def test_scores_of_more_items_than_a_statement_can_name(make: Make):
    store = make()
    add(store, 3)
    with store.read() as connection:
        known = connection.execute(sa.select(t.items.c.sha256)).scalars().all()
    scores = {f"{i:064x}": {"rm": [0.0, 1.0]} for i in range(300_000)} | {sha: {"rm": [1.0, 2.0]} for sha in known}
    assert items.set_scores(store, scores) == 3
