"""The quickstart over several seeds: what `docs/evidence/spine.md` reports, as JSON, a table and a picture.

    python benchmarks/spine.py --seeds 0 1 2 3 4 --out runs/evidence

Runs that have finished are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from pictures import write_picture

from trimtab.evals.overoptimisation import hacking_summary
from trimtab.reports.charts import ROSE, TEAL, Axis, Chart
from trimtab.stats import moving_mean, t_interval

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "evidence" / "data"
WINDOW = 7
"""Steps over which the curves are averaged: one step's gold rests on 64 replies and has a standard error of 0.02."""


def run_seed(seed: int, out: Path, overrides: list[str]) -> dict:
    """The summary of the quickstart with this seed, run now unless it has finished before."""
    directory = out / f"seed-{seed}"
    if not (directory / "summary.json").exists():
        command = [sys.executable, "-m", "trimtab", "quickstart", "--seed", str(seed), "--out", str(directory)]
        subprocess.run([*command, *overrides], check=True)
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


def row(summary: dict) -> dict:
    """The figures of one seed."""
    policy, reward = summary["policy"], summary["reward_model"]
    gap = policy["gold_best_of_64"] - policy["gold_sft"]
    return {
        "seed": summary["seed"],
        "gold_sft": policy["gold_sft"],
        "gold_final": policy["gold_final"],
        "gold_final_low": policy["gold_final_low"],
        "gold_final_high": policy["gold_final_high"],
        "gold_best_of_64": policy["gold_best_of_64"],
        "gap_closed": (policy["gold_final"] - policy["gold_sft"]) / gap,
        "kl": policy["kl"],
        "win_rate_vs_sft": policy["win_rate_vs_sft"],
        "reward_model_accuracy": reward["accuracy"],
        "bayes_accuracy": reward["bayes_accuracy"],
        "seconds": summary["seconds"],
        "peak_rss_gb": summary["peak_rss_gb"],
    }


def curve(directory: Path) -> list[tuple[float, float, float]]:
    """(KL, reward, gold) of every step, each a moving mean."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    columns = [moving_mean([r[name] for r in rows], WINDOW) for name in ("policy/kl", "reward/mean", "gold/mean")]
    return [(max(0.0, float(k)), float(r), float(g)) for k, r, g in zip(*columns, strict=True)]


def table(result: dict) -> str:
    """The table of the page: a line for each seed, and their means with Student's intervals."""
    lines = [
        "| seed | gold SFT | gold PPO | best of 64 | gap closed | KL (nats) | wins against SFT | "
        "reward model / Bayes | fall without leash | seconds | GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows, falls = result["seeds"], {int(s): h["fall_fraction"] for s, h in result["without_the_leash"].items()}
    for r in rows:
        fall = f"{falls[r['seed']]:.0%}" if r["seed"] in falls else ""
        lines.append(
            f"| {r['seed']} | {r['gold_sft']:.3f} | {r['gold_final']:.3f} [{r['gold_final_low']:.3f}, "
            f"{r['gold_final_high']:.3f}] | {r['gold_best_of_64']:.3f} | {r['gap_closed']:.0%} | {r['kl']:.1f} | "
            f"{r['win_rate_vs_sft']:.0%} | {r['reward_model_accuracy']:.1%} / {r['bayes_accuracy']:.1%} | {fall} | "
            f"{r['seconds']:.0f} | {r['peak_rss_gb']:.2f} |"
        )
    if len(rows) > 1:

        def mean(name: str, digits: str, *, interval: bool = True) -> str:
            found = result["over_seeds"][name]
            low, high = (f"{found[f'{name}_{end}']:{digits}}" for end in ("low", "high"))
            return f"{found[name]:{digits}} [{low}, {high}]" if interval else f"{found[name]:{digits}}"

        wins, bayes = (statistics.mean(r[n] for r in rows) for n in ("win_rate_vs_sft", "bayes_accuracy"))
        lines.append(
            f"| mean | {mean('gold_sft', '.3f', interval=False)} | {mean('gold_final', '.3f')} | "
            f"{mean('gold_best_of_64', '.3f', interval=False)} | {mean('gap_closed', '.0%')} | {mean('kl', '.1f')} | "
            f"{wins:.0%} | {mean('reward_model_accuracy', '.1%', interval=False)} / {bayes:.1%} | "
            f"{statistics.mean(falls.values()):.0%} | | |"
        )
    return "\n".join(lines)


def picture(out: Path, seeds: list[int]) -> dict[str, Chart]:
    """Gold and reward over the square root of KL, with the leash and without, one line a seed."""
    across = Axis("√KL to the SFT model (√nats per reply)", low=0.0)
    gold, reward = (Chart(across, Axis(title), 330, wide=True) for title in ("gold score", "reward"))
    for name, colour, label in (("ppo", TEAL, "with the KL penalty"), ("ppo_no_leash", ROSE, "without it")):
        for chart in (gold, reward):
            chart.legend.append((label, colour))
        for seed in (s for s in seeds if (out / f"seed-{s}" / name / "metrics.jsonl").exists()):
            kl, rewards, golds = zip(*curve(out / f"seed-{seed}" / name), strict=True)
            gold.line(np.sqrt(kl), golds, colour, size=1.5)
            reward.line(np.sqrt(kl), rewards, colour, size=1.5)
    return {"What the reward stands for does not keep rising": gold, "The reward does": reward}


def main() -> None:
    """Runs, aggregates, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("overrides", nargs="*", help="key=value, passed on to the quickstart")
    options = parser.parse_args()
    rows = [row(run_seed(seed, options.out, options.overrides)) for seed in options.seeds]
    hacking = {}
    for seed in options.seeds:
        directory = options.out / f"seed-{seed}" / "ppo_no_leash"
        if (directory / "metrics.jsonl").exists():
            found = hacking_summary(curve(directory))
            hacking[seed] = {name: getattr(found, name) for name in found.__dataclass_fields__}
    over_seeds = {
        name: t_interval([r[name] for r in rows]).named(name)
        for name in (
            "gap_closed",
            "gold_sft",
            "gold_final",
            "gold_best_of_64",
            "kl",
            "reward_model_accuracy",
            "seconds",
        )
    }
    DATA.mkdir(parents=True, exist_ok=True)
    result = {"seeds": rows, "over_seeds": over_seeds, "without_the_leash": hacking, "moving_mean_steps": WINDOW}
    (DATA / "spine.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_picture(picture(options.out, options.seeds), ROOT / "docs" / "evidence" / "overoptimisation.svg")
    print(table(result))
    print(json.dumps(over_seeds, indent=1))
    print(json.dumps(hacking, indent=1))


if __name__ == "__main__":
    main()
