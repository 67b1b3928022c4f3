"""A person with a browser that runs no scripts: pages and forms, as every page must work without them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from fastapi.testclient import TestClient

from tests.feedback.projects import PASSWORD
from trimtab.feedback import people
from trimtab.feedback.server.app import create_app
from trimtab.feedback.store import Store


class Browser:
    """One person's browser."""

    def __init__(self, store: Store, app: Any = None) -> None:
        self.store = store
        self.app = app or create_app(store)
        self.client = TestClient(self.app, follow_redirects=True)
        self.text = ""

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        self.text = response.text
        return response

    def post(self, path: str, _csrf: str | None = None, **fields: Any) -> Any:
        token = self.csrf() if _csrf is None else _csrf
        response = self.client.post(path, data={"csrf": token, **fields})
        self.text = response.text
        return response

    def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([0-9a-f]+)"', self.text)
        if not found:
            found = re.search(r'name="csrf" value="([0-9a-f]+)"', self.client.get("/sign-in").text)
        assert found
        return found[1]

    def join(self, name: str, role: people.PersonRole = "annotator") -> people.Person:
        token = people.make_invite(self.store, role)
        self.get("/join")
        response = self.post("/join", token=token, name=name, password=PASSWORD)
        assert response.status_code == 200, response.text
        with self.store.read() as connection:
            person = people.by_name(connection, name)
        assert person is not None
        return person

    def read_guideline(self) -> None:
        self.get("/task")
        version = re.search(r'name="version" value="(\d+)"', self.text)
        if version:
            self.post("/guideline/read", version=version[1])

    def lease(self) -> str:
        self.get("/task")
        found = re.search(r'action="/task/([^"]+)"', self.text)
        assert found, self.text
        return found[1]

    def replies(self) -> list[str]:
        """As they are shown."""
        return [unescape(text) for text in re.findall(r'<pre class="body source"[^>]*>(.*?)</pre>', self.text, re.S)]
