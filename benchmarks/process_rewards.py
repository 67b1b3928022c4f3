"""Process against outcome reward models on sums with worked steps: best-of-n beside majority vote, and PPO.

    python benchmarks/process_rewards.py --seeds 0 1 2

The stages are those of `examples/arithmetic/process.toml`. One base is made, with seed 0; each seed has demonstrations,
an SFT model, step labels, reward models, replies and PPO runs of its own. Both reward models learn from the same
replies, whose steps are labelled by completions of the SFT model (`trimtab steps`); nothing but final numbers is
compared. All ways of choosing choose among the same replies. PPO begins from the SFT model and a critic that begins as
that; the runs differ in the reward and in where it is paid. Everything runs on one thread, and runs that
have finished are not repeated. `docs/evidence/reward-models.md` has the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from algorithms import ROOT, run
from results import write_result
from speed import DATA

from trimtab.core import seeds
from trimtab.core.config import load_run_file
from trimtab.evals.overoptimisation import best_of_each, sizes_up_to
from trimtab.stats import Floats, bootstrap_mean, paired_difference, t_interval
from trimtab.worlds.arithmetic import find_answer

OUT = DATA.with_name("process_rewards.json")
RUN_FILE = ROOT / "examples" / "arithmetic" / "process.toml"
WORLD = "examples/arithmetic/sums.py:Sums"
LARGEST = 64
SIZES = sizes_up_to(LARGEST)
KL_COEF = 0.05
LOG_ODDS = 0.25
"""Weight of the outcome reward, which is in log-odds: at even odds a step of them is a quarter of a probability."""
TRIALS = 100
"""Draws of n replies to a prompt over which a vote is averaged."""
NUM_TESTED = 500
PROCESS, OUTCOME, VOTE, ANY = "process reward", "outcome reward", "majority vote", "any of them right"
STEPS, END, OUTCOME_END = (
    "process reward, paid by steps",
    "process reward, paid at the end",
    "outcome reward, paid at the end",
)
DIFFERENCES = {
    "choosing": ((PROCESS, OUTCOME), (PROCESS, VOTE), (OUTCOME, VOTE)),
    "ppo": ((STEPS, END), (STEPS, OUTCOME_END)),
}
"""Which ways are compared, prompt by prompt."""


# --- models and replies ---


def models(out: Path, seed: int, num_replies: int) -> Path:
    """The directory with the seed's SFT model, reward models and replies to test prompts."""
    stages = load_run_file(RUN_FILE)["stages"]
    run({"base": stages["base"]}, out / "base", seed=0)
    base = str(out / "base" / "base" / "model")
    made = {
        "sft": stages["sft"] | {"model": base, "data": f"world:{WORLD}?num=600&seed={10 * seed}"},
        "steps": stages["steps"] | {"data": f"world:{WORLD}?num={num_replies}&seed={10 * seed + 2}"},
        "process": stages["process"] | {"model": base},
        "outcome": stages["outcome"] | {"model": base},
        "select": stages["select"] | {"replies_per_prompt": LARGEST},
    }
    directory = out / f"seed-{seed}-replies-{num_replies}" / "models"
    run(made, directory, seed=seed)
    return directory


def trained(directory: Path, rewards: Mapping[str, Any], *, name: str, seed: int, num_steps: int) -> Floats:
    """[N] whether PPO by this reward ends with a policy that answers each test prompt right."""
    stage = {
        "stage": "online",
        "model": str(directory / "sft" / "model"),
        "prompts": f"world:{WORLD}?num=4000&seed=1",
        "rewards": [rewards],
        "world": WORLD,
        "kl": {"name": "fixed", "coef": KL_COEF},
        "prompts_per_step": 16,
        "group_size": 4,
        "num_steps": num_steps,
        "num_epochs": 2,
        "num_minibatches": 2,
        "optimizer": {"learning_rate": 2e-4},
        "critic": {"init": "policy", "optimizer": {"learning_rate": 1e-3}, "warmup_steps": 2},
        "sampling": {"max_new_tokens": 40},
    }
    out = directory.parent / f"{name.replace(', ', '-').replace(' ', '_')}-{num_steps}-steps"
    run({"ppo": stage}, out, seed=seed)
    return answered(out / "ppo" / "model", out.with_name(f"{out.name}-test"))


def answered(model: Path, out: Path) -> Floats:
    """[N] whether one reply of a policy to each test prompt is right; all draw with the same random numbers."""
    settings = {
        "stage": "select",
        "model": str(model),
        "prompts": f"world:{WORLD}?split=test&num={NUM_TESTED}&seed=8",
        "rewards": ["exact_answer"],
        "world": WORLD,
        "replies_per_prompt": 1,
        "sampling": {"max_new_tokens": 40, "batch_size": 512},
    }
    run({"test": settings}, out, seed=0)
    return np.array([row["replies"][0]["gold"] for row in rows_of(out / "test" / "replies.jsonl")])


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- choosing ---


def chosen(replies: Path) -> dict[str, Floats]:
    """For each way of choosing [N, len(SIZES)]: the chance that the reply chosen of n to each prompt is right."""
    rows = [row["replies"] for row in rows_of(replies)]
    gold, process, outcome = (
        np.array([[take(reply) for reply in row] for row in rows], dtype=float)
        for take in (lambda r: r["gold"], lambda r: r["parts"]["process"], lambda r: r["parts"]["model"])
    )
    answers = [[find_answer(reply["response"]) for reply in row] for row in rows]
    return {
        PROCESS: best_of_each(gold, process, SIZES),
        OUTCOME: best_of_each(gold, outcome, SIZES),
        VOTE: np.array([vote(*both, number) for number, both in enumerate(zip(answers, gold, strict=True))]),
        ANY: best_of_each(gold, gold, SIZES),
    }


def vote(
    answers: Sequence[str | None], right: Floats, number: int, *, sizes: Sequence[int] = SIZES, trials: int = TRIALS
) -> Floats:
    """[len(sizes)] how often the most frequent answer among n replies is right, over draws of them without replacement.
    Replies without an answer have no vote; equally frequent answers share the outcome. `number` seeds the draws."""
    known = sorted({answer for answer in answers if answer is not None})
    if not known:
        return np.zeros(len(sizes))
    votes = np.array([[answer == one for one in known] for answer in answers], dtype=float)
    is_right = np.array([right[answers.index(one)] for one in known])
    draw = seeds.generator(number, "vote")
    found = np.zeros(len(sizes))
    for _ in range(trials):
        counts = votes[draw.permutation(len(answers))].cumsum(0)[np.array(sizes) - 1]
        winners = (counts == counts.max(1, keepdims=True)) & (counts > 0)
        found += (winners * is_right).sum(1) / np.maximum(winners.sum(1), 1)
    return found / trials


# --- seeds ---


def one_seed(out: Path, seed: int, *, num_steps: int, num_replies: int) -> dict[str, Any]:
    """What one seed shows: shares of right answers, and differences with their intervals over prompts."""
    directory = models(out, seed, num_replies)
    by_way = chosen(directory / "select" / "replies.jsonl")
    process = {"name": "process", "path": str(directory / "process" / "model")}
    outcome = {"name": "model", "path": str(directory / "outcome" / "model"), "weight": LOG_ODDS}
    arms = {STEPS: process | {"credit": "differences"}, END: process, OUTCOME_END: outcome}
    ppo = {"SFT": answered(directory / "sft" / "model", directory.parent / "sft-test")} | {
        name: trained(directory, reward, name=name, seed=seed, num_steps=num_steps) for name, reward in arms.items()
    }
    judged = {
        name: {key: found[key] for key in ("label_accuracy", "right_fraction")}
        for name in ("process", "outcome")
        for found in [json.loads((directory / name / "summary.json").read_text(encoding="utf-8"))]
    }
    largest = {name: table[:, -1] for name, table in by_way.items()}
    return {
        "seed": seed,
        "labels": judged,
        "choosing": {name: table.mean(0).tolist() for name, table in by_way.items()},
        "ppo": {name: bootstrap_mean(right, shares=True).named("right") for name, right in ppo.items()},
        "differences": {
            f"{one} − {other}": paired_difference(scores[one], scores[other]).named("difference")
            for part, scores in (("choosing", largest), ("ppo", ppo))
            for one, other in DIFFERENCES[part]
        },
    }


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds with Student's intervals."""
    choosing = {
        name: [
            {"n": n} | t_interval([row["choosing"][name][i] for row in rows]).named("right")
            for i, n in enumerate(SIZES)
        ]
        for name in rows[0]["choosing"]
    }
    ppo = {name: t_interval([row["ppo"][name]["right"] for row in rows]).named("right") for name in rows[0]["ppo"]}
    differences = {
        name: t_interval([row["differences"][name]["difference"] for row in rows]).named("difference")
        for name in rows[0]["differences"]
    }
    return {"choosing": choosing, "ppo": ppo, "differences": differences}


# --- tables ---


def choosing_table(means: Mapping[str, Any]) -> str:
    """The rows of the page: the share of right answers for each n, and its interval for the largest."""
    lines = [f"| chosen by | {' | '.join(f'n = {n}' for n in SIZES)} |", "|" + "---|" * (len(SIZES) + 1)]
    for name, curve in means["choosing"].items():
        cells = [f"{point['right']:.1%}" for point in curve]
        low, high = max(curve[-1]["right_low"], 0.0), min(curve[-1]["right_high"], 1.0)
        cells[-1] += f" [{low:.1%}, {high:.1%}]"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ppo_table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any]) -> str:
    """The rows of the page: the share of right answers of each policy."""
    lines = ["| policy | right, each seed | mean [95% over seeds] |", "|---|---|---|"]
    for name, mean in means["ppo"].items():
        each = " · ".join(f"{row['ppo'][name]['right']:.1%}" for row in rows)
        lines.append(f"| {name} | {each} | {mean['right']:.1%} [{mean['right_low']:.1%}, {mean['right_high']:.1%}] |")
    return "\n".join(lines)


def differences_table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any]) -> str:
    """The rows of the page: differences on the same prompts."""
    lines = ["| difference | each seed [95% over prompts] | mean [95% over seeds] |", "|---|---|---|"]
    for name, mean in means["differences"].items():
        cells = [
            f"{found['difference']:+.1%} [{found['difference_low']:+.1%}, {found['difference_high']:+.1%}]"
            for found in [*(row["differences"][name] for row in rows), mean]
        ]
        lines.append(f"| {name} | {' · '.join(cells[:-1])} | {cells[-1]} |")
    return "\n".join(lines)


def main() -> None:
    """Runs all, writes what was found and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "process_rewards")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="of PPO, 64 replies each")
    parser.add_argument("--replies", type=int, default=6000, help="whose steps are labelled")
    options = parser.parse_args()
    sizes = {"num_steps": options.steps, "num_replies": options.replies}
    rows = [one_seed(options.out.resolve(), seed, **sizes) for seed in options.seeds]
    means = over_seeds(rows)
    write_result(OUT, options, runs=rows, over_seeds=means)
    for table in (choosing_table(means), ppo_table(rows, means), differences_table(rows, means)):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
