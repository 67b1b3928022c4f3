"""Texts of strangers: on a page they are text, in a table no formula, and none holds anything up."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.feedback.browsing import Browser
from tests.feedback.conftest import Make
from trimtab.core.types import Message, Prompt
from trimtab.feedback import items
from trimtab.feedback.exporting import to_bytes
from trimtab.feedback.server.app import create_app
from trimtab.feedback.server.rendering import render

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><animate onbegin=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=alert(1)></style></mglyph></math>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href=javascript:alert(1)>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&#58;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "![x](https://evil.example/track.png)",
    '![x" onerror="alert(1)](x)',
    '[x]: javascript:alert(1) "t"\n\n[x]',
    "<javascript:alert(1)>",
    '<https://evil.example/"onmouseover=alert(1)>',
    "```html\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\ncode\n```',
    "`<img src=x onerror=alert(1)>`",
    "$\\href{javascript:alert(1)}{x}$",
    "$\\text{<img src=x onerror=alert(1)>}$",
    "$\\text{</mtext></math><script>alert(1)</script>}$",
    "$$\\unicode{60}script\\unicode{62}alert(1)$$",
    "$\\style{background:url(//evil.example)}{x}$ $\\class{x}{y}$ $\\def\\a{\\a}\\a$",
    '$\\color{red"onmouseover="alert(1)}{x}$',
    "$" + "{" * 2000 + "$",
    "$" + "\\frac{1}{" * 25 + "}" * 25 + "$",
    "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7 %>",
    "<style>body{display:none}</style>",
    "<form action=//evil.example><button formaction=javascript:alert(1)>x</button></form>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "</textarea></pre></div></article><script>alert(1)</script>",
    "<!--><script>alert(1)</script>-->",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<div hx-get=/admin/export hx-trigger=load></div>",
    "<div data-hx-post=/undo></div> <button data-key=1 name=position value=1>",
    "\u202egnp.exe \u2066hidden\u2069 zero\u200bwidth",
    ">" * 400 + "x",
    "*" * 3000,
    "[" * 1500,
    "| a |\n" + "|-" * 300,
]


class Seen(HTMLParser):
    """What a browser would find in a text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def seen(html: str) -> Seen:
    parser = Seen()
    parser.feed(html)
    return parser


def harmless(html: str) -> None:
    found = seen(html)
    assert not found.tags & {"script", "style", "iframe", "svg", "img", "a", "form", "button", "input", "meta", "base"}
    names = {name for name, _ in found.attributes}
    assert not {n for n in names if n.startswith(("on", "hx-", "data-")) or n in ("href", "src", "style", "id", "name")}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_text_becomes_text(text: str):
    harmless(str(render(text)))


@given(st.text(alphabet=st.sampled_from(list("<>/\"'=`$[]()!&;:\\{}#*_|~- \nscriptonhref")), max_size=200))
def test_no_text_becomes_markup_that_does_anything(text: str):
    harmless(str(render(text)))


def test_hostile_texts_in_every_place_do_nothing_on_any_page(small: Make):
    store = small({"assignment": {"overlap": 2}, "server": {"requests_per_minute": 100000}})
    app = create_app(store)
    new = []
    for text in HOSTILE[:30]:
        replies = (items.NewReply(text=text), items.NewReply(text=f"{text} again"))
        turns = (Message("user", text), Message("assistant", text * 20), Message("user", text))
        new.append(
            ("row", items.NewItem(kind="pairs", prompt=Prompt(messages=turns), replies=replies, slice=text[:50]))
        )
    items.add_items(store, new)
    for name in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'):
        ann = Browser(store, app)
        ann.join(name)
        ann.read_guideline()
        for number in range(30):
            token = ann.lease()
            clean_page(ann.text)
            ann.post(
                f"/task/{token}", position=str(1 + number % 2), rationale=HOSTILE[number], seconds="1", flag="flagged"
            )
        ann.get("/mine")
        clean_page(ann.text)
    boss = Browser(store, app)
    boss.join("Boss", "admin")
    paths = ["/admin", "/admin/adjudicate", "/admin/people", "/admin/log", "/account"]
    for path in [*paths, *(f"/admin/adjudicate/{i}" for i in range(1, 31))]:
        assert boss.get(path).status_code == 200
        clean_page(boss.text)


def clean_page(text: str) -> None:
    found = seen(text)
    scripts = re.findall(r"<script[^>]*>", text)
    assert set(scripts) <= {'<script src="/static/htmx.min.js" defer>', '<script src="/static/app.js" defer>'}
    assert not found.tags & {"style", "iframe", "img", "base", "object", "embed"}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert not [v for n, v in found.attributes if n in ("href", "src", "action") and v and not v.startswith(("/", "#"))]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\r=1", "  =HYPERLINK(1)"])
def test_a_cell_is_no_formula(text: str):
    content = to_bytes([{"prompt": text, text: 1}], "x.csv").decode()
    assert f"'{text}" in content
    import csv
    import io

    for row in csv.reader(io.StringIO(content)):
        assert not any(cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(["|" * 200 + "\n" + "|-" * 200 + "|\n" + "|\n" * 330] * 6),
        "> " + "|" * 200 + "\n> " + "|-" * 200 + "|\n" + "> |\n" * 2000,
        "```php\n<?php " + "$" * 9_000 + "\n```",
        "```php\n<?php " + "$" * 4_500 + "\n```\n\n```php\n<?php " + "$" * 4_500 + "\n```",
    ],
)
def test_no_text_holds_up_every_page(text: str):
    began = time.process_time()
    shown = render(text)
    assert time.process_time() - began < 1.5
    assert len(shown) < 200_000


def test_tables_and_code_of_usual_size_are_drawn():
    table = render("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 50)
    assert table.count("<tr>") == 51
    assert 'class="c-k' in render("```python\ndef f(x):\n    return x\n```")
