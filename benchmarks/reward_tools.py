"""What a correction for length and a distillation are worth on the help desk, as JSON and tables.

    python benchmarks/reward_tools.py length --start runs/quickstart --seeds 0 1 2
    python benchmarks/reward_tools.py fair --start runs/quickstart --seeds 0 1 2
    python benchmarks/reward_tools.py distil --start runs/quickstart --seeds 0 1 2

`length`: annotators who like long replies more than gold does compare replies of the quickstart's SFT model. A reward
model learns that, and is used as it is and with each correction: its accuracy on votes of the same annotators, its
accuracy by gold on sixteen replies to each of 200 other prompts, and gold and length of the best of these sixteen.
`fair` is the same with annotators who go by gold alone, in which brevity is a part: there a correction can only harm.

`distil`: three large reward models learn from nine votes on each pair of replies to 1,200 prompts, as an ensemble. A
small model learns from the same votes; from the ensemble's scores of the same pairs; and from its scores of pairs of
replies to 1,200 other prompts, on which nobody voted. One thread; runs that have finished are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from algorithms import QUICKSTART, run
from speed import DATA, machine

from trimtab.core.config import load_run_file
from trimtab.stats import t_interval

FILE = DATA.with_name("reward_tools.json")
BIAS = 0.3
"""What ten words more are worth to the annotators, in units of gold; the world's own annotators give them 0.045."""
METHODS = ("none", "regression", "lowess")
STUDENTS = ("small on votes", "small on votes, by the teacher", "small on new pairs, by the teacher")
STAGES = load_run_file(QUICKSTART)["stages"]


def compare(start: Path, **changed: Any) -> dict[str, Any]:
    """Four replies of the SFT model to each prompt, and one vote on every two of them."""
    common = {"stage": "compare", "model": str(start / "sft/model"), "world": "helpdesk", "replies_per_prompt": 4}
    return common | {"num_held_out_prompts": 400, "sampling": STAGES["compare"]["sampling"]} | changed


def reward(model: str, data: str, **changed: Any) -> dict[str, Any]:
    """A reward model as in the quickstart."""
    kept = {name: STAGES["reward"][name] for name in ("batch_size", "optimizer")}
    own = {"stage": "reward", "model": model, "data": data, "held_out_data": "@votes/held_out.jsonl"}
    return kept | own | changed


# --- length ---


def length(start: Path, out: Path, seed: int, *, name: str = "length", bias: float = BIAS) -> dict[str, Any]:
    """The figures of one seed: of each method its premium, accuracies, and the best of sixteen."""
    parts: list[dict[str, Any]] = [{"name": "model", "path": "@reward"}]
    parts += [{"name": "model", "path": "@reward", "length_correction": method} for method in METHODS[1:]]
    best = {
        "stage": "select",
        "model": str(start / "sft/model"),
        "prompts": f"world:helpdesk?split=test&num=200&seed={seed}",
        "rewards": parts,
        "world": "helpdesk",
        "replies_per_prompt": 16,
        "sampling": STAGES["compare"]["sampling"],
    }
    biased = compare(start, num_prompts=1200, biases={"length": bias})
    stages = {"votes": biased, "reward": reward(str(start / "base/model"), "@votes/train.jsonl"), "best": best}
    directory = out / f"{name}-{seed}"
    run(stages, directory, seed=seed)
    card = json.loads((directory / "reward" / "reward_card.json").read_text(encoding="utf-8"))
    lines = (directory / "best" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line)["replies"] for line in lines]
    found: dict[str, Any] = {"seed": seed, "bayes_accuracy": card.get("bayes_accuracy")}
    found["any_gold"] = statistics.fmean(r["gold"] for row in replies for r in row)
    found["any_tokens"] = statistics.fmean(r["length"] for row in replies for r in row)
    found["best_gold"] = statistics.fmean(max(r["gold"] for r in row) for row in replies)
    for method, part in zip(METHODS, ("model", "model_2", "model_3"), strict=True):
        chosen = [max(row, key=lambda r, part=part: r["parts"][part]) for row in replies]
        found[method] = {
            "premium": card["length"][method]["premium"]["value"],
            "votes": card["length"][method]["accuracy"]["accuracy"],
            "gold": gold_accuracy(replies, part),
            "best_of_16": statistics.fmean(r["gold"] for r in chosen),
            "tokens": statistics.fmean(r["length"] for r in chosen),
        }
    return found


def gold_accuracy(replies: Sequence[Sequence[Mapping[str, Any]]], part: str) -> float:
    """Share of the pairs of replies to one prompt with different gold that a reward orders as gold does, ties half."""
    right = total = 0.0
    for row in replies:
        for a, b in combinations(row, 2):
            if a["gold"] != b["gold"]:
                ahead = (a["parts"][part] - b["parts"][part]) * (a["gold"] - b["gold"])
                right += 1.0 if ahead > 0 else 0.5 if ahead == 0 else 0.0
                total += 1
    return right / total


def length_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of the page: means over the seeds with their t intervals."""
    lines = [
        "| correction | reward of one deviation of length | accuracy on votes | accuracy by gold | gold, best of 16 "
        "| tokens, best of 16 |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        cells = [
            over_seeds([row[method][name] for row in rows], digits)
            for name, digits in (("premium", 2), ("votes", 3), ("gold", 3), ("best_of_16", 3), ("tokens", 1))
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    any_gold, best = (over_seeds([row[name] for row in rows], 3) for name in ("any_gold", "best_gold"))
    lines.append(f"| any reply |  |  |  | {any_gold} | {over_seeds([row['any_tokens'] for row in rows], 1)} |")
    lines.append(f"| best by gold |  |  |  | {best} |  |")
    return "\n".join(lines)


# --- distillation ---


def distil(start: Path, out: Path, seed: int) -> dict[str, Any]:
    """The figures of one seed: accuracy on held-out votes of the teacher and of each student, and what they keep."""
    small = STAGES["base"] | {"num_documents": 6500}
    small["architecture"] = small["architecture"] | {"num_layers": 1, "hidden_size": 64, "mlp_size": 192}
    teacher = [{"name": "model", "path": "@teacher"}]
    new = compare(start, num_prompts=1200, num_held_out_prompts=1, seed=seed + 100)
    stages = {
        "small": small,
        "votes": compare(start, num_prompts=1200, votes_per_pair=9),
        "new": new,
        "teacher": reward(str(start / "base/model"), "@votes/train.jsonl", members=3),
        "student_0": reward("@small", "@votes/train.jsonl"),
        "student_1": reward("@small", "@votes/train.jsonl", teacher=teacher),
        "student_2": reward("@small", "@new/train.jsonl", teacher=teacher),
    }
    run(stages, out / f"distil-{seed}", seed=seed)

    def card_of(name: str) -> dict[str, Any]:
        text = (out / f"distil-{seed}" / name / "reward_card.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    large = card_of("teacher")
    found: dict[str, Any] = {"seed": seed, "bayes_accuracy": large["bayes_accuracy"]}
    found["teacher"] = {"accuracy": large["accuracy"]}
    for number, name in enumerate(STUDENTS):
        card = card_of(f"student_{number}")
        kept = card.get("teacher", {})
        found[name] = {"accuracy": card["accuracy"]} | {key: kept.get(key) for key in ("agreement", "margin_spearman")}
    return found


def distil_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of the page: means over the seeds with their t intervals."""
    lines = [
        "| model | accuracy on held-out votes | pairs ordered as the teacher does | Spearman of the margins |",
        "|---|---|---|---|",
    ]
    lines.append(f"| limit of the votes | {over_seeds([row['bayes_accuracy'] for row in rows], 3)} |  |  |")
    for name in ("teacher", *STUDENTS):
        cells = [
            over_seeds([row[name][key] for row in rows], 3) if rows[0][name].get(key) is not None else ""
            for key in ("accuracy", "agreement", "margin_spearman")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_seeds(values: Sequence[float], digits: int) -> str:
    """The mean with Student's t interval."""
    found = t_interval(list(values))
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


PARTS: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {
    "length": length,
    "fair": partial(length, name="fair", bias=0.0),
    "distil": distil,
}
TABLES = {"length": length_table, "fair": length_table, "distil": distil_table}


def main() -> None:
    """Runs one part, writes what was found and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"), help="A quickstart: its base and SFT.")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_tools"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    start = options.start.resolve()
    rows = [PARTS[options.part](start, options.out, seed) for seed in options.seeds]
    # The other parts stay as they were measured before.
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    found |= {options.part: rows, "machine": machine()}
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(TABLES[options.part](rows))


if __name__ == "__main__":
    main()
