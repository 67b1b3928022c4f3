"""The study of a vote table, through the command line: what it prints, its page and its figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.feedback.projects import add, answer_next, make_store, person
from tests.feedback.published import votes_of
from trimtab.cli import main
from trimtab.feedback.agreement_page import page_of
from trimtab.feedback.answers import Answer
from trimtab.feedback.vote_files import read_votes
from trimtab.reports.page import render
from trimtab.votes.study import study
from trimtab.votes.table import votes_from_rows

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


def invoke(*arguments):
    return CliRunner().invoke(main, ["feedback", *map(str, arguments)], prog_name="trimtab")


@pytest.fixture
def table(tmp_path):
    """Votes of four annotators on 60 items with sides, seconds, slices, strengths and models."""
    generator = np.random.default_rng(0)
    path = tmp_path / "votes.jsonl"
    with path.open("w") as file:
        for item in range(60):
            truth = generator.choice(["A", "B"])
            for name in ("ann", "bob", "cy", HOSTILE):
                choice = truth if generator.random() < 0.8 else generator.choice(["A", "B", "tie"])
                row = {
                    "item": f"item {item}",
                    "annotator": name,
                    "choice": str(choice),
                    "shown_left": str(generator.choice(["A", "B"])),
                    "seconds": float(generator.uniform(4, 20)),
                    "slice": ["maths", "poems"][item % 2],
                    "strength": int(generator.integers(1, 4)),
                    "model_a": ["gpt", "llama", "qwen"][item % 3],
                    "model_b": ["llama", "qwen", "gpt"][item % 3],
                }
                file.write(json.dumps(row) + "\n")
    return path


def test_the_command_prints_a_table_and_writes_a_page_with_its_figures(table, tmp_path):
    page = tmp_path / "out" / "page.html"
    result = invoke("agreement", table, "--out", page)
    assert result.exit_code == 0, result.output
    for words in (
        "raw agreement without ties",
        "Krippendorff's alpha (nominal)",
        "(ordinal, strength)",
        "maths",
        "llama",
    ):
        assert words in result.output
    assert "Cohen's kappa" in result.output
    assert "these are 4, see the table of pairs" in result.output
    figures = json.loads(page.with_suffix(".json").read_text())
    assert figures["num_votes"] == 240
    assert len(figures["pairs"]) == 6
    assert {player["name"] for player in figures["ladder"]["players"]} == {"gpt", "llama", "qwen"}
    assert len(figures["skills"]) == 12
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    for title in ("Coefficients", "Slices", "With the others", "Position", "Speed", "Skill", "Ladder", "Who agrees"):
        assert title in text
    assert "<script" not in text


def test_nothing_of_a_study_depends_on_which_reply_is_called_a(table):
    rows = [("", json.loads(line)) for line in table.read_text().splitlines()]
    other = {"A": "B", "B": "A", "tie": "tie"}

    def turned(row):
        if int(row["item"].split()[1]) % 3:
            return row
        sides = {"choice": other[row["choice"]], "shown_left": other[row["shown_left"]]}
        return {**row, **sides, "model_a": row["model_b"], "model_b": row["model_a"]}

    one = study(read_votes(table), num_resamples=10)
    two = study(votes_from_rows([(where, turned(row)) for where, row in rows]), num_resamples=10)
    for a, b in zip(one.coefficients, two.coefficients, strict=True):
        assert a.interval.value == pytest.approx(b.interval.value, nan_ok=True), a.name
    for a, b in zip(one.ladder.players, two.ladder.players, strict=True):
        assert (a.name, a.elo.value) == (b.name, pytest.approx(b.elo.value, abs=1e-4))
    for a, b in zip(one.skills, two.skills, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-4)


def test_sides_that_mean_something_can_be_kept(table):
    votes = read_votes(table)
    names = [found.name for found in study(votes, as_given=True, num_resamples=10).coefficients]
    assert names == [found.name for found in study(votes, num_resamples=10).coefficients]
    assert not any("both ways round" in note for note in study(votes, as_given=True, num_resamples=10).notes)


@pytest.mark.parametrize(
    ("triples", "words"),
    [
        ([("1", "ann", "A"), ("2", "ann", "B")], "undefined: one annotator: nobody to agree with"),
        ([("1", "ann", "A"), ("2", "bob", "B")], "undefined: no overlap: no item has two votes"),
        ([("1", "ann", "A"), ("1", "bob", "A")], "undefined: no variation: every vote is 'A'"),
        ([("1", "ann", "yes"), ("1", "bob", "yes")], "undefined: no variation: every vote is 'yes'"),
        ([("1", "ann", "cannot_judge")], "undefined: no votes"),
    ],
)
def test_every_poor_table_gets_an_answer_in_words(tmp_path, triples, words):
    path = tmp_path / "votes.csv"
    path.write_text("item,annotator,choice\n" + "".join(",".join(row) + "\n" for row in triples))
    result = invoke("agreement", path, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert words in result.output
    assert "nan" not in result.output
    assert "NaN" not in (tmp_path / "page.json").read_text()


VOTE = st.fixed_dictionaries(
    {
        "item": st.sampled_from("1234"),
        "annotator": st.sampled_from("xyz"),
        "choice": st.sampled_from(["A", "tie", "B"]),
    },
    optional={
        "shown_left": st.sampled_from(["A", "B", ""]),
        "seconds": st.sampled_from([0, 0.5, 30, None]),
        "strength": st.sampled_from([0, 1, 3]),
        "slice": st.sampled_from("mn"),
    },
)


@settings(max_examples=40)
@given(st.lists(VOTE, max_size=20), st.sampled_from([None, "pqrs", "pppp", "pqpq"]), st.booleans())
def test_every_table_of_votes_has_an_answer_without_a_warning(rows, models, as_given):
    if models is not None:
        rows = [{**row, "model_a": models[int(row["item"]) - 1], "model_b": "q"} for row in rows]
    found = study(votes_from_rows([("", row) for row in rows]), as_given=as_given, num_resamples=5)
    json.dumps(found.to_dict(), allow_nan=False)
    page = render(page_of(found, title="any")).lower()
    assert "nan" not in page[page.index("<body>") :]


def test_mistakes_are_answered_without_a_traceback(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("a,b\n1,2\n")
    for arguments in (["agreement", path], ["agreement", path, "--columns", "item"], ["cost", "--half-width", "2"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "error: " in result.output
        assert "fix: " in result.output


def test_a_plan_says_cost_precision_gain_and_assumptions():
    result = invoke("cost", "--items", 1000, "--overlap", 2, "--pilot", "500:0.58,1000:0.61,2000:0.64")
    assert result.exit_code == 0, result.output
    for words in ("2,160", "1,068 independent judgements", "acc(n) = ", "assumed", "points for each 1,000 spent"):
        assert words in result.output
    assert "--pilot ITEMS:ACCURACY" in invoke("cost").output


def test_a_page_of_hundreds_of_annotators_stays_readable():
    generator = np.random.default_rng(0)
    votes = votes_of(
        (str(i), f"worker {w}", str(generator.choice(["A", "B"])))
        for i in range(100)
        for w in generator.choice(60, size=4, replace=False)
    )
    found = study(votes, num_resamples=20)
    page = render(page_of(found, title="many"))
    assert "pairs with fewer items are not shown" in page
    assert len(page) < 2_000_000


def test_a_project_is_studied_like_a_table(tmp_path):
    store = make_store(tmp_path, {"assignment": {"overlap": 2}})
    add(store, 3)
    for name in ("ann", "bob"):
        someone = person(store, name)
        while answer_next(store, someone, Answer(choice="A", strength=1)) is not None:
            pass
    store.close()
    result = invoke("agreement", tmp_path / "project.toml", "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "6 votes by 2 annotators on 3 items" in result.output
    figures = json.loads((tmp_path / "page.json").read_text())
    assert sum(card["left"]["count"] for card in figures["annotators"]) == 6
