"""Fifty annotators at once while the server is killed ten times: what was acknowledged is there, once, within the caps.

    python benchmarks/feedback_load.py [--store postgresql://…] [--seconds 90]

Each annotator asks for a task, thinks (two seconds on average), answers, and goes on. Where a request fails the same
answer is sent again after one to three seconds, as the page does, until the server acknowledges it. The server is
killed with SIGKILL at random moments and started again on the same port. Afterwards the store is read: every
acknowledged answer must be there exactly once, with the choice that was sent, nothing else may be there, no item may
have more answers than its cap, and every hash of the audit log must fit. Writes docs/evidence/data/feedback_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.feedback.running import Running  # noqa: E402
from trimtab.core import config  # noqa: E402
from trimtab.feedback import people  # noqa: E402
from trimtab.feedback.importing import seed_items  # noqa: E402
from trimtab.feedback.store import open_store, verify  # noqa: E402
from trimtab.feedback.votes import cast_votes  # noqa: E402
from trimtab.feedback.voting import JUDGED  # noqa: E402

NUM_ITEMS = 3000
OVERLAP = 3
THINK_SECONDS = 2.0


class Annotator:
    """One person who keeps on answering, whatever happens to the server."""

    def __init__(self, address: str, session: str, name: str, seed: int) -> None:
        self.client = httpx.AsyncClient(base_url=address, cookies={"trimtab_session": session}, timeout=20)
        self.name, self.random = name, random.Random(seed)
        self.acknowledged: dict[str, str] = {}
        self.milliseconds: list[float] = []
        self.failures = 0
        self.repeats = 0

    async def request(self, method: str, path: str, data: dict[str, str] | None = None) -> httpx.Response:
        """Sent until there is an answer."""
        while True:
            start = time.perf_counter()
            try:
                response = await self.client.request(method, path, data=data)
            except httpx.HTTPError:
                self.failures += 1
                await asyncio.sleep(self.random.uniform(1, 3))
                continue
            if response.status_code >= 500 or response.status_code == 429:
                self.failures += 1
                await asyncio.sleep(self.random.uniform(1, 3))
                continue
            self.milliseconds.append(1000 * (time.perf_counter() - start))
            return response

    async def work(self, until: float) -> None:
        """Answers until the time is over or nothing is left."""
        while time.monotonic() < until:
            page = (await self.request("GET", "/task")).text
            version = re.search(r'name="version" value="(\d+)"', page)
            csrf = re.search(r'name="csrf" value="(\w+)"', page)
            if version and csrf and "I have read it" in page:
                await self.request("POST", "/guideline/read", {"csrf": csrf[1], "version": version[1]})
                continue
            token = re.search(r'action="/task/([^"]+)"', page)
            if not token or not csrf:
                return
            await asyncio.sleep(self.random.expovariate(1 / THINK_SECONDS))
            choice = self.random.choice(["tie", "both_bad", "1", "2"])
            field = "position" if choice.isdigit() else "choice"
            form = {"csrf": csrf[1], field: choice}
            before = self.failures
            response = await self.request("POST", f"/task/{token[1]}", form)
            self.repeats += self.failures > before
            if response.status_code == 303:
                self.acknowledged[token[1]] = choice
            if self.random.random() < 0.1:  # a second tab
                await self.request("POST", f"/task/{token[1]}", {"csrf": csrf[1], "choice": "both_bad"})


async def kill_again_and_again(running: list[Running], times: int, seconds: float, seed: int) -> None:
    """Kills the server and starts it on the same port, at random moments."""
    rng = random.Random(seed)
    for _ in range(times):
        await asyncio.sleep(seconds / times * rng.uniform(0.7, 1.1))
        old = running[-1]
        old.kill()
        running.append(await asyncio.to_thread(Running, old.project, old.port))


async def storm(running: list[Running], annotators: list[Annotator], seconds: float, kills: int) -> None:
    """The annotators at work and the killer among them."""
    until = time.monotonic() + seconds
    work = asyncio.gather(*(a.work(until) for a in annotators))
    if kills:
        await kill_again_and_again(running, kills, 0.9 * seconds, seed=1)
    await work
    await asyncio.gather(*(a.client.aclose() for a in annotators))


def measure(folder: Path, store_url: str | None, num: int, seconds: float, kills: int) -> dict[str, object]:
    """One storm and what the store says afterwards."""
    values = {
        "name": "Load",
        "data": [f"world:helpdesk?num={NUM_ITEMS}"],
        "assignment": {"overlap": OVERLAP, "finish_started": True, "policy": "random"},
        "server": {"requests_per_minute": 100000},
    }
    if store_url:
        values["store"] = store_url
    folder.mkdir(parents=True)
    project = folder / "project.toml"
    project.write_text(config.to_toml(values), encoding="utf-8")
    store = open_store(project)
    seed_items(store)
    sessions = []
    for i in range(num):
        with store.write() as connection:
            person = people.add_person(connection, store.now(), f"annotator {i + 1}", "annotator")
        sessions.append((person.name, people.start_session(store, person, hours=24)))
    store.close()
    running = [Running(project)]
    annotators = [Annotator(running[0].address, s, name, i) for i, (name, s) in enumerate(sessions)]
    start = time.perf_counter()
    asyncio.run(storm(running, annotators, seconds, kills))
    took = time.perf_counter() - start
    running[-1].stop()
    return judge(project, annotators, took) | {"kills": len(running) - 1, "annotators": num}


def judge(project: Path, annotators: list[Annotator], took: float) -> dict[str, object]:
    """What was acknowledged against what is stored."""
    store = open_store(project)
    with store.read() as connection:
        stored = list(cast_votes(connection))
        keys = {row.key: row for row in connection.exec_driver_sql("SELECT key, choice, shown_left FROM votes")}
    lost = wrong = 0
    acknowledged = {token: choice for a in annotators for token, choice in a.acknowledged.items()}
    for token, choice in acknowledged.items():
        row = keys.get(token)
        if row is None:
            lost += 1
            continue
        side = {"1": row.shown_left, "2": "B" if row.shown_left == "A" else "A"}.get(choice, choice)
        wrong += row.choice != side
    per_item = Counter(cast.item_id for cast in stored)
    twice = len(stored) - len({(cast.item_id, cast.person_id) for cast in stored})
    problems = verify(store)
    database = store.engine.dialect.name
    store.close()
    milliseconds = np.array([m for a in annotators for m in a.milliseconds])
    return {
        "database": database,
        "seconds": round(took, 1),
        "acknowledged": len(acknowledged),
        "stored": len(stored),
        "acknowledged_and_lost": lost,
        "stored_with_another_choice": wrong,
        "stored_but_never_acknowledged": len(keys.keys() - acknowledged.keys()),
        "answered_twice_by_one_person": twice,
        "most_answers_of_an_item": max(per_item.values(), default=0),
        "cap": OVERLAP,
        "audit_problems": problems,
        "judged": sum(cast.answer.choice in JUDGED for cast in stored),
        "answers_sent_again": sum(a.repeats for a in annotators),
        "failed_requests": sum(a.failures for a in annotators),
        "requests": int(milliseconds.size),
        "requests_per_second": round(float(milliseconds.size / took), 1),
        "p50_ms": round(float(np.quantile(milliseconds, 0.5)), 1),
        "p95_ms": round(float(np.quantile(milliseconds, 0.95)), 1),
        "p99_ms": round(float(np.quantile(milliseconds, 0.99)), 1),
        "max_ms": round(float(milliseconds.max()), 1),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a postgresql:// URL of an empty database; SQLite without it")
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/evidence/data/feedback_load.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quiet = measure(Path(folder) / "quiet", options.store, options.annotators, options.seconds, 0)
        stormy = None
        if options.kills and not options.store:
            stormy = measure(Path(folder) / "storm", None, options.annotators, options.seconds, options.kills)
    found = {
        "quiet": quiet,
        "killed": stormy,
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "think_seconds": THINK_SECONDS,
        "items": NUM_ITEMS,
        "load_average_before": os.getloadavg()[0],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
