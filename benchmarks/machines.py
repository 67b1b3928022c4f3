"""The two commands on every kind of machine that this one can stand for: `docs/evidence/data/machines.json`.

    python benchmarks/machines.py --quickstart --suite --capabilities avx2 default --kernels compiled torch

`ATEN_CPU_CAPABILITY` makes torch take the paths of a processor with fewer vector instructions; MKL, oneDNN and the
compiler of the kernels in C have limits of their own. `TRIMTAB_KERNELS=torch` takes the paths of a machine without a
compiler. A kind that this processor cannot show is refused. Each combination replaces its own entry in the data file.
Run it with nothing else on the machine: the share of a core that other processes took is written beside each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from speed import DATA, ROOT, busy_seconds, machine

KINDS = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
"""Values of ATEN_CPU_CAPABILITY and what torch then says it uses."""
LIMITS = {
    "default": {"CC": "cc -mno-avx"},
    "avx2": {"CC": "cc -mno-avx512f", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}
"""What keeps the others at the instructions of each kind. MKL and oneDNN have no limit as low as torch's `default`."""
OUT = DATA.with_name("machines.json")
HERE = f"{ROOT}/"
"""What paths begin with here, which says nothing elsewhere."""


def measured(command: list[str], environment: dict[str, str], threads: int) -> dict[str, Any]:
    """Seconds, the peak memory of the largest process, the foreign load, the exit status and the last words."""
    busy, own, began = busy_seconds(), sum(os.times()[2:4]), time.perf_counter()
    limits = {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, env=os.environ | environment | limits, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        words = process.stdout.read().replace(HERE, "")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    foreign = (busy_seconds() - busy - (sum(os.times()[2:4]) - own)) / wall
    return {
        "command": " ".join(["python", *command[1:]]).replace(HERE, ""),
        "seconds": round(wall, 1),
        "peak_rss_gb": round(usage.ru_maxrss / 2**20, 3),
        "threads": threads,
        "foreign_load": round(max(0.0, foreign), 3),
        "exit_status": process.returncode,
        "last_words": [line for line in words.splitlines() if line.strip()][-12:],
    }


def quickstart(out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The whole loop with two threads, and the figures of its summary."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "trimtab", "quickstart", "--out", str(out)]
    found = measured(command, environment, threads=2)
    if found["exit_status"] == 0:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        found["figures"] = {"policy": summary["policy"], "reward_model": summary["reward_model"]}
        found["peak_rss_gb"] = max(found["peak_rss_gb"], summary["peak_rss_gb"])
    return found


def suite(environment: dict[str, str]) -> dict[str, Any]:
    """The tests as `make test` runs them, with one thread in each process, and how many passed."""
    processes = ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    found = measured([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *processes], environment, threads=1)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", " ".join(found["last_words"]))
    return found | {"counts": {what: int(number) for number, what in counts}}


def main() -> None:
    """Runs the chosen combinations and merges them into the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", action="store_true", help="run the quickstart")
    parser.add_argument("--suite", action="store_true", help="run the tests")
    parser.add_argument("--capabilities", nargs="+", choices=list(KINDS), default=["avx2", "default"])
    parser.add_argument("--kernels", nargs="+", choices=["compiled", "torch"], default=["compiled", "torch"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "machines")
    options = parser.parse_args()
    os.chdir(ROOT)
    known: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    for capability in options.capabilities:
        for kernels in options.kernels:
            kind = {"ATEN_CPU_CAPABILITY": capability} | LIMITS[capability]
            environment = kind | {"TRIMTAB_KERNELS": kernels}
            code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
            asked = [sys.executable, "-c", code]
            said = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True, check=True)
            if not said.stdout.strip().startswith(KINDS[capability]):
                raise SystemExit(f"this processor cannot show {capability}: torch says {said.stdout.strip()}")
            name = f"{capability}, {kernels}"
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            entry = known.get(name, {})
            here = {"machine": machine(), "commit": commit.stdout.strip()}
            # The tests name the kernels they want themselves; without a compiler they skip or take torch's.
            if options.suite:
                tests = kind | ({"CC": "no-compiler"} if kernels == "torch" else {})
                entry["suite"] = suite(tests) | here
            if options.quickstart:
                entry["quickstart"] = quickstart(options.out / f"{capability}-{kernels}", environment) | here
            known[name] = entry
            OUT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            for what in ("suite", "quickstart"):
                if what in entry:
                    print(f"{name}: {what}", json.dumps(entry[what] | {"last_words": "", "figures": ""}), flush=True)


if __name__ == "__main__":
    main()
