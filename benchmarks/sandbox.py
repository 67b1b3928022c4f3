"""Runs the hostile set in the sandbox and writes what came of it to docs/evidence/data/sandbox.json.

    python benchmarks/sandbox.py            as whoever runs it
    sudo python benchmarks/sandbox.py       as root, whose sandboxes run as nobody, and again as nobody

For each kind of wall this machine has, each piece of hostile code is run with an honest one after it. Contained means:
nothing forbidden was achieved, no false verdict was given, no process and no file is left, and the honest code passes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "evidence" / "data" / "sandbox.json"
NOBODY = 65534


def load_sandbox():
    """The sandbox alone, for another user too."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    from trimtab.sandbox import sandbox

    return sandbox


def processes():
    """Processes of sandboxes that this process owns."""
    mark, found = f'"owner": {os.getpid()}'.encode(), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def measure(seconds):
    """One row for each wall and piece of code."""
    module = load_sandbox()
    from benchmarks.hostile_code import ATTACKS, FORGERIES, HONEST, forgery_tests, hostile_code

    limits = module.Limits(seconds=seconds, memory_mb=256, num_processes=4, file_mb=8)
    rows, pace = [], {}
    for wall in module.WALLS:
        try:
            sandbox = module.Sandbox(limits, walls=[wall])
            unhurried = module.Sandbox(module.Limits(seconds=30), walls=[wall])
        except module.EngineError as error:
            rows.append({"walls": wall, "outcome": "not to be had on this machine", "why": error.problem})
            continue
        with tempfile.TemporaryDirectory() as home, socket.create_server(("127.0.0.1", 0)) as server:
            secret = Path(home) / "secret.txt"
            secret.write_text("the secret")
            server.settimeout(0)
            places = {"secret": str(secret), "home": str(Path.home()), "owner": os.getpid()}
            places |= {"port": server.getsockname()[1], "file_mb": limits.file_mb}
            for kind, texts in (("attack", ATTACKS), ("forgery", FORGERIES)):
                for name, text in texts.items():
                    if kind == "attack":
                        code, tests = hostile_code(text, **places), ["found = attack()\nassert found == [], found"]
                    else:
                        code, tests = textwrap.dedent(text), forgery_tests(783461)
                    started = time.perf_counter()
                    report = sandbox.examine(code, tests)
                    taken = time.perf_counter() - started
                    left = {
                        "processes": len(processes()),
                        "files": len(list(Path(home).iterdir())) - 1,
                        "connections": connections(server),
                        "secret_changed": not secret.exists() or secret.read_text() != "the secret",
                    }
                    achieved = (
                        report.message if kind == "attack" and report.message.startswith("AssertionError") else ""
                    )
                    false_verdicts = sum(report.passed) if kind == "forgery" else 0
                    honest = unhurried.examine(HONEST, ["assert answer() == 42"]).passed == (True,)
                    contained = honest and not (achieved or false_verdicts or any(left.values()) or report.refused)
                    rows.append(
                        {
                            "walls": wall,
                            "kind": kind,
                            "name": name,
                            "outcome": "contained" if contained else "NOT CONTAINED",
                            "ended": "out of time" if report.timed_out else "by itself",
                            "said": report.message[:200],
                            "seconds": round(taken, 2),
                            "left_behind": left,
                            "false_verdicts": false_verdicts,
                            "honest_code_passes_after": honest,
                        }
                    )
                    print(f"{wall:10} {kind:7} {name:50} {rows[-1]['outcome']} in {taken:.2f} s", flush=True)
        pace[wall] = exams_per_second(module.Sandbox(module.Limits(), walls=[wall]), HONEST)
    return {"user": "root" if os.getuid() == 0 else "not root", "rows": rows, "exams_per_second": pace}


def connections(server):
    """How many came in on the listening socket."""
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return 0
    return 1


def exams_per_second(sandbox, code, num=64):
    """Of honest code with one test, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = time.perf_counter()
        exams = list(pool.map(lambda _: sandbox.examine(code, ["assert answer() == 42"]), range(num)))
        taken = time.perf_counter() - started
    assert all(report.passed == (True,) for report in exams)
    return round(num / taken, 1)


def as_nobody(seconds, python):
    """The same as an ordinary user, by an interpreter which that user may read."""
    command = [python, "-B", __file__, "--seconds", str(seconds), "--print"]
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measures and writes the file; ends with status 1 where anything was not contained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one piece of code")
    parser.add_argument("--python", default="/usr/bin/python3", help="the interpreter of the run as nobody")
    parser.add_argument("--print", action="store_true", help="print the result instead of writing the file")
    options = parser.parse_args()
    result = measure(options.seconds)
    if options.print:
        print(json.dumps(result))
        return
    runs = [result]
    if os.getuid() == 0 and Path(options.python).exists():
        runs.append(as_nobody(options.seconds, options.python))
    machine = {"kernel": platform.release(), "python": platform.python_version(), "cores": os.cpu_count()}
    machine["load"] = round(os.getloadavg()[1], 1)  # of others too: the times and rates are to be read with it
    rows = [row for run in runs for row in run["rows"]]
    tally = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in {row["outcome"] for row in rows}}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine, "outcomes": tally, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(tally)
    sys.exit("NOT CONTAINED" in tally)


if __name__ == "__main__":
    main()
