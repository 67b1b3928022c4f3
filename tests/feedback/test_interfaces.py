"""What programs use: the REST interface and its client, webhooks, and the commands."""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from fastapi.testclient import TestClient

from tests.feedback.conftest import Make
from tests.feedback.projects import add, answer_next, lease, make_project, make_store, person
from tests.feedback.running import Running
from trimtab.cli import main
from trimtab.core.errors import ConfigError
from trimtab.feedback import people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.client import Client
from trimtab.feedback.importing import Options, import_source
from trimtab.feedback.project import load_project
from trimtab.feedback.server.app import create_app
from trimtab.feedback.store import Store
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import reopen, vote
from trimtab.feedback.webhooks import RETRY_SECONDS, deliver_due


class Api:
    """Calls with a token."""

    def __init__(self, store: Store, role: people.PersonRole) -> None:
        someone = person(store, f"api {role}", role)
        self.client = TestClient(create_app(store))
        token = people.start_session(store, someone, hours=1, kind="api")
        self.client.headers["Authorization"] = f"Bearer {token}"

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        response = self.client.request(method, f"/api/v1/{path}", json=body)
        assert response.status_code < 300, response.text
        return response.json() if response.content else None


def test_what_the_pages_do_the_interface_does(small: Make):
    store = small({"assignment": {"overlap": 2}})
    admin, ann = Api(store, "admin"), Api(store, "annotator")
    rows = [{"prompt": f"p{i}", "responses": ["x", "y"]} for i in range(3)]
    assert admin("POST", "items", {"rows": rows})["added"] == 3
    task = ann("GET", "next")["task"]
    assert set(task["replies"]) == {"x", "y"}
    assert ann("GET", "next")["task"]["token"] == task["token"]
    first = ann("POST", f"tasks/{task['token']}", {"fields": {"position": "1"}})
    again = ann("POST", f"tasks/{task['token']}", {"fields": {"position": "2"}})
    assert again == first | {"duplicate": True, "differs": True}
    (voted,) = admin("GET", "votes")
    assert task["replies"][0] == {"A": "x", "B": "y"}[voted["choice"]]
    ann("POST", "undo")
    assert admin("GET", "votes") == []
    task = ann("GET", "next")["task"]
    ann("POST", f"tasks/{task['token']}", {"fields": {"choice": "tie"}})
    assert admin("GET", "status")["answers"] == 1
    assert admin("GET", "board")["answers"] == 1
    listed = admin("GET", "items")
    scores = {listed[0]["sha256"]: {"rm": [0.5, 1.5]}}
    assert admin("PUT", "scores", {"scores": scores}) == {"items": 1}
    decision = {"fields": {"position": "2"}, "taxonomy": "bad data", "key": "k" * 12}
    assert not admin("POST", f"items/{listed[0]['id']}/decision", decision)["duplicate"]
    assert admin("POST", f"items/{listed[0]['id']}/decision", decision)["duplicate"]
    assert admin("PUT", "guideline", {"text": "# Two"}) == {"version": 2}
    assert ann("GET", "guideline")["text"] == "# Two"
    assert admin("PUT", "queue", {"open": False}) == {"open": False}
    assert ann("GET", "next")["task"] is None
    names = {p["name"]: p["id"] for p in admin("GET", "people")}
    assert admin("POST", "invites", {"role": "annotator"})["token"]
    admin("PUT", f"people/{names['api annotator']}/state", {"state": "banned"})
    assert ann.client.get("/api/v1/next").status_code == 401
    admin("DELETE", f"people/{names['api annotator']}")
    assert len(admin("GET", "export/votes")["rows"]) == 2
    assert admin("POST", "audit/verify")["problems"] == []
    assert admin("GET", "audit")[0]["action"] == "store_made"
    assert admin.client.post("/api/v1/items", json={"rows": [{"prompt": "p"}], "colour": 1}).status_code == 422


def test_the_interface_describes_itself(small: Make):
    store = small()
    described = TestClient(create_app(store)).get("/api/openapi.json").json()
    assert described["paths"]["/api/v1/next"]["get"]["security"]
    assert all(path.startswith("/api/v1/") for path in described["paths"])
    assert len(described["paths"]) == 23


class Receiver:
    """A server that gets webhooks and answers what it is told to."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                self.send_response(outer.status)
                if outer.status == 302:
                    self.send_header("Location", f"http://127.0.0.1:{outer.port}/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_the_client_reads_all_votes_page_by_page(small: Make, tmp_path: Path):
    store = small()
    rows = [
        {"prompt": f"p{i}", "response_a": "x", "response_b": "y", "choice": "A", "annotator": "Ann"}
        for i in range(1100)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_source(store, str(tmp_path / "rows.jsonl"), Options(with_votes=True))
    api = Api(store, "admin")

    class Here(Client):
        def _call(self, method: str, path: str, body: Any = None) -> Any:
            return api(method, path, body)

    assert len({vote["id"] for vote in Here("", "").votes()}) == 1100


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def test_an_item_is_done_once_whatever_is_changed_later(small: Make):
    store = small({"webhooks": [{"url": "http://x", "secret_env": "K", "events": ["item_done"]}]})
    add(store, 1)
    ann = person(store, "Ann")
    receipt = answer_next(store, ann)
    assert receipt is not None
    vote(store, ann, reopen(store, ann, receipt.vote_id).token, Answer(choice="B", strength=1))
    with store.read() as connection:
        assert len(connection.execute(sa.select(t.deliveries)).all()) == 1


def test_two_webhooks_of_one_address_have_one_key(tmp_path):
    hooks = [{"url": "http://x", "secret_env": key, "events": ["vote"]} for key in ("ONE", "TWO")]
    with pytest.raises(ConfigError, match=r"http://x.*ONE.*TWO"):
        load_project(make_project(tmp_path, {"webhooks": hooks}))


def test_webhooks_are_signed_and_sent_again_until_they_arrive(make: Make, receiver: Receiver, monkeypatch):
    monkeypatch.setenv("HOOK_KEY", "a very secret key")
    hook = {"url": f"http://127.0.0.1:{receiver.port}/hook", "secret_env": "HOOK_KEY", "events": ["item_done"]}
    store = make({"webhooks": [hook], "assignment": {"overlap": 2}})
    add(store, 1)
    answer_next(store, person(store, "Ann"))
    assert deliver_due(store) == 0
    answer_next(store, person(store, "Bob"))
    receiver.status = 500
    assert deliver_due(store) == 0
    assert deliver_due(store) == 0  # not before its time
    store.clock.seconds += RETRY_SECONDS[0]
    receiver.status = 302
    assert deliver_due(store) == 0
    store.clock.seconds += RETRY_SECONDS[1]
    receiver.status = 200
    assert deliver_due(store) == 1
    assert deliver_due(store) == 0
    assert len(receiver.got) == 3  # a redirect is not followed
    headers, body = receiver.got[-1]
    wanted = hmac.new(b"a very secret key", body, hashlib.sha256).hexdigest()
    assert headers["X-Trimtab-Signature"] == f"sha256={wanted}"
    assert json.loads(body)["event"] == "item_done"
    assert len({b for _, b in receiver.got}) == 1
    with store.read() as connection:
        (row,) = connection.execute(sa.select(t.deliveries)).all()
    assert (row.attempts, row.next_at, row.last_error) == (3, None, "")


def test_a_webhook_that_never_answers_is_given_up(small: Make, monkeypatch):
    monkeypatch.setenv("HOOK_KEY", "a very secret key")
    store = small({"webhooks": [{"url": "http://127.0.0.1:1/x", "secret_env": "HOOK_KEY", "events": ["vote"]}]})
    add(store, 1)
    answer_next(store, person(store, "Ann"))
    for _ in range(len(RETRY_SECONDS) + 1):
        deliver_due(store)
        store.clock.seconds += 2 * max(RETRY_SECONDS)
    with store.read() as connection:
        (row,) = connection.execute(sa.select(t.deliveries)).all()
    assert (row.attempts, row.next_at) == (len(RETRY_SECONDS) + 1, None)
    assert "refused" in row.last_error


def run(*words: str) -> str:
    result = CliRunner().invoke(main, ["feedback", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_project_from_the_command_line(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "project.toml" in run("init", "mine")
    project = "mine/project.toml"
    assert "200 added" in run("import", project)
    assert "300 answers" in run("simulate", project, "--limit", "300", "--annotators", "6")
    assert "answers" in run("status", project)
    assert json.loads(run("status", project, "--json"))["answers"] == 300
    assert "preference.jsonl: " in run("export", project)
    assert "nothing of what 'groups' holds" in run("export", project, "--layout", "groups")
    assert Path("preference.jsonl.card.json").is_file()
    assert "K-wise" in run("export", project, "--list")
    assert "/join#" in run("invite", project, "--role", "admin")
    assert "paused" in run("people", project, "simulated 1", "--state", "paused")
    assert "deleted-2" in run("people", project, "simulated 2", "--delete")
    Path("g.md").write_text("# Anew")
    assert "version 2" in run("guideline", project, "g.md")
    assert "# Anew" in run("guideline", project)
    run("queue", project, "paused")
    first = run("adjudicate", project).split()[0]
    result = CliRunner().invoke(
        main, ["feedback", "adjudicate", project, first, "--as", "simulated 3", "--choice", "A"]
    )
    assert result.exit_code == 2
    assert len(run("token", project, "simulated 3").strip()) > 30
    run("backup", project, "copy.sqlite")
    Path("scores.jsonl").write_text(json.dumps({"item": "unknown", "scores": {"rm": [1, 2]}}) + "\n")
    assert "0 items" in run("scores", project, "scores.jsonl")
    said = run("audit", project)
    assert "nothing was changed" in said
    run("audit", project, "--head", said.split()[-1])
    result = CliRunner().invoke(main, ["feedback", "audit", project, "--head", "0" * 64])
    assert result.exit_code == 2
    assert "cut off" in result.output


def test_mistakes_on_the_command_line_are_answered_in_words(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project = make_project(tmp_path)
    for words, said in (
        (["export", str(project)], "no store yet"),
        (["export", str(project), "--layout", "csv"], "no layout"),
        (["import", str(project), "nothing.jsonl"], "there is no file"),
        (["serve", "missing.toml"], "no run file"),
    ):
        result = CliRunner().invoke(main, ["feedback", *words])
        assert result.exit_code == 2, result.output
        assert said in result.output
        assert "Traceback" not in result.output


def test_the_client_asks_again_where_the_server_is_away(small: Make):
    client = Client("http://127.0.0.1:1", "token", attempts=1)
    from trimtab.core.errors import EngineError

    with pytest.raises(EngineError, match="refused"):
        client.votes()


def test_a_vote_cast_over_the_interface_counts_as_any_other(small: Make):
    store = small()
    add(store, 1)
    ann = person(store, "Ann")
    given_out = lease(store, ann)
    assert given_out is not None
    vote(store, ann, given_out.token, Answer(choice="tie"))
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["tie"]


def test_nothing_of_the_user_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("feedback").mkdir()
    Path("feedback/guideline.md").write_text("Our rules")
    result = CliRunner().invoke(main, ["feedback", "init"])
    assert result.exit_code == 2
    assert "holds guideline.md already" in result.output
    votes = [{"item": i, "annotator": a, "choice": "A"} for i in range(3) for a in ("ann", "bob")]
    Path("votes.json").write_text(json.dumps(votes))
    for out in ("votes.html", "other.json"):
        result = CliRunner().invoke(main, ["feedback", "agreement", "votes.json", "--out", out])
        assert result.exit_code == 2, result.output
    assert json.loads(Path("votes.json").read_text()) == votes
    assert Path("feedback/guideline.md").read_text() == "Our rules"


def test_a_guideline_that_is_not_utf_8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(main, ["feedback", "init"])
    Path("items.jsonl").write_text(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y"}) + "\n")
    CliRunner().invoke(main, ["feedback", "import", "feedback/project.toml", "items.jsonl"])
    Path("g.md").write_bytes("Antworte höflich".encode("latin-1"))
    result = CliRunner().invoke(main, ["feedback", "guideline", "feedback/project.toml", "g.md"])
    assert result.exit_code == 2
    assert "save it as UTF-8" in result.output


def test_a_backup_makes_its_folder_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(main, ["feedback", "init"])
    project = "feedback/project.toml"
    Path("items.jsonl").write_text(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y"}) + "\n")
    CliRunner().invoke(main, ["feedback", "import", project, "items.jsonl"])
    result = CliRunner().invoke(main, ["feedback", "backup", project, "copies/b.sqlite"])
    assert result.exit_code == 0, result.output
    assert [p.name for p in Path("copies").iterdir()] == ["b.sqlite"]


def test_two_models_score_an_item_in_rows_of_their_own(tmp_path: Path):
    store = make_store(tmp_path)
    add(store, 1)
    with store.read() as connection:
        sha256 = connection.execute(sa.select(t.items.c.sha256)).scalar_one()
    rows = [{"item": sha256, "scores": {name: [0.1, 0.2]}} for name in ("a", "b")]
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(main, ["feedback", "scores", str(store.project.path), str(file)])
    assert result.output == "1 items\n"
    with store.read() as connection:
        assert set(connection.execute(sa.select(t.queue.c.scores)).scalar_one()) == {"a", "b"}
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    again = CliRunner().invoke(main, ["feedback", "scores", str(store.project.path), str(file)])
    assert "'a' has scored item" in again.output


def test_an_item_can_be_read_before_it_is_decided_on_the_command_line(tmp_path: Path):
    store = make_store(tmp_path, {"assignment": {"overlap": 2}})
    add(store, 1)
    for name, choice in (("Ann", "A"), ("\x1b[31mBob", "B")):
        answer_next(store, person(store, name), Answer(choice=choice, strength=1, rationale="because\nof \u202eit"))
    said = run("adjudicate", str(store.project.path), "1")
    assert "user:\nquestion 0" in said
    assert "A:\nreply 0.0" in said
    assert "B:\nreply 0.1" in said
    assert "Ann: A  because of \\u{202e}it" in said
    assert "\x1b" not in said
    person(store, "Judge", "adjudicator")
    words = ["--as", "Judge", "--choice", "B", "--cause", "bad data"]
    assert "decision" in run("adjudicate", str(store.project.path), "1", *words)
    assert "decision, Judge: B" in run("adjudicate", str(store.project.path), "1")
    result = CliRunner().invoke(main, ["feedback", "adjudicate", str(store.project.path), "9"])
    assert result.exit_code == 2
    assert "there is no item 9" in result.output


def test_a_guideline_that_is_not_there_is_said_so(tmp_path: Path):
    store = make_store(tmp_path)
    result = CliRunner().invoke(main, ["feedback", "guideline", str(store.project.path), str(tmp_path / "no.md")])
    assert result.exit_code == 2
    assert "cannot be read: No such file" in result.output


def test_a_server_that_is_stopped_has_lost_nothing_and_says_nothing_else(tmp_path: Path):
    store = make_store(tmp_path)
    add(store, 1)
    store.close()
    server = Running(store.project.path)
    server.process.send_signal(signal.SIGINT)
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""
    assert server.process.wait(timeout=20) == 0
    server.process.stdout.close()
