"""Run directories of the shape that stages write, at any state, and a browser without scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from tests.reports.fabricate import online_metrics, rollout_samples, supervised_metrics, write_run
from trimtab.ui.app import create_app


def online_run(directory: Path, num_steps: int = 20, *, of: int = 40, **other: Any) -> Path:
    """An online run that has done some of its steps, and of which no process is there."""
    settings = f'num_steps = {of}\n[loss]\nname = "ppo"\n'
    metrics = online_metrics(num_steps, leash=True)
    files = {"samples": rollout_samples(num_steps), "settings": settings} | other
    return write_run(
        directory,
        stage="online",
        metrics=metrics,
        **files,
    )


def write_loop(directory: Path, *, rounds: int) -> Path:
    """A loop that has done its rounds of sampling and DPO, and has not begun its evaluation; the last round of two or
    more was killed."""
    directory.mkdir(parents=True)
    tables = []
    for number in range(1, rounds + 1):
        start = f"{directory}/dpo_{number - 1}/model" if number > 1 else "runs/sft/model"
        tables += [f'[stages.select_{number}]\nstage = "select"\n', f'[stages.dpo_{number}]\nstage = "preference"\n']
        sample = {"step": 0, "prompt": "Where is it?", "response": f"Here is reply {number}.", "reward": float(number)}
        write_run(directory / f"select_{number}", stage="select", samples=[sample], summary={"num_prompts": 4})
        summary = {"num_steps": 30} if number < rounds or rounds == 1 else None
        settings = f'model = "{start}"\nmax_steps = 30\n'
        metrics = supervised_metrics(30, 0.7, 0.3)
        write_run(directory / f"dpo_{number}", stage="preference", metrics=metrics, settings=settings, summary=summary)
    (directory / "pipeline.toml").write_text("".join([*tables, '[stages.evaluate]\nstage = "evaluate"\n']))
    return directory


def append(path: Path, *rows: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


class Reader:
    """Somebody who has opened the printed address in a browser without scripts."""

    def __init__(self, root: Path, *, key: bool = True) -> None:
        self.app = create_app(root)
        self.watch = self.app.state.watch
        self.client = TestClient(self.app, base_url="http://127.0.0.1:8790")
        if key:
            assert self.client.get(f"/enter?key={self.watch.key}").status_code == 200

    def text(self, path: str, **query: Any) -> str:
        response = self.client.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.text

    def stop(self, text: str, **other: str) -> Any:
        """Sends the form of a page, with other values if given."""
        fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', text)) | other
        return self.client.post("/stop", data=fields, follow_redirects=False)


def rows_of(text: str) -> dict[str, str]:
    """The rows of the list as plain text, by the name of the run or pipeline."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)[1:]:
        cells = [" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        found[cells[1]] = " | ".join(cells[2:])
    return found
