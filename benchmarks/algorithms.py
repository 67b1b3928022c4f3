"""Every algorithm from the same SFT model, over seeds: what `docs/evidence/algorithms.md` reports, as JSON, a table
and a picture.

    python benchmarks/algorithms.py --seeds 0 1 2 --jobs 2 --out runs/algorithms

Each run is a process on one thread. Runs that have finished are not repeated; one that was cut short begins again, so
that its seconds and memory are those of a whole run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from pictures import write_picture
from spine import DATA, ROOT

from trimtab.core.config import to_toml
from trimtab.evals.overoptimisation import best_of_each, best_of_n_kl, sizes_up_to
from trimtab.reports.charts import GREY, PALETTE, Axis, Chart
from trimtab.stats import bootstrap_mean, t_interval

N = 16
"""Replies that best-of-N chooses from in the table; the curve goes to LARGEST."""
LARGEST = 32
TEST_PROMPTS = "world:helpdesk?split=test&num=300&seed=7"
SAMPLING = {"max_new_tokens": 64, "batch_size": 512}
QUICKSTART = ROOT / "examples" / "quickstart" / "pipeline.toml"
ARITHMETIC = ROOT / "examples" / "arithmetic" / "grpo.toml"


# --- what is run; "$sft", "$reward" and "$pairs" are those of the seed ---


def offline(loss: dict[str, Any], *, learning_rate: float = 2e-4) -> dict[str, Any]:
    """Training on the pairs that the reward model has learned from too."""
    optimizer = {"learning_rate": learning_rate, "schedule": "cosine", "warmup_fraction": 0.1}
    settings = {"stage": "preference", "model": "$sft", "data": "$pairs", "loss": loss, "optimizer": optimizer}
    return {"train": settings | {"batch_size": 16}}


def online(**settings: Any) -> dict[str, Any]:
    """30 steps of 64 replies."""
    common = {
        "stage": "online",
        "model": "$sft",
        "prompts": "world:helpdesk?num=4000&seed=1",
        "rewards": [{"name": "model", "path": "$reward"}],
        "world": "helpdesk",
        "shaping": {"missing_eos_penalty": 1.0},
        "kl": {"name": "fixed", "coef": 0.1},
        "prompts_per_step": 8,
        "group_size": 8,
        "num_steps": 30,
        "num_epochs": 1,
        "num_minibatches": 2,
        "optimizer": {"learning_rate": 5e-4},
        "sampling": {"max_new_tokens": 64},
    }
    return {"train": common | settings}


def dapo(**settings: Any) -> dict[str, Any]:
    """DAPO, whose charge on length takes the place of the one on a missing end."""
    rewards = [{"name": "model", "path": "$reward"}, {"name": "overlong", "max_tokens": 64, "buffer_tokens": 16}]
    return online(
        rewards=rewards,
        shaping={},
        advantage={"name": "grpo", "scale": "group"},
        loss={"name": "ppo", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
        dynamic_sampling={"max_rounds": 4},
        skip_truncated=True,
        **settings,
    )


def rejection_sampling(rounds: int) -> dict[str, Any]:
    """Rounds of: sample 8, keep the best of the better half of the prompts, imitate it."""
    stages: dict[str, Any] = {}
    policy = "$sft"
    for number in range(1, rounds + 1):
        stages[f"select_{number}"] = {
            "stage": "select",
            "model": policy,
            "prompts": f"world:helpdesk?num=1200&seed={10 + number}",
            "rewards": [{"name": "model", "path": "$reward"}],
            "replies_per_prompt": 8,
            "filter": {"top_fraction": 0.5},
            "sampling": SAMPLING,
        }
        stages["train" if number == rounds else f"sft_{number}"] = {
            "stage": "sft",
            "model": policy,
            "data": f"@select_{number}/best.jsonl",
            "batch_size": 16,
            "num_epochs": 2,
            "optimizer": {"learning_rate": 5e-4, "schedule": "cosine", "warmup_fraction": 0.05},
        }
        policy = f"@sft_{number}"
    return stages


ALGORITHMS: dict[str, dict[str, Any]] = {
    # The chosen reply is imitated too (arXiv:2404.19733), which ORPO does by itself. ALONE shows why.
    "DPO": offline({"name": "dpo", "beta": 0.1, "nll_coef": 1.0}),
    "IPO": offline({"name": "ipo", "beta": 0.1, "nll_coef": 1.0}),
    "SimPO": offline({"name": "simpo", "beta": 2.0, "gamma": 1.0, "nll_coef": 1.0}),
    "ORPO": offline({"name": "orpo", "odds_coef": 1.0}),
    "KTO": offline({"name": "kto", "beta": 0.1, "nll_coef": 1.0}),
    "PPO": online(
        prompts_per_step=16,
        group_size=4,
        num_epochs=2,
        critic={"optimizer": {"learning_rate": 1e-3}, "warmup_steps": 2},
    ),
    "GRPO": online(
        advantage={"name": "grpo", "scale": "group"},
        loss={"name": "ppo", "aggregation": "sequence_mean"},
        kl={"name": "fixed", "coef": 0.5},
        kl_in="loss",
        kl_estimator="k3",
    ),
    "Dr. GRPO": online(
        advantage={"name": "grpo", "scale": "none"},
        loss={"name": "ppo", "aggregation": "constant_length", "length": 64},
    ),
    "DAPO": dapo(),
    "RLOO": online(
        prompts_per_step=16,
        group_size=4,
        advantage={"name": "rloo"},
        loss={"name": "reinforce", "aggregation": "constant_length", "length": 1},
        num_minibatches=1,
    ),
    "REINFORCE++": online(
        prompts_per_step=64, group_size=1, advantage={"name": "reinforce_pp", "baseline": "none"}, kl_estimator="k1"
    ),
    "rejection sampling": rejection_sampling(2),
}
ALONE = {
    "DPO alone": offline({"name": "dpo", "beta": 0.1}),
    "SimPO alone": offline({"name": "simpo", "beta": 2.0, "gamma": 1.0}),
    "KTO alone": offline({"name": "kto", "beta": 0.1}),
    "DAPO alone": dapo(kl={"name": "fixed", "coef": 0.0}),
}
"""Losses without the imitation of chosen replies, and DAPO without a KL, as in its paper; with the first seed only, and
in neither table nor picture."""
BEST_OF_N = "best of N"
FAMILIES = {
    "from pairs": ("DPO", "IPO", "SimPO", "ORPO", "KTO"),
    "from replies of its own": ("PPO", "GRPO", "Dr. GRPO", "DAPO", "RLOO", "REINFORCE++"),
    "by choosing": ("rejection sampling", BEST_OF_N),
}


def evaluation(policy: str) -> dict[str, Any]:
    """The policy beside the SFT model on prompts nobody trained on."""
    settings = {"stage": "evaluate", "model": policy, "baseline": "$sft", "reward_model": "$reward"}
    return {"test": settings | {"world": "helpdesk", "prompts": TEST_PROMPTS, "num_prompts": 300, "sampling": SAMPLING}}


def choosing() -> dict[str, Any]:
    """Best-of-n for every n up to LARGEST on the same prompts."""
    settings = {"stage": "select", "model": "$sft", "prompts": TEST_PROMPTS, "world": "helpdesk", "sampling": SAMPLING}
    rewards = [{"name": "model", "path": "$reward"}]
    return {"test": settings | {"rewards": rewards, "replies_per_prompt": LARGEST}}


# --- running ---


def run(stages: dict[str, Any], out: Path, *, seed: int, variables: dict[str, str] | None = None) -> dict[str, float]:
    """Runs the stages in one process of their own, unless that was done before; CPU seconds and peak memory of it."""
    cost = out / "cost.json"
    if not cost.exists():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        pipeline = out.with_name(f"{out.name}.toml")
        pipeline.write_text(to_toml({"seed": seed, "variables": variables or {}, "stages": stages}), encoding="utf-8")
        command = [sys.executable, "-m", "trimtab", "run", str(pipeline), "--out", str(out)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with out.with_name(f"{out.name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=os.environ | threads, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; see {log.name}")
        peak = used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        cost.write_text(json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_rss_gb": peak}) + "\n")
    return json.loads(cost.read_text(encoding="utf-8"))


def start(out: Path, seed: int) -> dict[str, str]:
    """The seed's own SFT model, pairs and reward model, made by the stages of the quickstart."""
    directory = out / f"seed-{seed}" / "start"
    if not (directory / "reward" / "summary.json").exists():
        stages = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["stages"]
        run({name: stages[name] for name in ("base", "sft", "compare", "reward")}, directory, seed=seed)
    files = {"sft": "sft/model", "reward": "reward/model", "pairs": "compare/train.jsonl"}
    return {name: str(directory / file) for name, file in files.items()}


def train_and_test(name: str, out: Path, seed: int, variables: dict[str, str]) -> dict[str, Any]:
    """The figures of one algorithm and seed."""
    directory = out / f"seed-{seed}" / name.replace(" ", "_")
    if name == BEST_OF_N:
        used = run(choosing(), directory / "test", seed=seed, variables=variables)
        return {"name": name, "seed": seed} | chosen(directory / "test" / "test" / "replies.jsonl") | used
    used = run((ALGORITHMS | ALONE)[name], directory / "train", seed=seed, variables=variables)
    run(evaluation(str(directory / "train" / "train" / "model")), directory / "test", seed=seed, variables=variables)
    found = json.loads((directory / "test" / "test" / "summary.json").read_text(encoding="utf-8"))
    gain = {end: found["gold_difference"][f"difference{end}"] for end in ("", "_low", "_high")}
    return {
        "name": name,
        "seed": seed,
        "gold_sft": found["baseline"]["gold"],
        "gold": found["policy"]["gold"],
        **{f"gold_gain{end}": value for end, value in gain.items()},
        "kl": found["kl"]["kl_exact"],
        "reward_gain": found["reward_difference"]["difference"],
        "length_mean": found["policy"]["length_mean"],
        "truncated_fraction": found["policy"]["truncated_fraction"],
        **used,
    }


def chosen(replies: Path) -> dict[str, Any]:
    """Best-of-n by the reward model against one reply of the same prompts."""
    rows = [json.loads(line) for line in replies.read_text(encoding="utf-8").splitlines()]
    reward, gold = (np.array([[r[what] for r in row["replies"]] for row in rows]) for what in ("reward", "gold"))
    sizes = sizes_up_to(LARGEST)
    by_reward, rewards = best_of_each(gold, reward, sizes), best_of_each(reward, reward, sizes)
    gains = [bootstrap_mean(by_reward[:, i] - by_reward[:, 0]) for i in range(len(sizes))]
    at = sizes.index(N)
    return {
        "gold_sft": float(by_reward[:, 0].mean()),
        "gold": float(by_reward[:, at].mean()),
        **gains[at].named("gold_gain"),
        "kl": best_of_n_kl(N),
        "reward_gain": float((rewards[:, at] - rewards[:, 0]).mean()),
        "curve": [{"n": n, "kl": best_of_n_kl(n), "gold_gain": g.value} for n, g in zip(sizes, gains, strict=True)],
    }


# --- arithmetic ---


def arithmetic(out: Path, seed: int) -> dict[str, Any]:
    """GRPO on exact answers: accuracy before and after, and what the training took."""
    stages = tomllib.loads(ARITHMETIC.read_text(encoding="utf-8"))["stages"]
    directory = out / f"seed-{seed}" / "arithmetic"
    variables = {"sft": str(directory / "start" / "sft" / "model")}
    run({name: stages[name] for name in ("base", "sft")}, directory / "start", seed=seed)
    used = run({"grpo": stages["grpo"] | {"model": "$sft"}}, directory / "train", seed=seed, variables=variables)
    variables["grpo"] = str(directory / "train" / "grpo" / "model")
    tested = stages["evaluate"] | {"model": "$grpo", "baseline": "$sft"}
    run({"evaluate": tested}, directory / "test", seed=seed, variables=variables)
    found = json.loads((directory / "test" / "evaluate" / "summary.json").read_text(encoding="utf-8"))
    accuracy = {
        f"accuracy_{when}{end}": found[model][f"gold{end}"]
        for when, model in (("before", "baseline"), ("after", "policy"))
        for end in ("", "_low", "_high")
    }
    sizes = {"kl": found["kl"]["kl_exact"], "num_prompts": found["policy"]["num_replies"]}
    return {"seed": seed} | accuracy | sizes | used


# --- showing ---


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and interval over the seeds of one algorithm."""
    names = ("gold_gain", "kl", "reward_gain", "cpu_seconds", "peak_rss_gb")
    return {"name": rows[0]["name"], "num_seeds": len(rows)} | {
        key: value for name in names for key, value in t_interval([r[name] for r in rows]).named(name).items()
    }


def table(rows: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| | gold gain, mean [95% over seeds] | each seed | KL (nats) | reward gain | CPU seconds | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in means:
        each = [r for r in rows if r["name"] == m["name"]]
        kl = [r["kl"] for r in each]
        cells = [
            m["name"],
            f"{m['gold_gain']:+.3f} [{m['gold_gain_low']:+.3f}, {m['gold_gain_high']:+.3f}]",
            " · ".join(f"{r['gold_gain']:+.2f}" for r in each),
            f"≤ {m['kl']:.2f}" if m["name"] == BEST_OF_N else f"{m['kl']:.1f} ({min(kl):.1f}–{max(kl):.1f})",
            f"{m['reward_gain']:+.2f}",
            f"{m['cpu_seconds']:.0f}",
            f"{m['peak_rss_gb']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]]) -> dict[str, Chart]:
    """Gold gain over the square root of KL: a dot for each algorithm and seed, and the curve of best-of-n."""
    ticks = tuple((math.sqrt(kl), f"{kl:g}") for kl in (0, 0.25, 1, 2, 4, 6, 9, 16, 25, 36, 49, 64))
    across = Axis("KL to the SFT model (nats per reply, square-root scale)", low=0.0, ticks=ticks)
    chart = Chart(across, Axis("gain in gold"), 560, wide=True)
    curves = [r["curve"] for r in rows if r["name"] == BEST_OF_N]
    if curves:
        x = [math.sqrt(point["kl"]) for point in curves[0]]
        y = np.mean([[point["gold_gain"] for point in curve] for curve in curves], axis=0)
        chart.legend.append(("best of n by the reward model", GREY))
        chart.line(x, y, GREY)
        chart.dots(x, y, [GREY], [f"best of {point['n']}" for point in curves[0]])
    for (family, names), colour in zip(FAMILIES.items(), PALETTE, strict=False):
        chart.legend.append((family, colour))
        for name in names:
            each = [r for r in rows if r["name"] == name and name != BEST_OF_N]
            if each:
                x, y = [math.sqrt(max(0.0, r["kl"])) for r in each], [r["gold_gain"] for r in each]
                chart.dots(x, y, [colour], [f"{name}, seed {r['seed']}" for r in each], size=5, opacity=0.7)
                chart.texts([np.mean(x)], [np.mean(y)], colour, [name])
    return {"What each algorithm gains, and how far from the SFT model it goes for it": chart}


def main() -> None:
    """Runs, aggregates, writes."""
    names = [*ALGORITHMS, BEST_OF_N]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "algorithms")
    parser.add_argument(
        "--only", nargs="+", choices=[*names, *ALONE, "arithmetic"], default=[*names, *ALONE, "arithmetic"]
    )
    parser.add_argument("--data", type=Path, default=DATA, help="where algorithms.json is written")
    options = parser.parse_args()
    out = options.out.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        starts = [] if options.only == ["arithmetic"] else options.seeds
        given = dict(zip(starts, pool.map(lambda seed: start(out, seed), starts), strict=True))
        jobs = [(name, seed) for seed in options.seeds for name in options.only if name in names]
        jobs += [(name, options.seeds[0]) for name in options.only if name in ALONE]
        running = [pool.submit(train_and_test, name, out, seed, given[seed]) for name, seed in jobs]
        sums = [pool.submit(arithmetic, out, seed) for seed in options.seeds if "arithmetic" in options.only]
        rows, answers = [f.result() for f in running], [f.result() for f in sums]
    # Algorithms that were not asked for stay as they were measured before.
    kept = options.data / "algorithms.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"runs": [], "arithmetic": []}
    rows = [r for r in before["runs"] if r["name"] not in options.only] + rows
    answers = answers or before["arithmetic"]
    means = [over_seeds(each) for name in names if (each := [r for r in rows if r["name"] == name])]
    result = {"runs": rows, "over_seeds": means, "arithmetic": answers}
    options.data.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_picture(picture(rows), options.data.parent / "algorithms.svg")
    print(table(rows, means))
    print(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
