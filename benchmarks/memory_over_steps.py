"""Whether memory grows with the steps of a run: `docs/evidence/data/memory_over_steps.json`.

    python benchmarks/memory_over_steps.py --quickstart runs/quickstart --steps 200

Runs the quickstart's PPO without a KL penalty from the models of a finished quickstart, for more steps than it has
there: replies soon fill all their tokens, and every step makes shapes that no step before it had. The resident memory
is noted beside the number of steps that are done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from speed import DATA, machine

OUT = DATA.with_name("memory_over_steps.json")


def resident_gb(pid: int) -> float:
    """Resident memory of a process in GB, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmRSS:")), 0.0)


def main() -> None:
    """Runs, watches, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="the directory of a finished quickstart")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps of one figure, the largest memory in them")
    options = parser.parse_args()
    settings = options.quickstart / "ppo_no_leash" / "settings.toml"
    out = options.quickstart / "memory_over_steps"
    shutil.rmtree(out, ignore_errors=True)
    stage = [sys.executable, "-m", "trimtab", "online", str(settings)]
    command = [*stage, f"num_steps={options.steps}", "--out", str(out)]
    largest: dict[int, float] = {}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            metrics = out / "metrics.jsonl"
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            part = min(done // options.every * options.every, options.steps - options.every)
            largest[part] = max(largest.get(part, 0.0), resident_gb(process.pid))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    result = {
        "command": f"python benchmarks/memory_over_steps.py --steps {options.steps}",
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "seconds": round(time.perf_counter() - began),
        "largest_gb": {f"{part + 1} to {part + options.every}": round(gb, 3) for part, gb in sorted(largest.items())},
        "last_step": {name: last[name] for name in ("policy/kl", "rollout/length_mean") if name in last},
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
