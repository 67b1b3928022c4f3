"""Somebody at a browser, and the votes of a server that was started for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.feedback.projects import PASSWORD
from tests.feedback.running import Running
from trimtab.feedback.store import open_store, verify
from trimtab.feedback.votes import cast_votes

PICTURES = os.environ.get("TRIMTAB_SCREENSHOTS")


class Person:
    """Somebody at a browser, who touches only the keyboard."""

    def __init__(self, browser: Any, server: Running, **context: Any) -> None:
        self.server = server
        self.context = browser.new_context(viewport={"width": 1280, "height": 860}, **context)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", lambda d: (self.wrong.append(f"dialog {d.message}"), d.dismiss()))
        self.elsewhere: list[str] = []
        self.page.on("request", lambda r: self._asked(r.url))

    def _asked(self, url: str) -> None:
        if not url.startswith((self.server.address, "data:")):
            self.elsewhere.append(url)

    def join(self, link: str, name: str) -> None:
        self.page.goto(link)
        assert "#" not in self.page.url  # the invitation is in the form and no longer in the address
        self.page.keyboard.type(name)
        self.page.keyboard.press("Tab")
        self.page.keyboard.type(PASSWORD)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("form[action='/guideline/read'], #board")

    def begin(self) -> None:
        self.page.keyboard.press("Enter")  # the guideline
        self.page.wait_for_selector("#task")

    def token(self) -> str:
        found: str = self.page.get_attribute("#task", "action")
        return found

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def answer(self, *keys: str) -> None:
        """Presses keys and waits for the next task, or the end."""
        before = self.token()
        self.press(*keys)
        self.page.wait_for_selector(f"#task:not([action='{before}']), .card.centred", timeout=20000)

    def shown(self) -> list[str]:
        return [e.text_content() for e in self.page.query_selector_all("pre.source")]

    def picture(self, name: str) -> None:
        if PICTURES:
            self.page.wait_for_timeout(150)
            self.page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def votes(server: Running, **more: Any) -> list[Any]:
    store = open_store(server.project)
    with store.read() as connection:
        found = list(cast_votes(connection, **more))
    problems = verify(store)
    store.close()
    assert problems == []
    return found
