"""A real browser on a real server: the task by keyboard alone, undo, tabs, networks that fail, admins, hostile texts.

With TRIMTAB_SCREENSHOTS=docs/evidence/feedback the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.feedback.at_a_browser import PICTURES, Person, votes
from tests.feedback.conftest import Start
from tests.feedback.projects import PASSWORD, item
from tests.feedback.running import Running
from tests.feedback.test_hostile_texts import HOSTILE
from trimtab.core.types import Message, Prompt
from trimtab.feedback import items, people
from trimtab.feedback.simulate import simulate
from trimtab.feedback.store import open_store
from trimtab.feedback.votes import cast_votes

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cheap_passwords() -> None:
    """Not here: the server hashes as it does for everyone, and the store of a test must agree with it."""


def test_ten_pairs_with_the_keyboard_alone(browser, start: Start):
    server = start({"name": "Help desk replies", "task": {"scale": 4, "question": "Which reply would you rather get?"}})
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.picture("guideline")
    ann.begin()
    ann.picture("pair-light")
    wanted = []
    for key in ("1", "2", "3", "4", "t", "b", "c", "1", "4", "3"):
        left, right = ann.shown()
        wanted.append((key, left, right))
        ann.answer(key)
    ann.press("d")
    ann.picture("differences")
    ann.press("d", "?")
    ann.picture("keys")
    ann.press("Escape")
    found = votes(server)
    assert len(found) == 10
    for cast, (key, left, right) in zip(found, wanted, strict=True):
        texts = {"A": cast.replies[0]["text"], "B": cast.replies[1]["text"]}
        other = "B" if cast.shown_left == "A" else "A"
        assert (texts[cast.shown_left], texts[other]) == (left, right)
        said = {"t": ("tie", None), "b": ("both_bad", None), "c": ("cannot_judge", None)}
        side = {"1": (left, 2), "2": (left, 1), "3": (right, 1), "4": (right, 2)}
        if key in side:
            assert (texts[cast.answer.choice], cast.answer.strength) == side[key]
        else:
            assert (cast.answer.choice, cast.answer.strength) == said[key]
        assert cast.answer.seconds is not None
    assert ann.wrong == []
    assert ann.elsewhere == []


def test_every_answer_can_be_clicked(browser, start: Start):
    server = start({"task": {"scale": 4}})
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    for button in ("[value='4']", "[value=tie]", "[value=both_bad]", "[value=cannot_judge]"):
        before = ann.token()
        ann.page.click(f"#task button{button}")
        ann.page.wait_for_selector(f"#task:not([action='{before}'])")
    before = ann.token()
    ann.page.click("text=Skip >> nth=0")
    ann.page.click("[data-skip=upsetting]")
    ann.page.wait_for_selector(f"#task:not([action='{before}'])")
    ann.page.click("text=Undo")
    ann.page.wait_for_selector("#task[action]")
    said = [(c.answer.choice, c.answer.strength) for c in votes(server)]
    assert said[0][1] == 2
    assert [choice for choice, _ in said[1:]] == ["tie", "both_bad", "cannot_judge"]
    assert ann.wrong == []


def test_a_reason_a_skip_and_an_undo_by_keyboard(browser, start: Start):
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    ann.press("r")
    ann.page.keyboard.type("1 is a digit in a reason")
    ann.press("Escape")
    first = ann.shown()
    ann.answer("2")
    ann.press("s")
    ann.answer("2")
    assert [c.answer.rationale for c in votes(server)] == ["1 is a digit in a reason"]
    ann.answer("u")  # takes back the skip
    ann.answer("u")  # and the answer
    assert ann.shown() == first
    assert ann.page.input_value("textarea[name=rationale]") == "1 is a digit in a reason"
    assert votes(server) == []
    ann.answer("1")
    (cast,) = votes(server)
    assert cast.replies["AB".index(cast.answer.choice)]["text"] == first[0]
    assert ann.wrong == []


def test_a_ranking_with_a_tie_by_keyboard(browser, start: Start):
    server = start({"task": {"kind": "ranking"}}, [item(i, kind="ranking", num=4) for i in range(2)])
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    shown = ann.shown()
    ann.press("3", "1", "Backspace", "4", "t", "1", "2")  # 3, then 4 and 1 alike, then 2
    assert ann.page.inner_text("#ranking") == "3 > 4 = 1 > 2"
    ann.picture("ranking")
    ann.answer("Enter")
    (cast,) = votes(server)
    said = [{cast.replies[place]["text"] for place in tier} for tier in cast.answer.ranking]
    assert said == [{shown[2]}, {shown[3], shown[0]}, {shown[1]}]


def test_steps_by_keyboard_with_the_first_error(browser, start: Start):
    server = start({"task": {"kind": "steps"}}, [item(i, kind="steps", num=4) for i in range(2)])
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    ann.press("3", "2", "x")
    ann.picture("steps")
    ann.answer("Enter")
    assert [c.answer.steps for c in votes(server)] == [(1, 0, -1, None)]


def test_writing_by_keyboard(browser, start: Start):
    server = start({"task": {"kind": "demonstration"}}, [item(i, kind="demonstration", num=0) for i in range(2)])
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    ann.page.keyboard.type("Thank you. 1, 2, 3: it is done.")
    ann.press("Escape")
    ann.answer("Enter")
    assert [c.answer.text for c in votes(server)] == ["Thank you. 1, 2, 3: it is done."]


def test_two_tabs_and_the_back_button_give_one_vote(browser, start: Start):
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    other = ann.context.new_page()
    other.goto(f"{server.address}/task")
    assert other.get_attribute("#task", "action") == ann.token()
    first = ann.token()
    ann.answer("1")
    other.keyboard.press("2")
    other.wait_for_selector("text=that answer stands")  # another answer than the first is not dropped without a word
    other.keyboard.press("Enter")
    other.wait_for_selector(f"#task:not([action='{first}'])")
    assert len(votes(server)) == 1
    before = ann.token()
    ann.page.go_back()
    ann.page.wait_for_selector("#task")
    assert ann.token() == before  # what was answered is not asked again
    ann.answer("2")
    assert len(votes(server)) == 2


def test_a_lost_network_loses_no_answer(browser, start: Start):
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    ann.context.set_offline(True)
    before = ann.token()
    ann.press("1", "1")
    ann.page.wait_for_selector("#offline:not([hidden])")
    assert "Not saved yet" in ann.page.inner_text("#offline")
    assert votes(server) == []
    ann.context.set_offline(False)
    ann.page.wait_for_selector(f"#task:not([action='{before}'])", timeout=20000)
    assert len(votes(server)) == 1


def test_a_killed_server_loses_no_answer(browser, start: Start):
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    ann.answer("1")
    before = ann.token()
    server.kill()
    ann.press("2")
    ann.page.wait_for_selector("#offline:not([hidden])")
    again = Running(server.project, server.port)
    ann.page.wait_for_selector(f"#task:not([action='{before}'])", timeout=20000)
    assert len(votes(server)) == 2
    again.stop()


def test_one_goes_on_at_another_machine(browser, start: Start):
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    token = ann.token()
    with ann.page.expect_response("**/draft/**"):
        ann.press("r")
        ann.page.keyboard.type("half a thought")
    elsewhere = Person(browser, server)
    elsewhere.page.goto(f"{server.address}/sign-in")
    elsewhere.page.keyboard.type("Ann")
    elsewhere.press("Tab")
    elsewhere.page.keyboard.type(PASSWORD)
    elsewhere.press("Enter")
    elsewhere.page.wait_for_selector("#task")
    assert elsewhere.token() == token
    assert elsewhere.page.input_value("textarea[name=rationale]") == "half a thought"


def test_own_keys_and_views_stay(browser, start: Start):
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    with ann.page.expect_response("**/account/view"):
        ann.press("v")
    ann.page.goto(f"{server.address}/account")
    ann.page.fill("input[name=tie]", "z")
    ann.page.click("text=Keep these keys")
    ann.page.wait_for_selector("input[name=tie][value=z]")
    ann.page.goto(f"{server.address}/task")
    assert "stacked" in ann.page.get_attribute("#replies", "class")
    ann.answer("z")
    assert [c.answer.choice for c in votes(server)] == ["tie"]


def test_the_way_of_an_admin(browser, start: Start):
    server = start({"name": "Help desk replies", "task": {"scale": 4}, "assignment": {"overlap": 3}})
    store = open_store(server.project)
    simulate(store, num_annotators=8, agreement=0.68)
    store.close()
    boss = Person(browser, server)
    boss.join(server.links[0], "Boss")
    boss.page.set_viewport_size({"width": 1280, "height": 1250})
    boss.picture("board-light")
    boss.page.click("text=Adjudicate")
    boss.page.click("text=Decide >> nth=0")
    boss.page.wait_for_selector("select[name=taxonomy]")
    boss.picture("adjudicate")
    boss.page.keyboard.press("1")
    boss.page.select_option("select[name=taxonomy]", "annotator error")
    boss.page.click("button:has-text('Decide')")
    boss.page.wait_for_selector("h1:has-text('Adjudicate')")
    assert [c.answer.taxonomy for c in votes(server, purposes=("adjudication",))] == ["annotator error"]
    boss.page.click("nav >> text=People")
    boss.page.click("text=Make a link")
    link = boss.page.inner_text("#link")
    boss.page.click("tr:has-text('simulated 1') >> text=Ban >> nth=0")
    boss.page.wait_for_selector(".chip:has-text('banned')")
    assert "simulated 1" not in {c.annotator for c in votes(server)}
    bob = Person(browser, server)
    bob.join(link, "Bob")
    bob.begin()
    bob.answer("1")
    boss.page.click("nav >> text=Log")
    boss.page.click("text=Check every hash")
    boss.page.wait_for_selector("text=Nothing was changed")
    boss.page.click("nav >> text=Export")
    with boss.page.expect_download() as download:
        boss.page.click("text=Download")
    assert download.value.suggested_filename == "preference-all.jsonl"
    assert boss.wrong == []
    dark = Person(browser, server, color_scheme="dark", storage_state=boss.context.storage_state())
    dark.page.set_viewport_size({"width": 1280, "height": 1250})
    dark.page.goto(f"{server.address}/admin")
    dark.picture("board-dark")


def test_phones_and_dark_rooms(browser, start: Start):
    server = start({"name": "Help desk replies", "task": {"scale": 4, "question": "Which reply would you rather get?"}})
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    state = ann.context.storage_state()
    dark = Person(browser, server, color_scheme="dark", storage_state=state)
    dark.page.goto(f"{server.address}/task")
    dark.picture("pair-dark")
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True,
            color_scheme=scheme, storage_state=state,
        )  # fmt: skip
        page = context.new_page()
        page.goto(f"{server.address}/task")
        wide = page.evaluate_handle("document.documentElement").get_property("scrollWidth").json_value()
        assert wide <= 390  # nothing runs out of the screen
        if PICTURES:
            page.screenshot(path=str(Path(PICTURES) / f"phone-{scheme}.png"))
        for button in page.query_selector_all(".pick"):
            assert button.bounding_box()["height"] >= 44  # a finger's width
        before = page.get_attribute("#task", "action")
        page.tap(".pick >> nth=0")
        page.wait_for_selector(f"#task:not([action='{before}'])")
        context.close()
    assert len(votes(server)) == 2


def test_colours_can_be_told_apart(browser, start: Start):
    """WCAG 2.1 AA: 4.5 to 1 for text, of the colours as they are computed."""
    server = start()
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    for scheme in ("light", "dark"):
        page = browser.new_context(color_scheme=scheme, storage_state=ann.context.storage_state()).new_page()
        page.goto(f"{server.address}/task")
        for selector in (
            "body",
            ".soft, .progress span",
            ".pick",
            "kbd",
            ".tools .plain",
            ".reply h2",
            "nav a",
            ".question",
        ):
            element = page.query_selector(selector)
            colour, back = element.evaluate(_COLOURS)
            assert contrast(colour, back) >= 4.5, (scheme, selector, colour, back)


_COLOURS = """e => {
  const back = x => { const c = getComputedStyle(x).backgroundColor;
    return c === 'rgba(0, 0, 0, 0)' ? (x.parentElement ? back(x.parentElement) : 'rgb(255, 255, 255)') : c; };
  return [getComputedStyle(e).color, back(e)];
}"""


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_field_and_button_has_a_name_and_focus_goes_in_order(browser, start: Start):
    server = start({"task": {"flags": ["rude"], "criteria": ["honest"]}})
    ann = Person(browser, server)
    ann.join(server.links[1], "Ann")
    ann.begin()
    for element in ann.page.query_selector_all("button, input:not([type=hidden]), textarea, select, summary, a"):
        name = element.evaluate("e => e.labels?.[0]?.innerText || e.ariaLabel || e.innerText || e.textContent")
        assert name.strip(), element.evaluate("e => e.outerHTML")
    places = []
    for _ in range(12):
        ann.press("Tab")
        box = ann.page.evaluate_handle("document.activeElement").as_element().bounding_box()
        places.append(box["y"])
    assert all(later >= earlier - 60 for earlier, later in itertools.pairwise(places)), places


def test_hostile_texts_do_nothing_in_a_browser(browser, start: Start):
    new = [
        items.NewItem(
            kind="pairs",
            prompt=Prompt(messages=(Message("user", text),), id=str(i)),
            replies=(items.NewReply(text=text), items.NewReply(text=f"{text} again")),
        )
        for i, text in enumerate(HOSTILE)
    ]
    server = start({"server": {"requests_per_minute": 10000}}, new)
    ann = Person(browser, server)
    ann.join(server.links[1], "<img src=x onerror=alert(1)>")
    ann.begin()
    for _ in HOSTILE:
        ann.press("d", "m", "m", "d")
        ann.answer("1")
    assert ann.wrong == []
    assert ann.elsewhere == []
    boss = Person(browser, server)
    boss.join(server.links[0], "Boss")
    for path in ("/admin", "/admin/people", "/admin/log", "/admin/adjudicate/3"):
        boss.page.goto(f"{server.address}{path}")
    assert boss.wrong == []
    assert boss.elsewhere == []


def test_nothing_that_crosses_the_network_tells_who_wrote_a_reply(browser, start: Start):
    secret = {"model": "secret-model-name", "checkpoint": "secret-checkpoint"}
    new = [
        items.NewItem(
            kind="pairs",
            prompt=Prompt(messages=(Message("user", f"q {i}"),)),
            replies=(items.NewReply(text=f"a {i}", source=secret), items.NewReply(text=f"b {i}", source=secret)),
            scores={"secret-rm": [123.5, -77.25]},
            slice="secret-slice",
        )
        for i in range(3)
    ]
    server = start(None, new)
    ann = Person(browser, server)
    bodies: list[str] = []
    ann.page.on("response", lambda r: bodies.append(str(r.headers) + (r.text() if r.status == 200 else "")))
    ann.join(server.links[1], "Ann")
    ann.begin()
    ann.answer("1")
    ann.page.goto(f"{server.address}/mine")
    said = "".join(bodies)
    assert "a 0" in said or "a 1" in said or "a 2" in said
    assert not [word for word in ("secret", "123.5", "77.25", "propensity") if word in said]


def test_a_new_user_gives_a_first_vote_after_two_commands(browser, tmp_path: Path, monkeypatch):
    """The second of the two commands; the first is pip install."""
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "feedback", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if " is at http" in line:
            break
    page = browser.new_context().new_page()
    page.goto(next(line for line in reversed(said) if "/join#" in line))
    page.keyboard.type("Ann")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=I have read it")
    page.keyboard.press("Enter")
    page.wait_for_selector("#task")
    before = page.get_attribute("#task", "action")
    page.keyboard.press("1")
    page.wait_for_selector(f"#task:not([action='{before}'])")
    assert time.monotonic() - began < 60
    process.send_signal(2)
    process.wait(timeout=20)
    process.stdout.close()
    store = open_store(tmp_path / "feedback" / "project.toml")
    with store.read() as connection:
        assert len(list(cast_votes(connection))) == 1
        assert len(people.everyone(connection)) == 1
    store.close()
