"""The pages without scripts: every task, undo, edits, two tabs, the quiz, guidelines, drafts, adjudication, people."""

from __future__ import annotations

import re
from html import unescape

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from tests.feedback.projects import add, answer_next, item, make_store, person
from trimtab.feedback import items, people
from trimtab.feedback.answers import Answer
from trimtab.feedback.server import annotate
from trimtab.feedback.store import add_guideline, verify
from trimtab.feedback.votes import cast_votes


def votes(store, **more):
    with store.read() as connection:
        return list(cast_votes(connection, **more))


def test_a_pair_from_the_invitation_to_the_vote(small: Make):
    store = small({"task": {"scale": 4}})
    add(store, 1)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    token = ann.lease()
    shown = ann.replies()
    response = ann.post(f"/task/{token}", position="4", rationale="it answers", seconds="0")
    assert response.status_code == 200
    (cast,) = votes(store)
    chosen = cast.replies["AB".index(cast.answer.choice)]["text"]
    assert (chosen, cast.answer.strength, cast.answer.rationale) == (shown[1], 2, "it answers")
    assert "nothing left for you" in ann.text


def test_the_back_button_and_a_second_tab_give_one_vote(small: Make):
    store = small()
    add(store, 2)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    token = ann.lease()
    csrf = ann.csrf()
    ann.post(f"/task/{token}", position="1")
    second = ann.post(f"/task/{token}", csrf, position="2")  # the same page, sent again with another answer
    assert second.status_code == 409
    assert "that answer stands" in second.text
    assert len(votes(store)) == 1


def test_undo_shows_the_same_task_with_the_answer(small: Make):
    store = small()
    add(store, 2)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    first = ann.lease()
    shown = ann.replies()
    ann.post(f"/task/{first}", position="2")
    ann.post("/undo")
    assert ann.replies() == shown
    assert re.search(r'name="position" value="2"[^>]*aria-pressed="true"', ann.text)
    assert votes(store) == []
    ann.post(f"/task/{ann.lease()}", position="1")
    assert len(votes(store)) == 1
    assert verify(store) == []


def test_one_can_change_ones_own_answer_and_nobody_elses(small: Make):
    store = small()
    add(store, 1)
    ann, bob = Browser(store), None
    ann.join("Ann")
    ann.read_guideline()
    ann.post(f"/task/{ann.lease()}", position="1")
    (cast,) = votes(store)
    bob = Browser(store, ann.app)
    bob.join("Bob")
    assert bob.post(f"/mine/{cast.id}").status_code == 422
    ann.get("/mine")
    ann.post(f"/mine/{cast.id}")
    ann.post(f"/task/{ann.lease()}", position="2")
    (after,) = votes(store)
    assert after.answer.choice != cast.answer.choice


def test_a_ranking_with_ties_comes_back_in_the_order_it_was_given(small: Make):
    store = small({"task": {"kind": "ranking"}})
    add(store, 1, kind="ranking", num=4)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    token = ann.lease()
    shown = ann.replies()
    ann.post(f"/task/{token}", rank_0="3", rank_1="1", rank_2="1", rank_3="2")
    (cast,) = votes(store)
    said = [{cast.replies[place]["text"] for place in tier} for tier in cast.answer.ranking]
    assert said == [{shown[1], shown[2]}, {shown[3]}, {shown[0]}]


def test_ratings_steps_and_texts(small: Make):
    def answered(kind, fields, num=1, **task):
        store = small({"task": {"kind": kind, **task}})
        add(store, 1, kind=kind, num=num)
        ann = Browser(store)
        ann.join("Ann")
        ann.read_guideline()
        response = ann.post(f"/task/{ann.lease()}", **fields)
        assert response.status_code == 200, response.text
        return votes(store)[0].answer

    assert answered("rating", {"rating": "6", "flag": "rude"}, rating_scale=7, flags=["rude"]).rating == 6
    steps = {"step_0": "right", "step_1": "wrong", "step_2": ""}
    assert answered("steps", steps, num=3).steps == (1, -1, None)
    assert answered("demonstration", {"text": "So it is."}, num=0).text == "So it is."
    assert answered("edit", {"text": "Better."}).text == "Better."
    assert answered("pairs", {"choice": "both_bad"}, num=2).choice == "both_bad"
    assert answered("pairs", {"choice": "cannot_judge"}, num=2).choice == "cannot_judge"
    answer = answered("pairs", {"position": "1", "criterion_0": "same"}, num=2, criteria=["honest"])
    assert answer.criteria == {"honest": "tie"}


def test_an_incomplete_answer_is_refused_in_words_and_nothing_is_lost(small: Make):
    store = small({"task": {"rationale": "required"}})
    add(store, 1)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    response = ann.post(f"/task/{ann.lease()}", position="1")
    assert response.status_code == 422
    assert "say in a few words why" in ann.text
    assert votes(store) == []


def test_a_draft_is_there_on_another_machine(small: Make):
    store = small()
    add(store, 2)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    token = ann.lease()
    assert ann.post(f"/draft/{token}", rationale="half a thought", seconds="12.5").status_code == 204
    elsewhere = Browser(store, ann.app)
    elsewhere.get("/sign-in")
    elsewhere.post("/sign-in", name="Ann", password="a long enough phrase")
    assert elsewhere.lease() == token
    assert "half a thought" in elsewhere.text
    assert 'name="seconds" value="12.5"' in elsewhere.text


def test_skipping_frees_the_item_for_others_and_flags_are_kept(small: Make):
    store = small()
    add(store, 1)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    ann.post(f"/task/{ann.lease()}", choice="skip", reason="not my language", flag="flagged")
    assert "nothing left" in ann.text
    bob = Browser(store, ann.app)
    bob.join("Bob")
    bob.read_guideline()
    bob.post(f"/task/{bob.lease()}", position="1")
    boss = Browser(store, ann.app)
    boss.join("Boss", "admin")
    boss.get("/admin/adjudicate")
    assert "flagged" in boss.text
    assert verify(store) == []


def test_a_new_guideline_is_read_before_the_next_task(small: Make):
    store = small()
    add(store, 1)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    ann.lease()
    with store.write() as connection:
        add_guideline(connection, store.now(), None, "# Anew\n\nBe strict.")
    ann.get("/task")
    assert "has changed" in ann.text
    assert "Be strict." in ann.text
    ann.read_guideline()
    ann.post(f"/task/{ann.lease()}", position="1")
    assert votes(store)[0].guideline_version == 2


def test_the_quiz_lets_in_who_agrees_and_nobody_else(small: Make):
    store = small({"qualification": {"questions": 2, "pass_mark": 1.0}})
    quiz = [item(i, purpose="quiz", gold={"choice": "A", "why": "it is right"}) for i in (100, 101)]
    items.add_items(store, [("quiz", q) for q in quiz])
    add(store, 1)

    def take(name: str, right: bool) -> Browser:
        someone = Browser(store)
        someone.join(name)
        someone.read_guideline()
        for _ in range(2):
            token = someone.lease()
            a_first = someone.replies()[0].endswith(".0")
            someone.post(f"/task/{token}", position="1" if a_first == right else "2")
            assert ("As expected" in someone.text) == right
            assert "it is right" in someone.text
        someone.get("/task")
        return someone

    assert "differed too often" in take("Bob", right=False).text
    assert "/task/" in take("Ann", right=True).text


def test_the_content_warning_and_opting_out(small: Make):
    store = small({"task": {"content_warning": "Some texts are cruel."}})
    add(store, 1, sensitive=True)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    assert "Some texts are cruel." in ann.text
    ann.post("/warned", choice="out")
    assert "nothing left" in ann.text


def test_own_keys_may_not_collide(small: Make):
    store = small()
    add(store, 1)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    ann.get("/account")
    keys = dict(re.findall(r'<input name="(\w+)" value="(.)" maxlength="1"', ann.text))
    assert ann.post("/account/keys", **{**keys, "tie": "1"}).status_code == 422
    assert "is used for" in ann.text
    assert ann.post("/account/keys", **{**keys, "tie": "ä"}).status_code == 200
    ann.get("/task")
    assert 'data-key="ä"' in ann.text


def test_nothing_on_the_page_tells_who_wrote_a_reply(small: Make):
    store = small()
    add(store, 1, scores={"secret-rm": [3.25, -7.5]}, slice="slice-x", author="author-y")
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    page = ann.get("/task")
    said = page.text + str(page.headers)
    for secret in ("model-0", "model-1", "secret-rm", "3.25", "-7.5", "slice-x", "author-y", "propensity"):
        assert secret not in said
    with store.read() as connection:
        (row,) = items.search_items(connection, limit=1)
    assert all(reply["sha256"] not in said for reply in row.replies)
    assert row.sha256 not in said


def test_admins_adjudicate_ban_and_export(small: Make):
    store = small({"assignment": {"overlap": 2}})
    add(store, 1)
    app = None
    for name, position in (("Ann", None), ("Bob", None)):
        someone = Browser(store, app)
        app = someone.app
        someone.join(name)
        someone.read_guideline()
        token = someone.lease()
        want_a = name == "Ann"
        a_first = someone.replies()[0].endswith(".0")
        assert position is None
        someone.post(f"/task/{token}", position="1" if want_a == a_first else "2")
    boss = Browser(store, app)
    boss.join("Boss", "admin")
    assert boss.get("/admin").status_code == 200
    boss.get("/admin/adjudicate/1")
    assert "2 answers" in boss.text
    key = re.search(r'name="key" value="([^"]+)"', boss.text)
    assert key
    response = boss.post("/admin/adjudicate/1", key=key[1], position="1", taxonomy="matter of taste", reason="close")
    assert response.status_code == 200
    assert "Nobody disagrees" in boss.text
    (decision,) = votes(store, purposes=("adjudication",))
    assert decision.answer.taxonomy == "matter of taste"
    file = boss.get("/admin/export/file?layout=preference")
    assert file.json()["chosen"].endswith("0" if decision.answer.choice == "A" else "1")
    assert "attachment" in file.headers["content-disposition"]
    boss.get("/admin/people")
    boss.post("/admin/people/1/state", state="banned")
    assert [v.annotator for v in votes(store)] == ["Bob"]
    boss.get("/admin/log")
    boss.post("/admin/log/verify")
    assert "Nothing was changed" in boss.text
    boss.post("/admin/guideline", text="# New")
    boss.post("/admin/invites", role="annotator", uses="3", hours="24")
    assert "/join#" in boss.text
    boss.post("/admin/people/2/delete", name="Bob")
    assert "deleted-2" in boss.text
    boss.post("/admin/queue", open="0")
    assert "Go on with the project" in boss.get("/admin").text


def test_a_banned_person_is_signed_out(small: Make):
    store = small()
    add(store, 1)
    ann = Browser(store)
    someone = ann.join("Ann")
    people.set_state(store, someone.id, "banned")
    assert "Sign in" in ann.get("/task").text
    person(store, "other")
    ann.get("/sign-in")
    assert ann.post("/sign-in", name="Ann", password="a long enough phrase").status_code == 422


def test_texts_begin_on_the_side_of_their_script(small: Make):
    store = small()
    add(store, 1)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    ann.get("/task")
    texts = re.findall(r'<(?:div|pre) class="(?:body )?(?:prose|source|diff)[^>]*>|<textarea[^>]*>', ann.text)
    assert len(texts) > 6
    assert all('dir="auto"' in tag for tag in texts)


def test_every_answer_can_be_reached_to_be_changed(small: Make, monkeypatch):
    monkeypatch.setattr(annotate, "_PAGE", 3)
    store = small()
    add(store, 7)
    ann = Browser(store)
    ann.join("Ann")
    ann.read_guideline()
    for _ in range(7):
        ann.post(f"/task/{ann.lease()}", position="1")
    found, path = [], "/mine"
    while path:
        text = ann.get(path).text
        found += re.findall(r'action="/mine/(\d+)"', text)
        older = re.search(r'href="(/mine\?before=\d+)"', text)
        path = older[1] if older else ""
    assert sorted(map(int, found)) == [vote.id for vote in votes(store)]
    assert ann.get("/mine").text.count("7 answers, 7 in the last 24 hours") == 1


def test_the_quiz_says_what_was_expected_of_every_kind(tmp_path):
    asked = {
        "rating": ({"rating": 5}, 1, {"rating": "1"}, "5"),
        "ranking": ({"ranking": [[1], [0]]}, 2, None, " > "),
        "steps": ({"steps": [1, -1]}, 2, {"step_0": "wrong", "step_1": "right"}, "step 2 is the first wrong one"),
    }
    for kind, (gold, num, answer, said) in asked.items():
        folder = tmp_path / kind
        folder.mkdir()
        scale = {"rating_scale": 7} if kind == "rating" else {}
        store = make_store(folder, {"task": {"kind": kind, **scale}, "qualification": {"questions": 1}})
        items.add_items(store, [("quiz", item(1, kind=kind, num=num, purpose="quiz", gold={**gold, "points": 7}))])
        ann = Browser(store)
        ann.join("Ann")
        ann.read_guideline()
        token = ann.lease()
        if answer is None:  # the other way round
            first = ann.replies()[0].endswith(".0")
            answer = {"rank_0": "1" if first else "2", "rank_1": "2" if first else "1"}
        ann.post(f"/task/{token}", **answer)
        assert "Not as expected" in ann.text
        assert re.search(r"The expected answer was: [^<]*" + said, unescape(ann.text))
        store.close()


def test_the_list_of_disagreements_speaks_of_the_sides_that_its_pages_show(small: Make):
    store = small({"assignment": {"overlap": 3}})
    add(store, 12)
    for name, choice in (("Ann", "A"), ("Bob", "A"), ("Eve", "B")):
        someone = person(store, name)
        while answer_next(store, someone, Answer(choice=choice, strength=1)) is not None:
            pass
    boss = Browser(store)
    boss.join("Boss", "adjudicator")
    text = boss.get("/admin/adjudicate").text
    listed = re.findall(r"<td>(left|right) × 2, (left|right) × 1.*?/admin/adjudicate/(\d+)", text, re.S)
    assert len(listed) == 12
    assert {two for two, _, _ in listed} == {"left", "right"}
    for two, _, number in listed:
        page = boss.get(f"/admin/adjudicate/{number}").text
        assert boss.replies()[two == "right"].endswith(".0")  # the reply A
        assert re.search(rf"<strong>Ann</strong>:\s*{two}, strength 1", page)


def test_a_decision_has_one_answer(small: Make):
    """Of radio buttons in two groups, both can stay chosen."""
    store = small({"task": {"scale": 4}})
    add(store, 2)
    boss = Browser(store)
    boss.join("Boss", "admin")
    for number, position in ((1, "tie"), (2, "both_bad")):
        text = boss.get(f"/admin/adjudicate/{number}").text
        names = set(re.findall(r'<input type="radio" name="(\w+)" value="(?:\d|tie|both_bad)"', text))
        assert names == {"position"}
        key = re.search(r'name="key" value="([^"]+)"', text)
        assert key
        sent = boss.post(f"/admin/adjudicate/{number}", position=position, taxonomy="bad data", key=key[1])
        assert sent.status_code == 200
    assert [v.answer.choice for v in votes(store, purposes=("adjudication",))] == ["tie", "both_bad"]


def test_flags_of_somebody_who_was_banned_fill_no_list(small: Make):
    store = small({"task": {"flags": ["rude"]}})
    add(store, 2)
    ann = person(store, "Ann")
    answer_next(store, ann, Answer(choice="A", strength=1, flags=("rude",)))
    boss = Browser(store)
    boss.join("Boss", "admin")
    assert "flagged</span>" in boss.get("/admin/adjudicate").text
    people.set_state(store, ann.id, "banned")
    assert "Nobody disagrees" in boss.get("/admin/adjudicate").text


def test_every_page_has_a_title_and_a_heading_of_its_own(small: Make):
    store = small()
    add(store, 2)
    boss = Browser(store)
    boss.join("Boss", "admin")
    pages = ["/guideline", "/mine", "/account", "/admin", "/admin/adjudicate", "/admin/adjudicate/1", "/admin/people"]
    pages += ["/admin/export", "/admin/log", "/nowhere"]
    boss.read_guideline()
    titles = set()
    for path in ["/task", *pages]:
        text = boss.get(path).text
        title = re.search(r"<title>(.+) · Test</title>", text)
        assert title, path
        titles.add(title[1])
        assert "<h1" in text, path
        assert not re.search(r"<th[^>]*></th>", text), path
    assert len(titles) == len(pages) + 1
