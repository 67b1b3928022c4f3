"""A small client of the REST interface: the standard library and nothing else."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from trimtab.core.errors import EngineError


@dataclass(frozen=True)
class Client:
    """A client of one server, which acts as the person of a token.

    client = Client("http://127.0.0.1:8765", token)
    client.add_items([{"prompt": "…", "responses": ["…", "…"]}])
    client.export("preference")["rows"]
    """

    url: str
    token: str
    timeout_seconds: float = 30.0
    attempts: int = 4
    """Tries of each request. Answers may be sent again: the server stores each once."""

    def next_task(self) -> dict[str, Any] | None:
        """The current task or the next one; None if there is none."""
        return cast("dict[str, Any] | None", self._call("GET", "next")["task"])

    def answer(self, token: str, **fields: str | Sequence[str]) -> dict[str, Any]:
        """Answers a task with the fields of its form, such as position="1"."""
        body = {"fields": {k: v if isinstance(v, str) else list(v) for k, v in fields.items()}}
        return cast("dict[str, Any]", self._call("POST", f"tasks/{token}", body))

    def add_items(self, rows: Sequence[Mapping[str, Any]], *, purpose: str = "task") -> dict[str, int]:
        """Adds items of the given rows; returns counts."""
        body = {"rows": [dict(row) for row in rows], "purpose": purpose}
        return cast("dict[str, int]", self._call("POST", "items", body))

    def set_scores(self, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> int:
        """Sets reward-model scores by the items' hashes; returns how many items had some."""
        return int(self._call("PUT", "scores", {"scores": scores})["items"])

    def votes(self, after: int = 0) -> list[dict[str, Any]]:
        """All votes given after the one with this id, read page by page."""
        found: list[dict[str, Any]] = []
        while page := cast("list[dict[str, Any]]", self._call("GET", f"votes?after={after}")):
            found += page
            after = page[-1]["id"]
        return found

    def export(self, layout: str, split: str = "all") -> dict[str, Any]:
        """Rows and card of a layout."""
        return cast("dict[str, Any]", self._call("GET", f"export/{layout}?split={urllib.parse.quote(split)}"))

    def board(self) -> dict[str, Any]:
        """The live board as numbers."""
        return cast("dict[str, Any]", self._call("GET", "board"))

    def invite(self, role: str = "annotator", uses: int = 1) -> str:
        """The token of a new invitation."""
        return str(self._call("POST", "invites", {"role": role, "uses": uses})["token"])

    def set_state(self, person: int, state: str) -> None:
        """Sets somebody's state: active, paused or banned."""
        self._call("PUT", f"people/{person}/state", {"state": state})

    def verify(self, head: str | None = None) -> dict[str, Any]:
        """Problems of the audit log, and its head."""
        query = f"?head={urllib.parse.quote(head)}" if head else ""
        return cast("dict[str, Any]", self._call("POST", f"audit/verify{query}"))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that the server answers with; None if it is empty. Raises EngineError with what the server said."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        url = f"{self.url.rstrip('/')}/api/v1/{path}"
        problem = ""
        for attempt in range(self.attempts):
            request = urllib.request.Request(url, data=data, headers=headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                    text = response.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                problem = f"{error.code}: {error.read().decode(errors='replace')[:300]}"
                if error.code not in (429, 500, 502, 503):
                    break
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < self.attempts:
                time.sleep(0.5 * 2**attempt)
        raise EngineError(f"the server said {problem}", where=url, fix="check the address, the token and its role")
