"""From `pip install` to the first vote, and from votes to a reward model: what a new user types, timed.

    python benchmarks/feedback_newcomer.py [--pip-argument=--find-links=wheels]

Makes an empty virtual environment and an empty folder. In them: `pip install 'trimtab[feedback]'` (of this checkout)
and `trimtab feedback serve`; the annotator's link is opened, a name given, the guideline read and the first pair
judged, over HTTP. Then the help desk's simulated annotators answer the rest, and `trimtab run reward.toml` (with this
checkout's interpreter, which has torch) trains the reward model. Writes docs/evidence/data/feedback_newcomer.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "evidence" / "data" / "feedback_newcomer.json"


def first_vote(link: str) -> int:
    """Joins by the link and judges the first pair; returns the pages it took."""
    address, _, token = link.partition("/join#")
    pages = 0
    with httpx.Client(base_url=address, follow_redirects=True, timeout=20) as client:
        text = client.get("/join").text

        def send(path: str, **fields: str) -> str:
            nonlocal pages
            csrf = re.search(r'name="csrf" value="(\w+)"', text)
            assert csrf, text
            pages += 1
            response = client.post(path, data={"csrf": csrf[1], **fields})
            response.raise_for_status()
            return response.text

        text = send("/join", token=token, name="Ann", password="correct horse battery")
        version = re.search(r'name="version" value="(\d+)"', text)
        assert version, "the guideline was not shown"
        text = send("/guideline/read", version=version[1])
        task = re.search(r'action="/task/([^"]+)"', text)
        assert task, "no task was given"
        text = send(f"/task/{task[1]}", position="1")
        following = re.search(r'action="/task/([^"]+)"', text)
        assert following, "no second task was given"
        assert following[1] != task[1], "the first answer was not taken"
    return pages


def main() -> None:
    """Times every command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip-argument", action="append", default=[])
    options = parser.parse_args()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        home, folder = Path(scratch) / "env", Path(scratch) / "work"
        folder.mkdir()
        venv.create(home, with_pip=True)
        began = time.monotonic()
        install = [str(home / "bin" / "pip"), "install", "-q", *options.pip_argument, f"{ROOT}[feedback]"]
        subprocess.run(install, check=True, cwd=folder)
        found["install_seconds"] = round(time.monotonic() - began, 1)
        listed = subprocess.run([home / "bin" / "pip", "list", "--format=json"], capture_output=True, check=True)
        found["packages"] = len(json.loads(listed.stdout))
        serve = [str(home / "bin" / "trimtab"), "feedback", "serve", "--port", "0"]
        process = subprocess.Popen(serve, cwd=folder, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        links = []
        for line in process.stdout:
            links += re.findall(r"http\S+/join#\S+", line)
            if " is at http" in line:
                break
        found["pages_to_first_vote"] = first_vote(links[-1])
        found["first_vote_seconds"] = round(time.monotonic() - began, 1)
        process.send_signal(2)
        process.wait(timeout=20)
        process.stdout.close()

        trimtab = [sys.executable, "-m", "trimtab"]
        simulate = [*trimtab, "feedback", "simulate", "feedback/project.toml"]
        said = subprocess.run(simulate, cwd=folder, check=True, capture_output=True, text=True).stdout
        found["simulate"] = said.strip().splitlines()[-1]
        shutil.copy(ROOT / "examples" / "feedback" / "reward.toml", folder)
        began = time.monotonic()
        subprocess.run([*trimtab, "run", "reward.toml", "--out", "run"], cwd=folder, check=True)
        found["reward_seconds"] = round(time.monotonic() - began, 1)
        summary = json.loads((folder / "run" / "reward" / "summary.json").read_text(encoding="utf-8"))
        found["reward_card"] = {k: summary[k] for k in ("num_pairs", "accuracy") if k in summary} or summary
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
