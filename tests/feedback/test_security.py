"""Who may do what on every route, and what strangers' forms and files cannot do."""

from __future__ import annotations

import json
import math
import re

import pytest
from fastapi.testclient import TestClient

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from tests.feedback.projects import PASSWORD, add, answer_next, person
from trimtab.core.errors import DataError
from trimtab.feedback import people
from trimtab.feedback.importing import import_source
from trimtab.feedback.server.app import create_app
from trimtab.feedback.server.security import COOKIE, HEADERS, Limiter

# Who gets past the door: nobody signed in, annotators, adjudicators, admins.
ANYBODY, SIGNED_IN, JUDGES, ADMINS = "0123", "123", "23", "3"
PAGES = {
    ("GET", "/"): ANYBODY,
    ("GET", "/session"): SIGNED_IN,
    ("GET", "/sign-in"): ANYBODY,
    ("POST", "/sign-in"): ANYBODY,
    ("GET", "/join"): ANYBODY,
    ("POST", "/join"): ANYBODY,
    ("POST", "/sign-out"): SIGNED_IN,
    ("GET", "/task"): SIGNED_IN,
    ("POST", "/task/{token}"): SIGNED_IN,
    ("POST", "/draft/{token}"): SIGNED_IN,
    ("POST", "/undo"): SIGNED_IN,
    ("GET", "/quiz/{vote_id}"): SIGNED_IN,
    ("GET", "/guideline"): SIGNED_IN,
    ("POST", "/guideline/read"): SIGNED_IN,
    ("POST", "/warned"): SIGNED_IN,
    ("GET", "/mine"): SIGNED_IN,
    ("POST", "/mine/{vote_id}"): SIGNED_IN,
    ("GET", "/account"): SIGNED_IN,
    ("POST", "/account/{part}"): SIGNED_IN,
    ("GET", "/admin"): JUDGES,
    ("GET", "/admin/board"): JUDGES,
    ("GET", "/admin/adjudicate"): JUDGES,
    ("GET", "/admin/adjudicate/{item_id}"): JUDGES,
    ("POST", "/admin/adjudicate/{item_id}"): JUDGES,
    ("POST", "/admin/queue"): ADMINS,
    ("GET", "/admin/people"): ADMINS,
    ("POST", "/admin/invites"): ADMINS,
    ("POST", "/admin/people/{person_id}/state"): ADMINS,
    ("POST", "/admin/people/{person_id}/delete"): ADMINS,
    ("POST", "/admin/people/{person_id}/link"): ADMINS,
    ("POST", "/admin/people/{person_id}/role"): ADMINS,
    ("POST", "/admin/people/{person_id}/sign-out"): ADMINS,
    ("POST", "/admin/invites/{invite_id}/revoke"): ADMINS,
    ("GET", "/admin/export"): ADMINS,
    ("GET", "/admin/export/file"): ADMINS,
    ("GET", "/admin/guideline"): ADMINS,
    ("POST", "/admin/guideline"): ADMINS,
    ("GET", "/admin/log"): ADMINS,
    ("POST", "/admin/log/verify"): ADMINS,
}
API = {
    ("GET", "/api/v1/next"): SIGNED_IN,
    ("POST", "/api/v1/tasks/{token}"): SIGNED_IN,
    ("POST", "/api/v1/undo"): SIGNED_IN,
    ("GET", "/api/v1/guideline"): SIGNED_IN,
    ("GET", "/api/v1/board"): JUDGES,
    ("GET", "/api/v1/disagreements"): JUDGES,
    ("POST", "/api/v1/items/{item_id}/decision"): JUDGES,
    ("GET", "/api/v1/status"): JUDGES,
    ("POST", "/api/v1/items"): ADMINS,
    ("GET", "/api/v1/items"): ADMINS,
    ("PUT", "/api/v1/scores"): ADMINS,
    ("GET", "/api/v1/votes"): ADMINS,
    ("GET", "/api/v1/people"): ADMINS,
    ("POST", "/api/v1/invites"): ADMINS,
    ("PUT", "/api/v1/people/{person_id}/state"): ADMINS,
    ("DELETE", "/api/v1/people/{person_id}"): ADMINS,
    ("PUT", "/api/v1/people/{person_id}/role"): ADMINS,
    ("POST", "/api/v1/people/{person_id}/link"): ADMINS,
    ("DELETE", "/api/v1/people/{person_id}/sessions"): ADMINS,
    ("GET", "/api/v1/invites"): ADMINS,
    ("DELETE", "/api/v1/invites/{invite_id}"): ADMINS,
    ("PUT", "/api/v1/guideline"): ADMINS,
    ("PUT", "/api/v1/queue"): ADMINS,
    ("GET", "/api/v1/export/{layout}"): ADMINS,
    ("GET", "/api/v1/audit"): ADMINS,
    ("POST", "/api/v1/audit/verify"): ADMINS,
}
_VALUES = {
    "token": "x" * 24,
    "invite_id": "999",
    "vote_id": "999",
    "item_id": "999",
    "person_id": "999",
    "part": "keys",
    "layout": "votes",
}


def filled(path: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: _VALUES[m[1]], path)


def routes(app) -> set[tuple[str, str]]:
    """Every route of the app, those of its routers too."""
    found = set()

    def walk(listed, prefix: str) -> None:
        for route in listed:
            inner = getattr(route, "original_router", None) or getattr(route, "router", None)
            if hasattr(route, "methods") and hasattr(route, "path"):
                found.update((method, prefix + route.path) for method in route.methods - {"HEAD"})
            elif inner is not None:
                walk(inner.routes, prefix)

    walk(app.routes, "")
    return found


def test_every_route_is_in_the_table(small: Make):
    described = {route for route in routes(create_app(small())) if route[1] != "/api/openapi.json"}
    assert described == PAGES.keys() | API.keys()


def test_each_role_gets_where_it_may_and_nowhere_else(small: Make):
    store = small({"server": {"requests_per_minute": 100000, "sign_ins_per_minute": 1000}})
    add(store, 2)
    app = create_app(store)
    browsers = [Browser(store, app)]
    for role in people.ROLES:
        browsers.append(Browser(store, app))
        browsers[-1].join(f"the {role}", role)
    browsers[0].get("/sign-in")
    for (method, path), allowed in PAGES.items():
        for level, browser in enumerate(browsers):
            if path in ("/sign-out", "/sign-in", "/join") and method == "POST" and level:
                continue  # would end the session that the next rows need
            browser.client.follow_redirects = False
            csrf = browser.csrf() if level == 0 else browser_csrf(browser)
            response = (
                browser.client.get(filled(path))
                if method == "GET"
                else browser.client.post(filled(path), data={"csrf": csrf, "uses": "1", "hours": "1"})
            )
            if str(level) in allowed:
                assert response.status_code != 403, (method, path, level, response.text)
                assert response.headers.get("location") != "/sign-in" or path in ("/", "/sign-in"), (path, level)
            elif level == 0:
                assert (response.status_code, response.headers["location"]) == (303, "/sign-in"), (method, path)
            else:
                assert response.status_code == 403, (method, path, level)


def browser_csrf(browser: Browser) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', browser.client.get("/guideline").text)
    assert found
    return found[1]


def test_each_token_gets_where_it_may_and_nowhere_else(small: Make):
    store = small({"server": {"requests_per_minute": 100000}})
    add(store, 2)
    client = TestClient(create_app(store))
    tokens = [""]
    for role in people.ROLES:
        someone = person(store, f"the {role}", role)
        tokens.append(people.start_session(store, someone, hours=1, kind="api"))
    for (method, path), allowed in API.items():
        for level, token in enumerate(tokens):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            response = client.request(method, filled(path), headers=headers, json={} if method != "GET" else None)
            if str(level) in allowed:
                assert response.status_code not in (401, 403), (method, path, level, response.text)
            else:
                assert response.status_code == (403 if level else 401), (method, path, level)


def test_a_browser_session_is_no_api_token_and_the_reverse(small: Make):
    store = small()
    someone = person(store, "Ann", "admin")
    app = create_app(store)
    browser = people.start_session(store, someone, hours=1)
    api = people.start_session(store, someone, hours=1, kind="api")
    client = TestClient(app, follow_redirects=False)
    assert client.get("/api/v1/status", headers={"Authorization": f"Bearer {browser}"}).status_code == 401
    client.cookies.set(COOKIE, api)
    assert client.get("/task").headers["location"] == "/sign-in"
    client.cookies.set(COOKIE, browser)
    assert client.get("/api/v1/status").status_code == 401


# --- forms ---


def test_a_form_without_our_token_or_from_elsewhere_does_nothing(small: Make):
    store = small()
    add(store, 1)
    boss = Browser(store)
    boss.join("Boss", "admin")
    ann = Browser(store, boss.app)
    ann.join("Ann")
    csrf = browser_csrf(boss)
    assert boss.post("/admin/queue", "0" * 64, open="0").status_code == 403
    assert boss.post("/admin/queue", browser_csrf(ann), open="0").status_code == 403
    boss.client.headers["origin"] = "https://evil.example"
    assert boss.post("/admin/queue", csrf, open="0").status_code == 403
    del boss.client.headers["origin"]
    response = boss.client.post("/admin/queue", json={"csrf": csrf, "open": "0"})
    assert response.status_code == 415
    assert "Pause the project" in boss.get("/admin").text


def test_sessions_end(small: Make):
    store = small({"server": {"session_hours": 10.0, "idle_hours": 1.0}})
    ann = Browser(store)
    ann.join("Ann")
    assert ann.client.cookies[COOKIE]
    store.clock.seconds += 3000
    assert "Sign in" not in ann.get("/mine").text
    store.clock.seconds += 3700
    assert "Sign in" in ann.get("/mine").text
    ann.get("/sign-in")
    ann.post("/sign-in", name="Ann", password=PASSWORD)
    for _ in range(13):
        store.clock.seconds += 3000
        ann.get("/mine")
    assert "Sign in" in ann.text  # busy all the time, and over all the same
    ann.get("/sign-in")
    ann.post("/sign-in", name="Ann", password=PASSWORD)
    token = ann.client.cookies[COOKIE]
    ann.get("/mine")
    ann.post("/sign-out")
    ann.client.cookies.set(COOKIE, token)
    assert "Sign in" in ann.get("/mine").text


def test_signing_in_gives_a_new_session_token(small: Make):
    ann = Browser(small())
    ann.get("/sign-in")
    before = ann.client.cookies[COOKIE]
    ann.join("Ann")
    assert ann.client.cookies[COOKIE] != before


def test_cookies_and_headers_of_every_answer(small: Make):
    ann = Browser(small({"server": {"https": True}}))
    response = ann.client.get("/sign-in")
    cookie = response.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=lax", "secure"))
    for path in ("/sign-in", "/nowhere", "/static/app.js", "/api/openapi.json", "/task"):
        headers = ann.client.get(path, follow_redirects=False).headers
        assert headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_templates_hold_no_inline_script_or_style():
    from trimtab.feedback.server.pages import WEB

    for template in (WEB / "templates").glob("*.html"):
        text = template.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?! src=\"/static/)|\|\s*safe", text), (
            template
        )


def test_limits(small: Make):
    limiter = Limiter(3)
    assert [limiter.allows("a", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert limiter.allows("b", 0.0)
    assert limiter.allows("a", 20.0)
    store = small({"server": {"requests_per_minute": 5, "sign_ins_per_minute": 2}})
    client = TestClient(create_app(store))
    assert [client.get("/sign-in").status_code for _ in range(2)] == [200, 200]
    ann = Browser(small({"server": {"sign_ins_per_minute": 2}}))
    ann.get("/sign-in")
    codes = [ann.post("/sign-in", name="x", password="y" * 12).status_code for _ in range(4)]
    assert codes == [422, 422, 429, 429]
    for _ in range(6):
        last = client.get("/sign-in")
    assert last.status_code == 429
    assert client.get("/static/app.css").status_code == 200


def test_large_bodies_and_strange_hosts_are_refused(small: Make):
    client = TestClient(create_app(small()))
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/sign-in", content=b"a" * 1_100_000, headers=headers).status_code == 413
    assert client.get("/sign-in", headers={"host": "evil.example"}).status_code == 400


def test_an_invitation_works_as_often_and_as_long_as_it_says(small: Make):
    store = small()
    token = people.make_invite(store, "annotator", uses=2, hours=1)
    people.join(store, token, "A", PASSWORD)
    with pytest.raises(DataError, match="somebody has this name"):
        people.join(store, token, "A", PASSWORD)
    people.join(store, token, "B", PASSWORD)
    with pytest.raises(DataError, match="used up"):
        people.join(store, token, "C", PASSWORD)
    late = people.make_invite(store, "admin", hours=1)
    store.clock.seconds += 3700
    with pytest.raises(DataError, match="too old"):
        people.join(store, late, "D", PASSWORD)
    with pytest.raises(DataError, match="at least 10"):
        people.join(store, token, "E", "short")


@pytest.mark.parametrize("hours", [0.0, -1.0, math.nan, math.inf])
def test_nothing_is_good_for_no_time_or_for_ever(small: Make, hours: float):
    store = small()
    with pytest.raises(DataError, match="it would be good for"):
        people.make_invite(store, "annotator", hours=hours)
    person = people.join(store, people.make_invite(store, "annotator"), "A", PASSWORD)
    with pytest.raises(DataError, match="it would be good for"):
        people.start_session(store, person, hours=hours, kind="api", name="command")


def test_secrets_are_stored_as_hashes_and_never_logged(small: Make):
    store = small()
    token = people.make_invite(store, "annotator")
    ann = people.join(store, token, "Ann", PASSWORD)
    session = people.start_session(store, ann, hours=1)
    store.close()
    content = b"".join(path.read_bytes() for path in store.project.directory.iterdir())
    for secret in (token, session, PASSWORD):
        assert secret.encode() not in content


@pytest.mark.parametrize(
    "source", ["../../etc/passwd", "/etc/passwd", "x\0.jsonl", "file:///etc/passwd", "~/.ssh/id_rsa"]
)
def test_a_path_that_is_no_data_file_is_refused(small: Make, source: str):
    with pytest.raises(DataError):
        import_source(small(), source)


def test_an_upload_cannot_name_files(small: Make):
    store = small()
    boss = person(store, "Boss", "admin")
    client = TestClient(create_app(store))
    headers = {"Authorization": f"Bearer {people.start_session(store, boss, hours=1, kind='api')}"}
    for row in ({"source": "/etc/passwd"}, {"prompt": "/etc/passwd"}, {"prompt": {"file": "/etc/passwd"}}):
        response = client.post("/api/v1/items", json={"rows": [row]}, headers=headers)
        assert response.status_code == 422, response.text
    for path in ("/static/../app.py", "/static/%2e%2e/templates/base.html", "/static//etc/passwd"):
        assert client.get(path).status_code == 404
    assert client.get("/admin/export/file?layout=../../x", follow_redirects=False).status_code == 303


def test_answers_given_before_a_state_change_stay_out_of_reach(small: Make):
    store = small()
    add(store, 2)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    receipt = answer_next(store, ann)
    assert receipt is not None
    browser = Browser(store)
    token = people.start_session(store, bob, hours=1)
    browser.client.cookies.set(COOKIE, token)
    browser.get("/guideline")
    assert browser.client.get(f"/quiz/{receipt.vote_id}").status_code == 404


def test_numbers_that_are_none_or_too_large_get_an_answer_in_words(small: Make):
    store = small()
    add(store, 1)
    boss = Browser(store)
    boss.join("Boss", "admin")
    boss.get("/admin/people")
    for uses in ("²", "٣٣٣٣٣", "9" * 5000, "-1", "1.5", ""):
        assert boss.post("/admin/invites", role="annotator", uses=uses, hours="24").status_code == 422
        boss.get("/admin/people")
    for path in ("/quiz/%s", "/admin/adjudicate/%s", "/admin/log?before=%s", "/mine?before=%s"):
        assert boss.get(path % (10**30)).status_code == 404


def test_half_a_character_in_a_body_is_refused_in_words(small: Make):
    store = small()
    add(store, 1)
    someone = person(store, "Ann")
    token = people.start_session(store, someone, hours=1, kind="api")
    client = TestClient(create_app(store), headers={"Authorization": f"Bearer {token}"})
    task = client.get("/api/v1/next").json()["task"]["token"]
    headers = {"content-type": "application/json"}
    for field in ("flag", "rationale", "position", "seconds"):
        body = json.dumps({"fields": {"position": "1", field: "\ud83d"}})
        assert client.post(f"/api/v1/tasks/{task}", content=body, headers=headers).status_code == 422
    boss = people.start_session(store, person(store, "Boss", "admin"), hours=1, kind="api")
    client.headers["Authorization"] = f"Bearer {boss}"
    for item, model in (("\ud83d", "rm"), ("a", "\ud83d")):
        body = json.dumps({"scores": {item: {model: [1, 2]}}})
        assert client.put("/api/v1/scores", content=body, headers=headers).status_code == 422
