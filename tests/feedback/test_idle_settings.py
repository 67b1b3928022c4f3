"""Options and settings that would do nothing are refused, and what a project lacks is said when it is served."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from tests.feedback.projects import add, item, make_project, write
from trimtab.cli import main
from trimtab.core.errors import ConfigError, DataError
from trimtab.feedback import assign, items
from trimtab.feedback.exporting import write_export
from trimtab.feedback.importing import Options, import_source
from trimtab.feedback.project import load_project
from trimtab.feedback.server.serve import _alone, _missing
from trimtab.feedback.store import add_guideline, open_store
from trimtab.feedback.vote_files import read_votes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"purpose": "quiz"}, "--quiz"), ({"slice": "s"}, "--slice"), ({"limit": 3}, "--limit"),
        ({"columns": {"prompt": "question"}}, "--columns"), ({"with_votes": True}, "--with-votes"),
    ],
)  # fmt: skip
def test_a_world_and_a_dump_refuse_what_they_cannot_follow(small: Make, tmp_path: Path, options: dict, named: str):
    store = small()
    add(store, 2)
    write_export(store, "dump", tmp_path / "dump.jsonl")
    for source in ("world:helpdesk?num=3", str(tmp_path / "dump.jsonl")):
        empty = small()
        with pytest.raises(DataError, match=named):
            import_source(empty, source, Options(**options))
        with empty.read() as connection:
            assert items.search_items(connection, limit=9) == []


def test_a_name_that_nothing_is_read_under_is_refused(small: Make, tmp_path: Path):
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", "choice": "A", "judge": "ann"}]
    path = write(tmp_path / "votes.jsonl", rows)
    with pytest.raises(DataError, match="'anotator'") as error:
        import_source(small(), path, Options(columns={"anotator": "judge"}, with_votes=True))
    assert "annotator" in error.value.fix


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["import", "PROJECT", "--gold"], "--gold"),
        (["import", "PROJECT", "--limit", "3"], "--limit without SOURCE"),
        (["import", "PROJECT", "world:helpdesk?num=2", "--seed", "3"], "--seed without --model"),
        (["import", "PROJECT", "prompts.jsonl", "--model", "m", "--columns", "prompt=question"], "--columns with"),
        (["people", "PROJECT", "Ann", "--links"], "--link for one person"),
        (["adjudicate", "PROJECT", "--choice", "A"], "no item is named"),
        (["agreement", "PROJECT", "--missing", "tie"], "this is a project"),
    ],
)
def test_options_of_commands_that_would_do_nothing_are_refused(tmp_path: Path, words: list[str], said: str):
    project = make_project(tmp_path, {"data": []})
    open_store(project).close()
    words = [str(project) if word == "PROJECT" else word for word in words]
    result = CliRunner().invoke(main, ["feedback", *words])
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_a_project_has_no_columns_to_name(small: Make):
    store = small()
    with pytest.raises(DataError, match="this is a project"):
        read_votes(store.project.path, order=["A", "tie", "B"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": {"kind": "ranking", "criteria": ["honest"]}}, "task.criteria is for pairs"),
        ({"task": {"kind": "rating", "scale": 4}}, "task.scale is for pairs"),
        ({"task": {"rating_scale": 5}}, "task.rating_scale is for rating"),
        ({"task": {"kind": "rating"}, "assignment": {"reask_rate": 0.1}}, "assignment.reask_rate is for pairs"),
        ({"task": {"kind": "edit"}, "assignment": {"gold_rate": 0.1}}, "assignment.gold_rate"),
        ({"task": {"kind": "demonstration"}, "qualification": {"questions": 5}}, "qualification.questions"),
        ({"task": {"kind": "rating"}, "labels": {"rule": "mace"}}, "labels.rule"),
        ({"task": {"kind": "edit", "rationale": "required"}}, "no reason is asked for"),
        ({"task": {"scale": 8}, "labels": {"margins": [1, 2]}}, "2 for the 4 strengths"),
        ({"task": {"scale": 4}, "labels": {"margins": [1, 2, 3]}}, "3 for the 2 strengths"),
    ],
)
def test_settings_that_do_nothing_for_the_kind_are_refused(tmp_path: Path, settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        load_project(make_project(tmp_path, settings))


def test_a_guideline_that_is_named_must_be_there(tmp_path: Path):
    project = make_project(tmp_path, {"task": {"guideline": "guidline.md"}})
    with pytest.raises(ConfigError, match=r"guidline\.md"):
        open_store(project)


def test_what_is_missing_is_said_to_whoever_serves(small: Make):
    store = small({"qualification": {"questions": 3}, "assignment": {"gold_rate": 0.1}})
    said = " ".join(_missing(store, "127.0.0.1"))
    assert "nothing to judge" in said
    assert "asks 3 questions first, and there are none" in said
    assert "--gold" in said
    add(store, 1)
    quiz = [item(i, purpose="quiz", gold={"choice": "A"}) for i in (5, 6)]
    items.add_items(store, [("q", one) for one in [*quiz, item(7, purpose="gold", gold={"choice": "A"})]])
    (said,) = _missing(store, "127.0.0.1")
    assert "there are 2" in said


def test_a_guideline_file_that_nobody_reads_is_named(small: Make):
    store = small()
    add(store, 1)
    assert list(_missing(store, "127.0.0.1")) == []
    store.project.guideline_path.write_text("# Anew\n", encoding="utf-8")
    assert "no version of the guideline" in " ".join(_missing(store, "127.0.0.1"))
    with store.write() as connection:
        add_guideline(connection, store.now(), None, "# Anew")
        add_guideline(connection, store.now(), None, "# Later, in the pages")
    assert list(_missing(store, "127.0.0.1")) == []


def test_why_there_is_nothing_to_do_is_true(small: Make):
    store = small({"qualification": {"questions": 3}})
    add(store, 2)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    assert "no questions for you in the quiz yet" in ann.get("/task").text
    store = small()
    add(store, 2)
    bob = Browser(store)
    bob.join("Bob")
    bob.read_guideline()
    bob.post(f"/task/{bob.lease()}", position="1")
    bob.post(f"/task/{bob.lease()}", choice="skip")
    assert "nothing left for you" in bob.get("/task").text
    assign.set_open(store, False)
    assert "The project is paused" in bob.get("/task").text


def test_one_server_serves_a_file(small: Make):
    store, said = small(), list[str]()
    with _alone(store, said.append):
        again = open_store(store.project)
        with pytest.raises(ConfigError, match="another server"), _alone(again, said.append):
            pass
        again.close()
    with _alone(store, said.append):
        assert said == []


def test_a_file_that_cannot_be_locked_is_said(small: Make, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store, said = small(), list[str]()
    monkeypatch.setattr("fcntl.flock", refuse)
    with _alone(store, said.append):
        assert "cannot be locked (No locks available): see that no second server serves it" in said[0]


def test_webhooks_without_a_key_and_hosts_without_a_name_are_said(small: Make, monkeypatch: pytest.MonkeyPatch):
    store = small({"webhooks": [{"url": "http://127.0.0.1:1/x", "secret_env": "HOOK_KEY"}]})
    add(store, 1)
    monkeypatch.delenv("HOOK_KEY", raising=False)
    assert "signed with HOOK_KEY" in " ".join(_missing(store, "127.0.0.1"))
    monkeypatch.setenv("HOOK_KEY", "key")
    assert list(_missing(store, "127.0.0.1")) == []
    assert "browsers on others are refused" in " ".join(_missing(store, "0.0.0.0"))
