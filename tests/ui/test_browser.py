"""The live view in a real browser while a run is written: what comes appears, and hostile texts do nothing.

With TRIMTAB_SCREENSHOTS=docs/evidence/ui the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reports.fabricate import online_metrics, rollout_samples, write_pipeline
from tests.ui.fabricated import append, online_run, write_loop
from tests.ui.test_pages import HOSTILE
from trimtab.core import registry
from trimtab.runs.run import Run, holding

pytestmark = pytest.mark.slow
PICTURES = os.environ.get("TRIMTAB_SCREENSHOTS")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The printed address of a server over tmp_path/runs, in a process of its own."""
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "trimtab", "ui", "runs", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = ""
    while "key=" not in said:
        said = process.stdout.readline()
    yield said.strip()
    process.send_signal(2)
    assert process.wait(timeout=20) == 0
    process.stdout.close()


class Watcher:
    """Somebody at a browser, and whatever went wrong in it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.base = re.match(r"http://[^/]+", address)[0]
        self.page = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | context).new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", lambda d: (self.wrong.append(f"dialog {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: None if r.url.startswith(self.base) else self.wrong.append(r.url))
        self.page.goto(address)
        self.live()

    def live(self) -> None:
        self.page.wait_for_selector('#connection:text-is("live")')

    def open(self, path: str) -> None:
        self.page.goto(self.base + path)
        self.live()

    def picture(self, name: str) -> None:
        assert not self.page.evaluate("document.documentElement.scrollWidth > innerWidth"), "the page scrolls sideways"
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{PICTURES}/{name}.png")


def test_what_a_run_writes_appears_while_the_page_is_open(browser, address: str, tmp_path: Path):
    runs = tmp_path / "runs"
    watcher = Watcher(browser, address)
    with Run.open(runs / "ppo", stage="online", settings={"num_steps": 200}) as run:
        watcher.page.click("text=ppo")
        watcher.live()
        assert "Step – " not in watcher.page.inner_text("#state")
        for row in online_metrics(60, leash=True):
            run.log(row.pop("step"), row)
        run.add_samples(60, [{"prompt": "Where is it?", "response": "It is on its way."}])
        watcher.page.wait_for_selector("text=Step 60 of 200")
        watcher.page.wait_for_selector("text=It is on its way.")
        watcher.page.click("summary:has-text('more metrics')")
        run.log(61, {"reward/mean": 1.0})
        watcher.page.wait_for_selector("text=Step 61 of 200")
        assert watcher.page.locator("#curves details").first.get_attribute("open") is not None
        assert watcher.page.inner_text("#state").count("running") == 1
        run.finish({})
    watcher.page.wait_for_selector(".chip.finished")
    assert watcher.wrong == []


def test_what_a_loop_writes_appears_while_its_page_is_open(browser, address: str, tmp_path: Path):
    loop = write_loop(tmp_path / "runs" / "loop", rounds=2)
    watcher = Watcher(browser, address)
    watcher.page.click("a:text-is('loop')")
    watcher.live()
    assert "not begun" in watcher.page.inner_text("#state")
    append(loop / "dpo_2" / "metrics.jsonl", {"step": 31, "loss/train": 0.2}, {"step": 32, "loss/train": None})
    watcher.page.wait_for_selector("text=dpo_2: not a finite number at some step: loss/train")
    with holding(loop), Run.open(loop / "evaluate", stage="evaluate", settings={}) as run:
        run.add_samples(0, [{"prompt": "Where is it?", "response": "It is on its way."}])
        watcher.page.wait_for_selector("text=It is on its way.")
        watcher.page.wait_for_selector("#state .chip.running")
        assert "not begun" not in watcher.page.inner_text("#state")
        run.finish({})
    watcher.page.wait_for_selector("text=4 of 5 stages finished")
    assert watcher.wrong == []


def test_hostile_texts_do_nothing_when_loaded_and_when_they_come(browser, address: str, tmp_path: Path):
    run = online_run(tmp_path / "runs" / "<img src=x onerror=alert(9)>", samples=[{"step": 1, "response": HOSTILE}])
    watcher = Watcher(browser, address)
    watcher.page.click(".list a")
    watcher.live()
    append(run / "samples.jsonl", {"step": 2, "prompt": HOSTILE, "response": f"{HOSTILE} came later"})
    append(run / "metrics.jsonl", {"step": 21, f"{HOSTILE}/x": 1.0})
    watcher.page.wait_for_selector("text=came later")
    assert watcher.page.locator("img").count() == 0
    assert watcher.wrong == []


def test_the_pages_as_they_look(browser, address: str, tmp_path: Path):
    runs = tmp_path / "runs"
    write_pipeline(runs / "helpdesk")
    online_run(runs / "grpo-killed", 120, of=400)
    write_loop(runs / "online_dpo", rounds=2)
    facts = registry.descriptor("stage", "online")
    opened = Run.open(runs / "grpo", stage="online", settings={"num_steps": 400}, facts=facts)
    with holding(runs / "online_dpo"), opened as run:
        for row in online_metrics(240, leash=False):
            run.log(row.pop("step"), row)
        for row in rollout_samples(240):
            run.add_samples(row.pop("step"), [row])
        for name, context in {
            "light": {},
            "dark": {"color_scheme": "dark"},
            "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
        }.items():
            watcher = Watcher(browser, address, **context)
            watcher.picture(f"list-{name}")
            watcher.open("/run?name=grpo")
            watcher.picture(f"run-{name}")
            watcher.open("/pipeline?name=online_dpo")
            watcher.picture(f"loop-{name}")
            watcher.open("/compare?run=helpdesk/ppo&run=helpdesk/ppo_no_leash")
            watcher.picture(f"compare-{name}")
            assert watcher.wrong == []
