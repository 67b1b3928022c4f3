"""The votes of a project as verdicts on models."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.feedback.projects import add, answer_next, make_store, person, prompt
from trimtab.core.errors import DataError
from trimtab.evals.verdict_files import read_file
from trimtab.feedback import items
from trimtab.feedback.answers import Answer
from trimtab.feedback.exporting import write_export
from trimtab.feedback.vote_verdicts import project_verdicts
from trimtab.feedback.votes import cast_votes


def test_votes_over_pairs_are_verdicts_with_replies_order_and_annotator(tmp_path):
    with closing(make_store(tmp_path)) as store:
        add(store, 3)
        ann = person(store, "ann")
        for answer in (Answer(choice="A", strength=1), Answer(choice="both_bad"), Answer(choice="cannot_judge")):
            answer_next(store, ann, answer)
        with store.read() as connection:
            casts = list(cast_votes(connection))
        write_export(store, "votes", tmp_path / "votes.jsonl")
    found = project_verdicts(tmp_path / "project.toml")
    assert [v.verdict for v in found.verdicts] == [1.0, 0.5]
    assert found.num_missing == 1
    for verdict, cast in zip(found.verdicts, casts, strict=False):
        assert verdict.prompt == cast.prompt["messages"][0]["content"]
        assert (verdict.model, verdict.baseline, verdict.judge) == ("model-0", "model-1", "ann")
        assert verdict.shown_first == ("model" if cast.shown_left == "A" else "baseline")
        assert (verdict.reply, verdict.baseline_reply) == tuple(reply["text"] for reply in cast.replies)
    exported = read_file(tmp_path / "votes.jsonl")
    assert [(v.verdict, v.shown_first, v.judge) for v in exported.verdicts] == [
        (v.verdict, v.shown_first, v.judge) for v in found.verdicts
    ]
    assert exported.num_missing == 1


def test_a_ranking_is_a_verdict_for_each_two_replies(tmp_path):
    with closing(make_store(tmp_path, {"task": {"kind": "ranking"}})) as store:
        add(store, 1, kind="ranking", num=3)
        answer_next(store, person(store, "ann"), Answer(choice="done", ranking=((2,), (0, 1))))
    found = project_verdicts(tmp_path / "project.toml")
    assert {(v.model, v.baseline): v.verdict for v in found.verdicts} == {
        ("model-0", "model-1"): 0.5,
        ("model-0", "model-2"): 0.0,
        ("model-1", "model-2"): 0.0,
    }
    assert all(v.shown_first in ("model", "baseline") for v in found.verdicts)


def test_replies_of_unknown_models_are_refused(tmp_path):
    with closing(make_store(tmp_path)) as store:
        replies = tuple(items.NewReply(text=text) for text in ("x", "y"))
        items.add_items(store, [("row 1", items.NewItem(kind="pairs", prompt=prompt(0), replies=replies))])
        answer_next(store, person(store, "ann"))
    with pytest.raises(DataError, match="does not say which model wrote it") as refused:
        project_verdicts(tmp_path / "project.toml")
    assert "vote 1" in refused.value.where
    assert "model_a" in refused.value.fix
