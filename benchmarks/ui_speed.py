"""How long the pages of `trimtab ui` take over many long runs, while one of them goes on.

    python benchmarks/ui_speed.py [--runs 100] [--steps 10000] [--read 24]

Writes so many runs with 30 metrics and samples to a temporary directory, starts `trimtab ui` there in a process of its
own, and asks for every kind of page as a browser does. "First" is the first look of the server at those runs, when a
page shows what it could read within its time; "all read" is the same page once all is read; "grown" is asked for after
the run has written a further step. Pages of single runs are asked for of the first --read runs. Writes
docs/evidence/data/ui_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from trimtab.core.files import json_text, write_whole
from trimtab.runs.environment import environment

ROOT = Path(__file__).resolve().parents[1]
NUM_METRICS = 30
SETTINGS = (
    'stage = "online"\nnum_steps = {steps}\nseed = {seed}\ngroup_size = 4\n\n[loss]\nname = "ppo"\nclip_low = 0.2\n'
)
NAMES = ("reward/mean", "gold/mean", "policy/kl", "policy/entropy", "rollout/length_mean", "loss/train")
KINDS = {"list": "the list of all runs", "run": "one run", "compare": "four runs compared"}


def rows(first: int, last: int, seed: int) -> str:
    """Steps as lines of metrics.jsonl."""
    rng = random.Random(seed)
    names = [*NAMES, *(f"owner/quantity_{i}" for i in range(NUM_METRICS - len(NAMES)))]
    lines = []
    for step in range(first, last + 1):
        row = {"step": step, "time/step_seconds": rng.random()} | {name: rng.gauss(step / last, 0.1) for name in names}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def write_runs(root: Path, num_runs: int, num_steps: int) -> None:
    """Runs of one length. Two series of values are enough; where they are read from makes no difference."""
    texts = [rows(1, num_steps, seed) for seed in range(2)]
    sample = {"prompt": "Where is my order? " * 8, "response": "It is on its way. " * 20, "reward": 1.0, "gold": 0.5}
    for number in range(num_runs):
        run = root / f"run-{number:03d}"
        run.mkdir(parents=True)
        (run / "settings.toml").write_text(SETTINGS.format(steps=2 * num_steps, seed=number))
        (run / "environment.json").write_text("{}")
        (run / "metrics.jsonl").write_text(texts[number % 2])
        (run / "samples.jsonl").write_text(
            "".join(json.dumps({"step": step, **sample}) + "\n" for step in range(1, num_steps + 1, 5))
        )


class View:
    """A server in a process of its own, and a browser that has its key."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimtab", "ui", str(root), "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        said = ""
        while "key=" not in said:
            said = self.process.stdout.readline()
        self.client = httpx.Client(base_url=re.match(r"\s*(http://[^/]+)", said)[1], timeout=60)
        self.client.get(said.strip(), follow_redirects=True).raise_for_status()

    def page(self, path: str) -> tuple[float, float, str]:
        """How long a page takes and how much of that the server computes, in milliseconds, and the page."""
        began, busy = time.perf_counter(), self.busy()
        text = self.client.get(path).raise_for_status().text
        return 1000 * (time.perf_counter() - began), self.busy() - busy, text

    def busy(self) -> float:
        """Milliseconds that the server has computed so far, in steps of the system's clock."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """The most memory that the server has held, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def summary(times: list[tuple[float, float]]) -> dict[str, int]:
    """Median and most of the wall-clock times, and the mean computed."""
    took = sorted(wall for wall, _ in times)
    computed = sum(busy for _, busy in times) / len(times)
    return {
        "median": round(took[len(took) // 2]),
        "most": round(took[-1]),
        "computed": round(computed),
        "count": len(took),
    }


def measure(view: View, root: Path, num_read: int, num_steps: int, repeats: int) -> dict[str, object]:
    """The times of every kind of page in milliseconds."""
    names = [f"run-{number:03d}" for number in range(num_read)]
    found: dict[str, list[tuple[float, float]]] = {}

    def note(kind: str, path: str) -> str:
        took, computed, text = view.page(path)
        found.setdefault(kind, []).append((took, computed))
        return text

    note("list, first", "/")
    for _ in range(repeats):
        note("list, all read", "/")
    pages = 0
    for name in names:
        kind = "run, first"
        while "are read so far" in note(kind, f"/run?name={name}"):
            kind, pages = "run, being read", pages + 1
    for name in names[:repeats]:
        note("run, all read", f"/run?name={name}")
    four = "&".join(f"run={name}" for name in names[:4])
    for _ in range(repeats):
        note("compare, all read", f"/compare?{four}")
    for step in range(num_steps + 1, num_steps + repeats + 1):
        with (root / names[0] / "metrics.jsonl").open("a") as file:
            file.write(rows(step, step, step))
        note("list, grown", "/")
        assert f"{step:,} of" in note("run, grown", f"/run?name={names[0]}")
    kinds = {kind: summary(times) for kind, times in found.items()}
    return {
        "milliseconds": kinds,
        "memory_mb": round(view.memory()),
        "pages_until_read": round(1 + pages / num_read, 1),
    }


def table(found: dict[str, object]) -> str:
    """The times as a table of a page."""
    lines = ["| page | median | most | computed by the server, mean | pages |", "|---|---|---|---|---|"]
    for kind, one in sorted(found["milliseconds"].items()):
        page, _, when = kind.partition(", ")
        lines.append(
            f"| {KINDS[page]}, {when} | {one['median']} ms | {one['most']} ms | {one['computed']} ms | {one['count']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--read", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), options.runs, options.steps)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.jsonl"))
        load = os.getloadavg()[0]
        with View(Path(folder)) as view:
            found = measure(view, Path(folder), min(options.read, options.runs), options.steps, options.repeats)
    found |= {
        "runs": options.runs,
        "steps": options.steps,
        "metrics": NUM_METRICS + 1,
        "gigabytes": round(size / 1e9, 2),
    }
    found["machine"] = {"cpus": os.cpu_count(), "processor": environment()["cpu"], "load": round(load, 1)}
    write_whole(ROOT / "docs" / "evidence" / "data" / "ui_speed.json", json_text(found))
    print(table(found))


if __name__ == "__main__":
    main()
