"""The Pareto front of helpfulness against harm: a sweep over limits or weights on the help desk with a harm side.

    python benchmarks/front.py --seeds 0 1 --limits 0.05 0.1 0.2 0.3 0.4
    python benchmarks/front.py --seeds 0 1 --limits --weights 0.2 0.4 0.6 0.8 1

The runs are those of `objectives.py`, from its SFT model or the one that `--sft` names: GRPO for the world's own
helpfulness, alone, with a limit on the mean of its part `harm`, or with the reward less a weight times harm. Every
policy, and the SFT model, then answers the same test prompts, with several replies to each. Its means of helpfulness
and of harmless replies are a point; the area is that between the front of a seed's points and the worst there is: no
help, and harm in every reply. Runs that have finished are not repeated; `docs/evidence/reward-models.md` has figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from algorithms import run
from objectives import WORLD, start, trained
from pictures import write_picture
from results import mean_over_seeds, write_result
from speed import DATA

from trimtab.evals.pareto import hypervolume_interval, pareto_front
from trimtab.reports.charts import PALETTE, Axis, Chart
from trimtab.stats import Floats, bootstrap_mean

OUT = DATA.with_name("front.json")
PICTURE = DATA.parents[1] / "front.svg"
REFERENCE = (0.0, 0.0)
"""The worst helpfulness, and the worst share of harmless replies."""
NUM_PROMPTS = 300
PROMPTS = f"world:{WORLD}?split=test&num={NUM_PROMPTS}&seed=7"
REPLIES = 4
SFT, ALONE = "SFT", "helpfulness alone"


def variants(limits: Sequence[float], weights: Sequence[float]) -> dict[str, dict[str, float]]:
    """What is asked of each run, by the name of its point."""
    return (
        {ALONE: {}} | {f"limit {x:g}": {"limit": x} for x in limits} | {f"weight {x:g}": {"weight": x} for x in weights}
    )


def tested(model: Path, out: Path) -> Floats:
    """[N, 2] helpfulness and share of harmless replies of a policy, for each test prompt."""
    gold = {"name": "gold", "world": WORLD}
    settings = {
        "stage": "select",
        "model": str(model),
        "prompts": PROMPTS,
        "rewards": [gold, gold | {"part": "harm"}],
        "replies_per_prompt": REPLIES,
        "sampling": {"max_new_tokens": 48, "batch_size": 512},
    }
    run({"test": settings}, out, seed=0)
    rows = map(json.loads, (out / "test" / "replies.jsonl").read_text(encoding="utf-8").splitlines())
    parts = [[reply["parts"] for reply in row["replies"]] for row in rows]
    return np.array([[[p["gold"], 1 - p["gold_2"]] for p in of_prompt] for of_prompt in parts]).mean(1)


def one_seed(sft: Path, out: Path, asked: Mapping[str, Mapping[str, float]], seed: int, **how: Any) -> dict[str, Any]:
    """The points of one seed, which of them are on the front, and its area."""
    scores = {SFT: tested(sft, out / "sft-test")}
    for name, variant in asked.items():
        directory = trained(sft, out, seed=seed, **variant, **how)
        scores[name] = tested(directory / "grpo" / "model", directory.with_name(f"{directory.name}-test"))
    points = [
        {
            "name": name,
            **bootstrap_mean(means[0]).named("helpfulness"),
            **bootstrap_mean(means[1]).named("harmless"),
        }
        for name, means in ((name, table.T) for name, table in scores.items())
    ]
    area = hypervolume_interval(np.stack(list(scores.values())), REFERENCE)
    return {"seed": seed, "points": points, "front": front_of(points), **area.named("hypervolume")}


def front_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the points on the front, the most helpful first."""
    return [points[i]["name"] for i in reversed(pareto_front([(p["helpfulness"], p["harmless"]) for p in points]))]


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each point and of the area over the seeds, and in how many of them the point is on the front."""
    points = []
    for number, name in enumerate(point["name"] for point in rows[0]["points"]):
        entry: dict[str, Any] = {"name": name, "num_on_front": sum(name in row["front"] for row in rows)}
        for what in ("helpfulness", "harmless"):
            entry |= mean_over_seeds([row["points"][number] for row in rows], what)
        points.append(entry)
    return {"points": points, **mean_over_seeds(rows, "hypervolume")}


def table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any]) -> str:
    """The rows of the page: a row a policy, then the areas."""
    lines = ["| policy | helpfulness | harmless replies | on the front |", "|---|---|---|---|"]
    for number, entry in enumerate(means["points"]):
        cells = [entry["name"]]
        for what in ("helpfulness", "harmless"):
            cells.append(_with_each(entry, what, [row["points"][number][what] for row in rows]))
        lines.append("| " + " | ".join([*cells, f"{entry['num_on_front']} of {len(rows)}"]) + " |")
    area = _with_each(means, "hypervolume", [row["hypervolume"] for row in rows])
    return "\n".join([*lines, f"| area of the front | {area} | | |"])


def _with_each(entry: Mapping[str, Any], name: str, each: Sequence[float]) -> str:
    mean = f"{entry[name]:.3f} [{entry[f'{name}_low']:.3f}, {entry[f'{name}_high']:.3f}]"
    return f"{mean} ({' · '.join(f'{x:.3f}' for x in each)})" if len(each) > 1 else mean


def picture(rows: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    """The points of every seed, and its front as a line."""
    chart = Chart(Axis("share of harmless replies"), Axis("helpfulness (gold)"), 420, wide=True)
    for row, colour in zip(rows, PALETTE, strict=False):
        points = {point["name"]: (point["harmless"], point["helpfulness"]) for point in row["points"]}
        chart.legend.append((f"seed {row['seed']}", colour))
        chart.line(*zip(*(points[name] for name in row["front"]), strict=True), colour, size=1.5)
        chart.dots(*zip(*points.values(), strict=True), [colour], [f"{name}, seed {row['seed']}" for name in points])
    for entry in over_seeds(rows)["points"]:
        chart.texts([entry["harmless"]], [entry["helpfulness"] + 0.012], "#5c6675", [entry["name"]])
    return {"Helpfulness against harmless replies, and the Pareto front of each seed": chart}


def main() -> None:
    """Runs, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--sft", type=Path, help="a model to begin with, such as that of a quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--limits", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--weights", type=float, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--damping", type=float, default=8.0)
    options = parser.parse_args()
    sft = options.sft.resolve() if options.sft else start(options.out)
    asked = variants(options.limits, options.weights)
    how = {"num_steps": options.steps, "rate": options.rate, "damping": options.damping}
    rows = [one_seed(sft, options.out, asked, seed, **how) for seed in options.seeds]
    means = over_seeds(rows)
    sizes = {"num_prompts": NUM_PROMPTS, "replies_per_prompt": REPLIES, "reference": REFERENCE}
    write_result(OUT, options, **sizes, seeds=rows, over_seeds=means)
    write_picture(picture(rows), PICTURE)
    print(table(rows, means))


if __name__ == "__main__":
    main()
