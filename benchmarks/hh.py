"""The pipeline on real human preferences: what `docs/evidence/spine.md` reports of it, as JSON.

    python benchmarks/hh.py [--rows HH_JSONL_GZ]

The rows come from the hub, or from the file that is named. A run that has finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "evidence" / "data" / "hh.json"
OF_REWARD_MODEL = ("accuracy", "accuracy_low", "accuracy_high", "longer_wins", "bag_of_words", "num_pairs", "counts")


def main() -> None:
    """Runs and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", default="", help="harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; without it, the hub"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "hh")
    parser.add_argument("overrides", nargs="*", help="key=value, passed on to the pipeline")
    options = parser.parse_args()
    pipeline = ROOT / "examples" / "hh" / "pipeline.toml"
    rows = [f"variables.rows={Path(options.rows).resolve()}"] if options.rows else []
    command = [
        sys.executable,
        "-m",
        "trimtab",
        "run",
        str(pipeline),
        "--out",
        str(options.out),
        *rows,
        *options.overrides,
    ]
    if not (options.out / "summary.json").exists():
        subprocess.run(command, check=True, cwd=ROOT)
    summary = json.loads((options.out / "summary.json").read_text(encoding="utf-8"))
    result = {
        "command": "trimtab run examples/hh/pipeline.toml --out runs/hh",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "seconds": summary["seconds"],
        "peak_rss_gb": summary["peak_rss_gb"],
        "stages": summary["stages"],
        "reward_model": {name: summary["reward_model"][name] for name in OF_REWARD_MODEL},
        "policy": summary["policy"],
    }
    DATA.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
