"""What people write is not lost: when a lease or a session ends, in a second tab, without scripts."""

from __future__ import annotations

import re
import sqlite3
import threading

import pytest
import sqlalchemy as sa

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from tests.feedback.projects import PASSWORD, add, answer_next, lease, person
from trimtab.feedback import people
from trimtab.feedback.answers import Answer
from trimtab.feedback.assign import reclaim
from trimtab.feedback.server import annotate
from trimtab.feedback.server import app as app_module
from trimtab.feedback.store import Store, verify
from trimtab.feedback.voting import reopen, save_draft, undo, vote
from trimtab.feedback.webhooks import deliver_due

HOUR = 3600.0
DEMONSTRATION = {"task": {"kind": "demonstration"}, "assignment": {"lease_minutes": 30}}
WORDS = "Half of a long and careful reply"


def written_by(store: Store, name: str = "Ann") -> Browser:
    browser = Browser(store)
    browser.join(name)
    browser.read_guideline()
    return browser


def late(store: Store, seconds: float = HOUR) -> None:
    store.clock.seconds += seconds
    with store.write() as connection:
        reclaim(store, connection)


def test_whoever_writes_keeps_the_task(make: Make):
    store = make(DEMONSTRATION)
    add(store, 1, kind="demonstration", num=0)
    ann = person(store, "Ann")
    mine = lease(store, ann)
    assert mine is not None
    for _ in range(5):
        late(store, 1200)  # twenty minutes, of thirty
        assert save_draft(store, ann, mine.token, {"text": WORDS})
    assert lease(store, person(store, "Bob")) is None
    late(store)
    assert lease(store, person(store, "Eve")) is not None  # who stopped writing gives it back
    assert verify(store) == []


def test_a_draft_of_somebody_who_was_banned_takes_no_place(make: Make):
    store = make(DEMONSTRATION)
    add(store, 1, kind="demonstration", num=0)
    ann = person(store, "Ann")
    mine = lease(store, ann)
    assert mine is not None
    people.set_state(store, ann.id, "banned")
    assert not save_draft(store, ann, mine.token, {"text": WORDS})  # sent before the ban, and let in after it
    assert verify(store) == []
    assert lease(store, person(store, "Bob")) is not None


def test_a_skip_that_is_sent_again_with_words_typed_is_the_same_answer(make: Make):
    store = make({"task": {"rationale": "optional"}})
    add(store, 1)
    ann = person(store, "Ann")
    mine = lease(store, ann)
    assert mine is not None
    skip = Answer(choice="skip", rationale="too hard", reason="r" * 300)
    first = vote(store, ann, mine.token, skip)
    again = vote(store, ann, mine.token, skip)  # the answer to the first was lost on the way
    assert (again.vote_id, again.duplicate, again.differs) == (first.vote_id, True, False)
    assert vote(store, ann, mine.token, Answer(choice="A", strength=1)).differs
    assert vote(store, ann, mine.token, Answer(choice="A", strength=9)).differs  # which would not be taken at all


def test_a_begun_answer_is_taken_up_again_while_there_is_a_place(make: Make):
    store = make(DEMONSTRATION)
    add(store, 5, kind="demonstration", num=0)
    ann = person(store, "Ann")
    mine = lease(store, ann)
    assert mine is not None
    save_draft(store, ann, mine.token, {"text": WORDS})
    late(store)
    again = lease(store, ann)
    assert again is not None
    assert (again.item_id, again.token, again.draft["text"]) == (mine.item_id, mine.token, WORDS)
    late(store)  # and a letter written later takes it up as well
    assert save_draft(store, ann, mine.token, {"text": WORDS + "!"})
    assert vote(store, ann, mine.token, Answer(choice="done", text=WORDS)).vote_id
    assert verify(store) == []


@pytest.mark.parametrize("how", ["taken up", "typed on", "opened again", "undone"])
def test_a_change_that_was_begun_is_there_after_its_lease(make: Make, how: str):
    store = make(DEMONSTRATION)
    add(store, 1, kind="demonstration", num=0)
    ann = person(store, "Ann")
    receipt = answer_next(store, ann, Answer(choice="done", text="first"))
    assert receipt is not None
    mine = reopen(store, ann, receipt.vote_id)
    assert save_draft(store, ann, mine.token, {"text": WORDS})
    if how != "opened again":
        late(store)
    if how == "typed on":
        assert save_draft(store, ann, mine.token, {"text": WORDS + "!"})
    elif how == "opened again":
        assert reopen(store, ann, receipt.vote_id).token == mine.token
    elif how == "undone":
        undo(store, ann)
    assert lease(store, person(store, "Bob")) is None  # the answer stands meanwhile
    again = lease(store, ann)
    assert again is not None
    assert (again.token, again.standing) == (mine.token, how != "undone")
    assert again.draft["text"] == WORDS + ("!" if how == "typed on" else "")
    vote(store, ann, again.token, Answer(choice="done", text=WORDS))
    assert lease(store, ann) is None
    assert verify(store) == []


def test_an_answer_that_was_only_looked_at_is_not_asked_again(make: Make):
    store = make(DEMONSTRATION)
    add(store, 1, kind="demonstration", num=0)
    ann = person(store, "Ann")
    receipt = answer_next(store, ann, Answer(choice="done", text="first"))
    assert receipt is not None
    mine = reopen(store, ann, receipt.vote_id)
    assert mine.draft["text"] == "first"
    late(store)
    assert lease(store, ann) is None
    assert save_draft(store, ann, mine.token, {"text": WORDS})  # the page is still open, and is typed in
    again = lease(store, ann)
    assert again is not None
    assert again.draft["text"] == WORDS


def test_what_came_too_late_is_given_back(small: Make):
    store = small(DEMONSTRATION)
    add(store, 1, kind="demonstration", num=0)
    browser = written_by(store)
    token = browser.lease()
    late(store)
    answer_next(store, person(store, "Bob"), Answer(choice="done", text="Bob was first"))
    assert browser.client.post(f"/draft/{token}", data={"csrf": browser.csrf(), "text": WORDS}).status_code == 409
    response = browser.post(f"/task/{token}", text=WORDS)
    assert response.status_code == 409
    assert WORDS in response.text
    assert verify(store) == []


def test_a_mistake_in_the_form_keeps_what_was_written(small: Make):
    store = small({"task": {"rationale": "optional"}})
    add(store, 1)
    browser = written_by(store)
    response = browser.post(f"/task/{browser.lease()}", rationale=WORDS)  # no answer was chosen
    assert response.status_code == 422
    assert WORDS in response.text


@pytest.mark.parametrize("how", ["signed out", "idle", "another session"])
def test_a_session_that_ends_does_not_take_the_words_with_it(small: Make, how: str):
    store = small(DEMONSTRATION)
    add(store, 1, kind="demonstration", num=0)
    browser = written_by(store)
    token, old = browser.lease(), browser.csrf()
    if how == "idle":
        store.clock.seconds += 13 * HOUR
    else:
        other = Browser(store, browser.app)
        other.client.cookies = browser.client.cookies
        other.text = browser.text
        other.post("/sign-out")
        if how == "another session":
            browser.get("/sign-in")
            browser.post("/sign-in", name="Ann", password=PASSWORD)
    fields = {"csrf": old, "text": WORDS}
    for path in (f"/draft/{token}", f"/task/{token}"):  # with scripts the page stays, and asks
        assert browser.client.post(path, data=fields, headers={"HX-Request": "true"}).status_code == 401
    response = browser.client.post(f"/task/{token}", data=fields)  # without, the words are given back
    assert response.status_code in (401, 403)
    assert WORDS in response.text
    if how == "another session":
        fresh = browser.client.get("/session").json()["csrf"]
        assert fresh != old
        assert "Not stored" not in browser.client.post(f"/task/{token}", data={**fields, "csrf": fresh}).text
    else:
        assert browser.client.get("/session", follow_redirects=False).status_code == 303


def test_another_answer_from_a_second_tab_is_not_dropped_without_a_word(small: Make):
    store = small({"task": {"rationale": "optional"}})
    add(store, 2)
    browser = written_by(store)
    token = browser.lease()
    assert browser.post(f"/task/{token}", position="1").status_code == 200
    again = browser.post(f"/task/{token}", position="1")  # a second click
    assert "Answered already" not in again.text
    other = browser.post(f"/task/{token}", position="2", rationale=WORDS)
    assert other.status_code == 409
    assert "that answer stands" in other.text
    assert WORDS in other.text


def test_a_changed_answer_is_one_of_the_day(make: Make):
    store = make({"assignment": {"max_per_day": 2}})
    add(store, 3)
    ann = person(store, "Ann")
    first = answer_next(store, ann)
    assert first is not None
    for choice in ("B", "A"):
        with store.read() as connection:
            from trimtab.feedback.votes import cast_votes

            newest = [cast.id for cast in cast_votes(connection)][-1]
        again = reopen(store, ann, newest)
        vote(store, ann, again.token, Answer(choice=choice, strength=1))
    assert answer_next(store, ann) is not None
    assert answer_next(store, ann) is None


# --- what other sites and plain browsers send ---


def test_forms_are_taken_without_scripts_and_refused_from_other_sites(small: Make):
    store = small()
    add(store, 1)
    browser = Browser(store)
    browser.get("/join")
    fields = {
        "csrf": browser.csrf(),
        "token": people.make_invite(store, "annotator"),
        "name": "A",
        "password": PASSWORD,
    }
    for headers in (
        {"Origin": "https://other.example"},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1.other.example"},
    ):
        assert browser.client.post("/join", data=fields, headers=headers).status_code == 403
    assert browser.client.post("/join", data=fields, headers={"Origin": "null"}).status_code == 200
    assert "same-origin" in browser.get("/task").headers["referrer-policy"]


def test_a_proxy_that_keeps_the_host_to_itself_is_known_by_the_names(small: Make):
    store = small({"server": {"names": ["label.example.org"]}})
    browser = Browser(store)
    browser.get("/join")
    fields = {
        "csrf": browser.csrf(),
        "token": people.make_invite(store, "annotator"),
        "name": "A",
        "password": PASSWORD,
    }
    headers = {"Origin": "https://label.example.org"}
    assert browser.client.post("/join", data=fields, headers=headers).status_code == 200


def test_nothing_of_another_site_signs_a_browser_out(small: Make):
    store = small()
    browser = written_by(store)
    # what another site makes a browser send has no cookie; the answer must not set a fresh one over it
    stranger = Browser(store, browser.app)
    response = stranger.client.post("/sign-in", data={"name": "x"}, headers={"Origin": "https://other.example"})
    assert "set-cookie" not in response.headers
    assert re.search("SameSite=lax", stranger.client.get("/sign-in").headers["set-cookie"], re.IGNORECASE)


def test_the_address_that_is_listened_on_is_a_name(small: Make):
    store = small()
    app = app_module.create_app(store, host="192.0.2.5")
    assert Browser(store, app).client.get("/sign-in", headers={"Host": "192.0.2.5:8765"}).status_code == 200
    assert Browser(store, app).client.get("/sign-in", headers={"Host": "192.0.2.6"}).status_code == 400


# --- the loop beside the app ---


def test_deliveries_fail_one_by_one_and_the_loop_goes_on(small: Make, monkeypatch: pytest.MonkeyPatch):
    from http.client import BadStatusLine

    hooks = [{"url": f"http://{n}", "secret_env": f"KEY_{n.upper()}", "events": ["vote"]} for n in ("a", "b", "c")]
    store = small({"webhooks": hooks})
    monkeypatch.setenv("KEY_B", "x")
    monkeypatch.setenv("KEY_C", "x")
    add(store, 3)
    ann = person(store, "Ann")
    while answer_next(store, ann) is not None:
        pass
    asked: list[str] = []

    def post(url: str, *_: object) -> int:
        asked.append(url)
        if url == "http://b":
            raise BadStatusLine("nonsense")
        return 200

    assert deliver_due(store, post) == 3
    assert asked.count("http://b") == 1  # an address that fails is asked once a round
    stopping = threading.Event()
    stopping.set()
    store.clock.seconds += HOUR
    assert deliver_due(store, post, stopping=stopping) == 0


def test_a_full_disk_gives_back_what_was_written(small: Make, monkeypatch: pytest.MonkeyPatch, capsys):
    store = small(DEMONSTRATION)
    add(store, 2, kind="demonstration", num=0)
    ann = written_by(store)
    token = ann.lease()

    def full(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("INSERT", {"text": WORDS}, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(annotate, "vote", full)
        sent = ann.post(f"/task/{token}", text=WORDS)
    assert sent.status_code == 503
    assert WORDS in sent.text
    said = capsys.readouterr().err
    assert "disk is full" in said
    assert WORDS not in said
    assert ann.post(f"/task/{token}", text=WORDS).status_code == 200
    assert verify(store) == []


def test_the_answer_to_a_form_can_be_reloaded(small: Make):
    """The browser then stands at the form's address, and asks for it as a page."""
    store = small({"task": {"rationale": "required"}})
    add(store, 2)
    ann = written_by(store)
    token = ann.lease()
    assert "reason in words is missing" in ann.post(f"/task/{token}", position="1").text
    again = ann.get(f"/task/{token}")
    assert again.status_code == 200
    assert f'action="/task/{token}"' in again.text
    for sent, page in (("/undo", "/task"), ("/mine/7", "/mine"), ("/account/keys", "/account")):
        assert str(ann.get(sent).url).endswith(page)
    boss = Browser(store)
    boss.join("Boss", "admin")
    for sent, page in (("/admin/invites", "people"), ("/admin/people/1/link", "people"), ("/admin/log/verify", "log")):
        assert str(boss.get(sent).url).endswith(f"/admin/{page}")
    assert boss.client.get("/api/v1/undo").status_code == 405
