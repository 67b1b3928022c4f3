from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reports.fabricate import GOLD_PARTS, card, evaluate_samples, online_metrics, write_run
from trimtab.core.errors import DataError
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.guide import meaning
from trimtab.reports.markup import visible
from trimtab.reports.page import render
from trimtab.reports.run_page import page_of, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--\u2028\u202e]]>"


class Page(HTMLParser):
    """The elements, attributes and texts of a page as a browser's tokeniser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag, "the page's elements are not nested"

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def pipeline_page(pipeline) -> Page:
    started = time.perf_counter()
    path = write_report(pipeline)
    assert time.perf_counter() - started < 3
    assert path == pipeline / "report.html"
    assert not list(pipeline.glob(".writing-*"))
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_runs_no_script_and_loads_nothing(pipeline_page):
    (policy,) = (m["content"] for m in pipeline_page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "script-src" not in rules
    for name in ("script", "link", "iframe", "img", "object", "embed", "base", "form"):
        assert not pipeline_page.all(name)
    for name, attributes in pipeline_page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "style")], name
        assert attributes.get("href", "#").startswith("#")


def test_a_pipeline_page_has_a_section_for_every_stage_in_order(pipeline_page):
    anchors = [a["href"] for a in pipeline_page.all("a")]
    assert anchors == ["#goodhart", "#samples", "#data", *(f"#stage-{i}" for i in range(1, 7)), "#costs"]
    assert [h["id"] for h in pipeline_page.all("h2")] == [a[1:] for a in anchors]
    for words in ("Training made the model better.", "0.55 → 0.75", "14 min 23 s", "To look at", "limit 72%"):
        assert words in pipeline_page.text


def test_every_chart_is_drawn_and_says_how_to_read_it(pipeline_page):
    charts = [svg for svg in pipeline_page.all("svg") if svg.get("class") == "chart"]
    assert len(charts) == len(pipeline_page.all("figcaption")) > 40
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    hints = [p for p in pipeline_page.all("p") if p.get("class") == "how"]
    assert len(hints) >= len(charts)


def test_gold_and_each_of_its_parts_stand_over_the_distance_from_the_reference(pipeline_page):
    text = pipeline_page.text
    assert "Gold score over √KL" in text
    parts = text[text.index("The parts of gold over √KL") : text.index("Before and after", text.index("The parts of"))]
    assert all(part in parts for part in GOLD_PARTS)
    assert "ppo_no_leash, step 150:" in text


def test_what_is_shown_stands_beside_the_command_that_repeats_it(pipeline, pipeline_page):
    text = pipeline_page.text
    for words in (
        f"Again: trimtab report {pipeline}",
        f"Again: trimtab online {pipeline}/ppo/settings.toml --out {pipeline}-again/ppo",
        f"Again: trimtab doctor {pipeline}/ppo",
        f"Again: trimtab run {pipeline}/pipeline.toml --out {pipeline}-again",
    ):
        assert words in text


def test_curves_that_were_fitted_are_drawn_and_told(pipeline_page):
    text = pipeline_page.text
    assert "R(d) = d (alpha - beta log d)" in text
    assert "measured up to" in text


def test_votes_and_costs_are_told(tmp_path):
    summary = {"train_agreement": 0.66, "train_bayes_accuracy": 0.73, "num_train_pairs": 26392, "seconds": 75.0}
    run = write_run(tmp_path / "run", stage="compare", summary=summary, settings='[engine]\ndevice = "cpu"\n')
    text = " ".join(Page(write_report(run).read_text(encoding="utf-8")).text.split())
    assert "train.jsonlrun26,39266%73%" in text
    assert "run1 min 15 s–––cpu" in text


def test_samples_are_a_fixed_random_draw_and_not_the_best():
    samples = evaluate_samples(100)
    page = render(page_of(RunRecord(name="evaluate", stage="evaluate", samples=tuple(samples))))
    assert page == render(page_of(RunRecord(name="evaluate", stage="evaluate", samples=tuple(samples))))
    shown = [float(x) for x in re.findall(r'Final policy<span class="score[^"]*">gold <b>([\d.]+)</b>', page)]
    assert len(shown) == 12
    everything = [row["gold"] for row in samples]
    assert abs(sum(shown) / 12 - sum(everything) / 100) < 0.15
    assert max(shown) < max(everything)


def hostile_pipeline(directory):
    name = "x" + HOSTILE.replace("/", "")
    (directory / "pipeline.toml").write_text(f"[stages.{json.dumps(name)}]\nstage = 'online'\n", encoding="utf-8")
    rows = online_metrics(30, leash=False)
    for row in rows:
        row[f"gold/{HOSTILE}"] = row[HOSTILE] = row[f"reward/{HOSTILE}"] = 1.0
    return write_run(
        directory / name,
        stage="online",
        metrics=rows,
        samples=[{"step": 1, "prompt": HOSTILE, "response": HOSTILE + "\ud800", "reward": 1.0, "gold": 0.5}],
        summary={HOSTILE: HOSTILE, "accuracy": HOSTILE, "slices": {HOSTILE: {"accuracy": 0.5}}},
        settings=f"{json.dumps(HOSTILE)} = {json.dumps(HOSTILE)}\n",
    )


def test_hostile_text_stays_text_wherever_it_comes_from(tmp_path):
    run = hostile_pipeline(tmp_path)
    (run / "environment.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    (run / "data.json").write_text(json.dumps({HOSTILE: {"sha256": HOSTILE, "rows": HOSTILE}}))
    for stage in ("online", "reward", "evaluate"):
        (run / "settings.toml").write_text(
            f"stage = {json.dumps(stage)}\n{json.dumps(HOSTILE)} = {json.dumps(HOSTILE)}\n", encoding="utf-8"
        )
        for directory in (tmp_path, run):
            page = Page(write_report(directory).read_text(encoding="utf-8"))
            assert not page.all("script")
            assert not page.all("img")
            assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
            assert visible(HOSTILE) in page.text


def test_text_without_a_utf8_form_is_replaced(tmp_path):
    run = write_run(tmp_path / "run", stage="online", samples=[{"step": 1, "response": "lone \ud800 half"}])
    assert "lone ? half" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "compare", "reward", "online", "evaluate", "unheard-of"])
def test_a_run_that_has_only_begun_has_a_page(tmp_path, stage):
    page = Page(write_report(write_run(tmp_path / "run", stage=stage)).read_text(encoding="utf-8"))
    assert "not finished" in page.text


def test_the_page_of_a_reward_model_shows_what_styles_and_empty_texts_get(tmp_path):
    run = write_run(tmp_path / "run", stage="reward", metrics=[], summary=card())
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for words in ("What a style adds", "flattery", "Texts without content", "prompt copied over chosen"):
        assert words in page.text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither a run nor a pipeline"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


CARD_KEYS = (
    *("by_slice", "calibrated", "styles", "degenerate", "above_chosen", "above_rejected"),
    *("accuracy", "accuracy_low", "longer_wins", "reliability", "by_margin", "by_length", "slices", "mean_probability"),
    *("policy", "baseline", "win_rate", "reward_model", "seconds", "best_of", "curve", "mean_length", "mean_reward"),
    *("gold", "low", "high", "count", "n", "value"),
)
SAMPLE_KEYS = ("step", "prompt", "response", "baseline_response", "gold", "baseline_gold", "reward")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(CARD_KEYS), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(CARD_KEYS), VALUES, max_size=8),
    st.lists(
        st.dictionaries(st.sampled_from(["step", "prompt", "response", "gold", "baseline_gold"]), VALUES), max_size=3
    ),
)
def test_whatever_a_summary_or_a_sample_holds_there_is_a_page(summary, rows):
    runs = tuple(
        RunRecord(name=stage, stage=stage, summary=summary, samples=tuple(rows))
        for stage in ("reward", "online", "evaluate")
    )
    assert "</html>" in render(page_of(PipelineRecord(name="p", runs=runs, summary=summary)))


def test_metrics_have_a_title_a_unit_and_a_hint():
    for row in (online_metrics(1, leash=True)[0],):
        for name in row.keys() - {"step"}:
            told = meaning(name)
            assert told.title
            assert told.unit
            assert told.how_to_read.endswith(".")
            assert "No description" not in told.how_to_read
    assert meaning("something/new_thing").title == "Something: new thing"


def test_what_was_not_used_of_a_source_and_what_was_left_out_is_told():
    from trimtab.reports.run_page import _reading

    one = {"sha256": "00", "rows": 3, "not_used": ["topic", "messages[].name"], "dropped": {"empty_response": 2}}
    assert _reading(one) == ("topic, messages[].name", "2 empty response")
    assert _reading({"rows": 3}) == ("–", "–")


def test_every_metric_of_an_optimizer_is_described():
    for name in ("policy_updates", "critic_updates", "policy_learning_rate", "critic_gradient_norm"):
        assert "No description" not in meaning(f"optimizer/{name}").how_to_read
