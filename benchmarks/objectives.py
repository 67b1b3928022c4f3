"""The help desk with a harm side, trained for helpfulness with and without a limit on harm.

    python benchmarks/objectives.py --seeds 0 1 2 3 4 --limits 0.2 --steps 120 --rate 2 --damping 8

A base and an SFT model are made once, with seed 0. From there GRPO raises the gold score of the world, which is
helpfulness alone, for each seed: once as it is, and once for each limit on the mean of the gold part `harm`, which a
Lagrangian keeps. Both are the world's own programs and no models, so that what is measured is the algorithm. Each run
is a process on one thread; runs that have finished are not repeated. `docs/evidence/reward-models.md` has the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from algorithms import QUICKSTART, run
from speed import DATA, machine

from trimtab.core.config import load_run_file
from trimtab.stats import t_interval

OUT = DATA.with_name("objectives.json")
WORLD = "helpdesk_harm"
LAST = 50
"""Steps at the end of a run that are averaged, 64 replies each: two or three swings of the cost around its limit."""
BIN = 20
"""Steps that are averaged to a point of the curve."""
FIGURES = {"harm": "harmful replies", "helpfulness": "helpfulness", "lambda": "lambda"}


def start(out: Path) -> Path:
    """The SFT model; base and SFT are those of the quickstart, on the texts of this world, and half as many."""
    stages = load_run_file(QUICKSTART)["stages"]
    base = stages["base"] | {"data": f"world:{WORLD}", "num_documents": 6500}
    sft = stages["sft"] | {"data": f"world:{WORLD}?num=2000"}
    run({"base": base, "sft": sft}, out / "start", seed=0)
    return out / "start" / "sft" / "model"


def trained(
    sft: Path,
    out: Path,
    *,
    seed: int,
    limit: float | None = None,
    weight: float | None = None,
    num_steps: int,
    rate: float,
    damping: float,
) -> Path:
    """The directory of one run, with a limit on harm or with harm at a price, or for helpfulness alone."""
    harm = {"name": "gold", "world": WORLD, "part": "harm"}
    settings: dict[str, Any] = {
        "stage": "online",
        "model": str(sft),
        "prompts": f"world:{WORLD}?num=4000&seed=1",
        "rewards": [{"name": "gold", "world": WORLD}],
        "world": WORLD,
        "advantage": {"name": "grpo", "scale": "none"},
        "kl": {"name": "fixed", "coef": 0.02},
        "kl_in": "loss",
        "prompts_per_step": 16,
        "group_size": 4,
        "num_steps": num_steps,
        "num_epochs": 1,
        "optimizer": {"learning_rate": 5e-4},
        "sampling": {"max_new_tokens": 48},
    }
    if weight is not None:
        settings["rewards"] = [*settings["rewards"], harm | {"weight": -weight}]
    if limit is not None:
        settings["cost"] = {
            "reward": harm,
            "limit": limit,
            "initial_lambda": 0.5,
            "learning_rate": rate,
            "damping": damping,
        }
    name = "free" if weight is None else f"weight-{weight:g}"
    if limit is not None:
        name = f"limit-{limit:g}-rate-{rate:g}-damped-{damping:g}"
    directory = out / f"seed-{seed}" / f"{name}-{num_steps}-steps"
    run({"grpo": settings}, directory, seed=seed)
    return directory


def train(sft: Path, out: Path, *, seed: int, limit: float | None, num_steps: int, **how: float) -> dict[str, Any]:
    """One run, and the means of its last steps."""
    directory = trained(sft, out, seed=seed, limit=limit, num_steps=num_steps, **how)
    lines = (directory / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found: dict[str, Any] = {"seed": seed, "limit": limit}
    for name, metric in (("harm", "gold/harm"), ("helpfulness", "gold/mean"), ("lambda", "cost/lambda")):
        if metric in rows[-1]:
            found[name] = statistics.fmean(row[metric] for row in rows[-LAST:])
    curve = [round(statistics.fmean(r["gold/harm"] for r in rows[i : i + BIN]), 4) for i in range(0, num_steps, BIN)]
    return found | {"harm_at_start": rows[0]["gold/harm"], "harm_curve": curve}


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For no limit and for each one, the means over the seeds with their intervals."""
    found = []
    for limit in dict.fromkeys(row["limit"] for row in rows):
        mine = [row for row in rows if row["limit"] == limit]
        entry: dict[str, Any] = {"limit": limit, "num_seeds": len(mine)}
        for name in FIGURES:
            if name in mine[0]:
                entry |= t_interval([row[name] for row in mine]).named(name)
        if limit is not None:
            entry["within_tenth_of_limit"] = sum(abs(row["harm"] - limit) <= 0.1 * limit for row in mine)
        found.append(entry)
    return found


def table(rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> str:
    """The rows of the page: a row a run, then the means."""
    steps = [f"{i + 1}–{i + BIN}" for i in range(0, BIN * len(rows[0]["harm_curve"]), BIN)]
    titles = ["limit", "seed", *(f"harm, steps {s}" for s in steps), f"harm, last {LAST}", f"helpfulness, last {LAST}"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in sorted(rows, key=lambda row: (row["limit"] is not None, row["limit"] or 0, row["seed"])):
        cells = ["none" if row["limit"] is None else f"{row['limit']:g}", row["seed"]]
        cells += [*(f"{x:.2f}" for x in row["harm_curve"]), f"{row['harm']:.3f}", f"{row['helpfulness']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for entry in sorted(summary, key=lambda entry: entry["limit"] is not None):
        means = [f"{entry[n]:.3f} [{entry[f'{n}_low']:.3f}, {entry[f'{n}_high']:.3f}]" for n in ("harm", "helpfulness")]
        limit = "none" if entry["limit"] is None else f"{entry['limit']:g}"
        lines.append("| " + " | ".join([limit, "mean", *[""] * len(steps), *means]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs all, writes what was found and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limits", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--damping", type=float, default=0.0)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    sft = start(options.out)
    wanted = [(seed, limit) for seed in options.seeds for limit in [*options.limits, None]]
    how: dict[str, Any] = {"num_steps": options.steps, "rate": options.rate, "damping": options.damping}
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda run: train(sft, options.out, seed=run[0], limit=run[1], **how), wanted))
    given = {"seeds": options.seeds, "limits": options.limits, "steps": [options.steps], "rate": [options.rate]}
    given["damping"] = [options.damping]
    flags = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in given.items())
    result = {
        "command": f"python benchmarks/objectives.py {flags}",
        "machine": machine(),
        "num_steps": options.steps,
        "replies_per_step": 64,
        "runs": rows,
        "over_seeds": over_seeds(rows),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows, result["over_seeds"]))


if __name__ == "__main__":
    main()
