"""What the pages show of runs in every state, without scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.reports.fabricate import write_pipeline
from tests.reports.test_run_page import Page
from tests.ui.fabricated import Reader, append, online_run, rows_of, write_loop
from trimtab.feedback.server.security import HEADERS
from trimtab.reports.collect import collect
from trimtab.runs.run import Run, holding
from trimtab.runs.state import is_stopping, note_state, read_state
from trimtab.ui import library as reading
from trimtab.ui import pages
from trimtab.ui.library import Library

HOSTILE = "</pre></section><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--\u2028\u202e\ud800"


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def test_the_list_says_how_every_run_stands(tmp_path: Path):
    write_pipeline(tmp_path / "whole")
    online_run(tmp_path / "deep" / "below" / "killed")
    note_state(online_run(tmp_path / "failed"), ended="failed", said="the loss is not finite", num_steps=50)
    note_state(online_run(tmp_path / "stopped"), ended="stopped", said="stopped after step 20")
    (online_run(tmp_path / "damaged") / "settings.toml").write_text("stage = [")
    (online_run(tmp_path / "lost") / "environment.json").unlink()
    online_run(tmp_path / ".hidden")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.toml").write_text("")  # a run file of the user
    with Run.open(tmp_path / "running", stage="sft", settings={"max_steps": 9}) as run:
        run.log(3, {"loss/train": 0.25})
        rows = rows_of(Reader(tmp_path).text("/"))
    assert re.match(r"running \| sft \| 3 of 9 \| loss 0.25 \| \d s ago", rows["running"])
    assert rows["failed"].startswith("failed | online | 20 of 50 | reward ")
    assert rows["stopped"].startswith("stopped | online | 20 of 40")
    assert rows["deep/below/killed"].startswith("failed | online")
    assert rows["damaged"].startswith("damaged")
    assert rows["lost"].startswith("damaged")
    assert rows["whole"].startswith("finished | pipeline | 6 stages finished | gold 0.55 → 0.75")
    assert rows["ppo"].startswith("finished | online | 200")
    assert len(rows) == 13  # six of them stages


def test_the_pipeline_of_a_run_that_goes_on_is_running(tmp_path: Path):
    write_pipeline(tmp_path / "whole")
    (tmp_path / "whole" / "summary.json").unlink(missing_ok=True)
    (tmp_path / "whole" / "evaluate" / "summary.json").unlink()
    rows = rows_of(Reader(tmp_path).text("/"))
    assert rows["whole"].startswith("failed | pipeline | 5 stages finished")
    text = Reader(tmp_path).text("/run", name="whole/evaluate")
    assert f"trimtab run {tmp_path}/whole/pipeline.toml --out {tmp_path}/whole" in text


def test_a_root_that_is_a_run_is_shown(tmp_path: Path):
    reader = Reader(online_run(tmp_path / "run"))
    assert "20 of 40" in rows_of(reader.text("/"))["."]
    assert "Reply length" in reader.text("/run", name=".")


def test_an_empty_directory_says_what_writes_a_run(tmp_path: Path):
    assert "There is no run yet" in Reader(tmp_path).text("/")


def test_too_many_directories_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST_DIRECTORIES", 3)
    for i in range(9):
        (tmp_path / str(i)).mkdir()
    assert "more directories than are looked into" in Reader(tmp_path).text("/")


def test_a_directory_that_no_address_can_name_is_left_out_and_counted(tmp_path: Path):
    online_run(tmp_path / "run")
    os.rename(os.fsencode(online_run(tmp_path / "odd")), os.fsencode(tmp_path) + b"/\xff")
    text = Reader(tmp_path).text("/")
    assert list(rows_of(text)) == ["run"]
    assert "not UTF-8: 1" in text


def test_two_servers_of_one_machine_keep_their_keys_apart(tmp_path: Path):
    one, other = Reader(tmp_path), Reader(tmp_path)
    other.client.base_url = "http://127.0.0.1:9999"
    other.client.cookies = one.client.cookies
    assert other.client.get(f"/enter?key={other.watch.key}").status_code == 200
    assert one.client.get("/").status_code == other.client.get("/").status_code == 200


def test_the_page_of_a_run_shows_curves_samples_settings_and_alarms(tmp_path: Path):
    run = online_run(tmp_path / "run")
    append(run / "metrics.jsonl", {"step": 21, "policy/kl": None, "reward/mean": 1.0, "reward/model_failed": 7})
    text = Reader(tmp_path).text("/run", name="run")
    page = Page(text)
    assert "Step 21 of 40" in page.text
    assert "not a finite number at some step: policy/kl" in page.text
    assert "7 replies could not be judged by the reward model" in page.text
    assert "the run is not finished" in page.text
    assert text.count('<svg class="chart"') > 10
    assert "Your refund is approved." in page.text
    assert 'name = "ppo"' in page.text
    assert f"trimtab online {run}/settings.toml --out {run}" in page.text


def test_a_page_shows_what_came_since_it_was_last_asked_for(tmp_path: Path):
    run = online_run(tmp_path / "run")
    reader = Reader(tmp_path)
    reader.text("/run", name="run")
    append(run / "metrics.jsonl", {"step": 21, "reward/mean": 77.0})
    append(run / "samples.jsonl", {"step": 21, "prompt": "new prompt", "response": "new reply"})
    text = reader.text("/run", name="run")
    assert "step 21: 77" in text
    assert text.index("new reply") < text.index("Your refund is approved")
    os.truncate(run / "metrics.jsonl", 0)  # begun again
    append(run / "metrics.jsonl", {"step": 1, "reward/mean": 1.0})
    text = reader.text("/run", name="run")
    assert "Step 1 of 40" in text
    assert "step 21: 77" not in text


def test_a_run_too_long_for_one_page_says_how_far_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "READ_SECONDS", -1.0)
    monkeypatch.setattr("trimtab.ui.tail.CHUNK", 5000)
    online_run(tmp_path / "run", 100)
    reader = Reader(tmp_path)
    shares = []
    while found := re.search(r"(\d+)% of the metrics are read so far", reader.text("/run", name="run")):
        shares.append(int(found[1]))
    assert shares == sorted(shares)
    assert len(shares) > 3


def test_nothing_below_the_directory_is_touched(tmp_path: Path):
    write_pipeline(tmp_path / "whole")
    online_run(tmp_path / "run")
    with Run.open(tmp_path / "running", stage="sft", settings={}):
        before = snapshot(tmp_path)
        reader = Reader(tmp_path)
        reader.text("/")
        for name in ("run", "running", "whole/ppo"):
            reader.text("/run", name=name)
        reader.text("/compare", run=["run", "whole/ppo"])
        assert snapshot(tmp_path) == before


def test_runs_are_compared(tmp_path: Path):
    write_pipeline(tmp_path / "whole")
    reader = Reader(tmp_path)
    text = reader.text("/compare", run=["whole/ppo", "whole/ppo_no_leash", "whole/ppo"])
    page = Page(text)
    assert "kl.coef" in page.text
    legend = re.search(r'<p class="legend">(.*?)</p>', text, re.DOTALL)
    assert legend is not None
    assert re.findall(r"</svg> (\S+)</span>", legend[1]) == ["ppo", "ppo_no_leash"]
    assert "Choose two runs or more" in reader.text("/compare")
    assert reader.client.get("/compare", params={"run": [str(i) for i in range(13)]}).status_code == 400


@pytest.mark.parametrize("path", ["/run", "/live/run", "/pipeline", "/live/pipeline", "/compare", "/live/compare"])
@pytest.mark.parametrize("name", ["none", "../outside", "/etc", "run/..", "run/../run", "run/", "", "\0"])
def test_a_name_that_is_no_run_leads_nowhere(tmp_path: Path, path: str, name: str):
    online_run(tmp_path / "outside")
    online_run(tmp_path / "runs" / "run")
    reader = Reader(tmp_path / "runs")
    assert reader.client.get(path, params={"name": name, "run": name}).status_code == 404


def test_hostile_texts_of_a_run_are_text(tmp_path: Path):
    run = online_run(
        tmp_path / "<img src=x onerror=alert(9)>",
        samples=[{"step": 1, "prompt": HOSTILE, "response": HOSTILE, "reward": 1.0}],
        settings=f"note = {json.dumps(HOSTILE.encode(errors='replace').decode())}\n",
    )
    append(run / "metrics.jsonl", {"step": 22, f"{HOSTILE}/x": 1.0})
    note_state(run, ended="failed", said=HOSTILE.replace("\ud800", ""))
    online_run(tmp_path / "other")
    loop = write_loop(tmp_path / "<img src=x onerror=alert(8)>", rounds=1)
    append(loop / "select_1" / "samples.jsonl", {"step": 0, "prompt": HOSTILE, "response": HOSTILE})
    append(loop / "dpo_1" / "metrics.jsonl", {"step": 31, "loss/train": None})
    (loop / "pipeline.toml").write_text(
        f'[stages."{"<script>alert(3)</script>"}"]\nstage = "<script>alert(4)</script>"\n'
    )
    reader = Reader(tmp_path)
    for text in (
        reader.text("/"),
        reader.text("/run", name=run.name),
        reader.text("/compare", run=[run.name, "other"]),
        reader.client.get("/run", params={"name": HOSTILE.replace("\ud800", "")}).text,
        reader.text("/pipeline", name=loop.name),
    ):
        page = Page(text)
        assert page.all("script") == [{"src": "/static/live.js", "defer": None}]
        assert page.all("img") == []
        assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
        assert not [attributes for _, attributes in page.elements if "style" in attributes]
        assert "⟨U+202E⟩" in page.text or "\u202e" not in page.text


def test_answers_have_the_policy_of_the_annotation_app(tmp_path: Path):
    reader = Reader(tmp_path)
    for path in ("/", "/run?name=none", "/static/live.js", "/static/page.css", "/static/ui.css", "/static/icon.svg"):
        headers = reader.client.get(path).headers
        assert headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_who_has_not_the_key_sees_nothing(tmp_path: Path):
    online_run(tmp_path / "run")
    stranger = Reader(tmp_path, key=False)
    for path in ("/", "/run?name=run", "/compare?run=run", "/live", "/live/run?name=run", "/enter?key=guess", "/enter"):
        answer = stranger.client.get(path)
        assert answer.status_code == 403, path
        assert "online" not in answer.text
    stranger.client.cookies.set("trimtab_ui_8790", "guess")
    assert stranger.client.get("/").status_code == 403
    assert stranger.client.post("/stop", data={"name": "run"}).status_code == 403


def test_another_host_name_is_refused(tmp_path: Path):
    reader = Reader(tmp_path)
    assert TestClient(reader.app, base_url="http://evil.example").get("/").status_code == 400


def test_the_stream_sends_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trimtab.ui import app

    run = online_run(tmp_path / "run")
    monkeypatch.setattr(app, "EVERY_SECONDS", 0.25)
    reader = Reader(tmp_path)
    looks = []

    def ending() -> bool:
        """Adds to the run after each look, and ends the server after the third."""
        looks.append(len(looks))
        if len(looks) == 1:
            append(run / "samples.jsonl", {"step": 21, "prompt": "new prompt", "response": "new <b>reply</b>"})
        return len(looks) > 2

    reader.watch.ending = ending
    events = [line for line in reader.client.get("/live/run", params={"name": "run"}).text.split("\n\n") if line]
    first, second = (json.loads(event.removeprefix("data: ")) for event in events[:2])
    assert set(first) == {"state", "alarms", "curves", "guard", "samples", "file", "details"}
    assert set(second) - {"state"} == {"samples"}
    assert "new &lt;b&gt;reply" in second["samples"]
    assert reader.watch.num_streams == 0


def test_there_are_not_too_many_streams(tmp_path: Path):
    from trimtab.ui import app

    reader = Reader(tmp_path)
    reader.watch.num_streams = app.MOST_STREAMS
    assert reader.client.get("/live").status_code == 503


HOLD = """
import sys, time
from trimtab.runs.run import Run
from trimtab.runs.loop import stepping
class Nothing:
    def save(self, path): (path / "x").touch()
    def load(self, path): pass
with Run.open(sys.argv[1], stage="online", settings={}) as run, \\
        stepping(run, Nothing(), num_steps=1000, checkpoint_every=1000, description="probe") as steps:
    for step in steps:
        steps.log({})
        time.sleep(0.05)
"""


def test_a_run_stops_when_it_is_asked_to_and_is_asked_once(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        reader = Reader(tmp_path)
        text = reader.text("/run", name="run")
        assert f"process {process.pid} of this machine" in text
        for wrong in (
            reader.stop(text, csrf="0" * 64),
            reader.stop(text, process=str(os.getpid())),
            reader.stop(text, name="../run"),
            reader.stop(text, at_once="yes"),
        ):
            assert wrong.status_code in (403, 404, 409)
        assert process.poll() is None
        fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', text))
        foreign = reader.client.post("/stop", data=fields, headers={"origin": "http://evil.example"})
        assert (foreign.status_code, process.poll()) == (403, None)
        assert "from another site" in foreign.text
        assert "Stop after this step" in text
        os.kill(process.pid, 19)  # so that it cannot end between the two requests
        assert reader.stop(text).status_code == 303
        assert "asked to stop" in reader.text("/run", name="run")
        assert reader.stop(text).status_code == 409
        os.kill(process.pid, 18)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
        process.wait()
    text = reader.text("/run", name="run")
    assert '<span class="chip stopped"' in text
    assert "stopped after step" in text
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert 'name="process"' not in text


def test_a_run_that_was_asked_elsewhere_is_not_asked_again(tmp_path: Path):
    go = tmp_path / "go"
    held = HOLD.replace("time.sleep(0.05)", f"\n        while not os.path.exists({str(go)!r}): time.sleep(0.01)")
    program = [sys.executable, "-c", f"import os\n{held}", str(tmp_path / "run")]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)  # its first step lasts until the file is there
    try:
        until = time.monotonic() + 60
        while read_state(tmp_path / "run").get("stepping") != process.pid and time.monotonic() < until:
            time.sleep(0.05)
        text = Reader(tmp_path).text("/run", name="run")
        process.send_signal(2)  # as Ctrl-C in its terminal, or a server that has ended since
        while not is_stopping(tmp_path / "run", process.pid) and time.monotonic() < until:
            time.sleep(0.01)
        reader = Reader(tmp_path)
        assert "asked to stop" in reader.text("/run", name="run")
        assert reader.stop(text, csrf=reader.watch.csrf).status_code == 409
        go.touch()
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
        process.wait()
    assert "stopped after step" in read_state(tmp_path / "run")["said"]


def test_outside_of_its_steps_a_run_is_said_to_end_at_once(tmp_path: Path):
    with Run.open(tmp_path / "run", stage="online", settings={}):
        text = Reader(tmp_path).text("/run", name="run")
    assert "Stop at once" in text
    assert "Stop after this step" not in text
    assert 'name="at_once" value="yes"' in text


def test_what_the_guard_did_is_shown(tmp_path: Path):
    run = online_run(tmp_path / "run")
    reader = Reader(tmp_path)
    assert "Guard" not in reader.text("/run", name="run")
    append(
        run / "guard.jsonl", {"event": "check", "step": 10}, {"event": "rolled back", "step": 15, "why": "gold fell"}
    )
    (run / "decision.json").write_text(json.dumps({"chosen_step": 10, "rule": "the best", "checkpoints": []}))
    text = reader.text("/run", name="run")
    assert "1 checks, 1 actions" in text
    assert "gold fell" in text
    assert "Chosen is step 10" in text


def test_of_runs_with_more_samples_than_are_kept_no_noise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b c"):
        samples = [{"step": 1, "prompt": f"p{i}", "response": "r", "gold": 0.1 * i} for i in range(12)]
        online_run(tmp_path / name, samples=samples, settings='world = "w"\n')
    names = ["a", "b c"]
    assert "gold: the same on all 12 prompts" in Reader(tmp_path).text("/compare", run=names)
    for name, most in (("MOST_SAMPLES", 11), ("SAMPLE_BYTES", 300)):
        with monkeypatch.context() as patch:
            patch.setattr(reading, name, most)
            text = Page(Reader(tmp_path).text("/compare", run=names)).text
        assert "the same on all" not in text
        assert f"trimtab report diff {tmp_path}/a '{tmp_path}/b c' reads all" in text


UNREADABLE = ["settings.toml", "summary.json", "metrics.jsonl"]


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("how", ["directory", "deep", "refused"])
def test_one_unreadable_file_is_one_damaged_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str):
    online_run(tmp_path / "good")
    path = online_run(tmp_path / "bad") / name
    path.unlink(missing_ok=True)
    if how == "directory":
        path.mkdir()
    elif how == "deep":
        deep = "[" * 200_000
        path.write_text(f"a = {deep}" if name == "settings.toml" else deep + "\n")
    else:
        path.write_text("")
        opened = Path.open

        def refused(self: Path, *arguments, **options):
            if self == path:
                raise PermissionError(13, "Permission denied")
            return opened(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refused)
    reader = Reader(tmp_path)
    rows = rows_of(reader.text("/"))
    assert rows["good"].startswith("failed")
    text = reader.text("/run", name="bad")
    assert name in text
    record = collect(tmp_path / "bad")
    assert any(name in problem for problem in record.problems)
    if not (how == "deep" and name == "metrics.jsonl"):  # a damaged line is counted on the page of its run
        assert rows["bad"].startswith("damaged")


def test_a_line_that_is_too_long_makes_a_run_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trimtab.ui.tail.MOST_LINE", 10_000)
    monkeypatch.setattr("trimtab.ui.tail.CHUNK", 1000)
    run = online_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("x" * 20_000)
    reader = Reader(tmp_path)
    assert "a line of metrics.jsonl is longer" in reader.text("/run", name="run")
    assert rows_of(reader.text("/"))["run"].startswith("damaged")


def test_links_that_lead_elsewhere_are_counted(tmp_path: Path):
    online_run(tmp_path / "elsewhere" / "run")
    online_run(tmp_path / "runs" / "here")
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs" / "here")
    assert "Links to directories" not in Reader(tmp_path / "runs").text("/")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere" / "run")
    text = Reader(tmp_path / "runs").text("/")
    assert "Links to directories elsewhere, which are not followed: 1." in text
    assert set(rows_of(text)) == {"here"}


def test_a_pipeline_is_running_between_two_stages(tmp_path: Path):
    write_pipeline(tmp_path / "whole")
    (tmp_path / "whole" / "summary.json").unlink(missing_ok=True)
    assert rows_of(Reader(tmp_path).text("/"))["whole"].startswith("stopped")
    with holding(tmp_path / "whole"):
        assert rows_of(Reader(tmp_path).text("/"))["whole"].startswith("running")


def test_ages_are_words():
    assert [pages.age(seconds) for seconds in (-1, 5, 119, 120, 7200, 200000)] == [
        "0 s ago", "5 s ago", "119 s ago", "2 min ago", "2 h ago", "2 d ago"
    ]  # fmt: skip


def test_only_so_many_runs_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST_VIEWS", 2)
    for name in "abc":
        online_run(tmp_path / name)
    library = Library(tmp_path)
    first = library.view("a")
    assert library.view("a") is first
    library.view("b"), library.view("c")
    assert library.view("a") is not first
