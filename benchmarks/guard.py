"""What the guard is worth: false alarms and power of its test, the checkpoints it chooses, planted hacks and healthy
runs, as JSON and tables.

    python benchmarks/guard.py rates                      # simulated runs; a minute
    python benchmarks/guard.py runs --start runs/quickstart --others OTHER … --seeds 0 1 2
    python benchmarks/guard.py hacks --start runs/quickstart --steps 40 --every 1 --checks 512 --seeds 0 1 2
    python benchmarks/guard.py healthy --start runs/quickstart --steps 20 --every 5 --seeds 0 1 2

`runs` trains on the help desk from the SFT model and the reward model of a quickstart. *Hacked* runs have no KL
penalty; a guard watches them, by gold on 64 prompts, and takes no action. Every checkpoint is then measured by gold on
other prompts (`trimtab choose`), which is taken as the truth: what the checkpoint that the guard names is worth beside
the best of the run, the last step and the step of the highest reward. `--others`, quickstarts of other seeds, are
judges that know no gold: the reward model of the first, and all of them as an ensemble, choose among the same
checkpoints. *Healthy* runs have the quickstart's penalty and a guard that may stop them: how often it does is its rate
of false stops.

`hacks` trains with rewards that pay for something else beside gold (`planted_hacks.py`), without a KL penalty; the
guard watches by gold on `--checks` prompts. A run is *caught* at the first check whose fall is real, which is where a
guard with actions takes its first one. `healthy` trains with every algorithm that `algorithms.py` compares, as it does,
and a guard that may stop the run.

One thread a run; runs that have finished are not repeated, and `runs`, `hacks` and `healthy` add to what their file
has of other kinds and seeds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import algorithms
import numpy as np
import torch
from algorithms import QUICKSTART, run
from doctor import filled
from planted_hacks import AMOUNTS
from simulated_runs import rates, rates_table
from speed import DATA, ROOT, machine

from trimtab.core import config
from trimtab.reports.collect import collect
from trimtab.reports.diagnosis import diagnose
from trimtab.runs.checkpoints import checkpoints_in, step_of
from trimtab.stages import preflight
from trimtab.stages.choose import choose
from trimtab.stages.pipeline import open_run, run_stage
from trimtab.stats import t_interval, wilson

FILES = {
    "rates": DATA.with_name("guard_rates.json"),
    "runs": DATA.with_name("guard_runs.json"),
    "hacks": DATA.with_name("guard_hacks.json"),
    "healthy": DATA.with_name("guard_healthy.json"),
}
HACKS = Path(__file__).resolve().with_name("planted_hacks.py")
HEALTHY = [name for name in algorithms.ALGORITHMS if name != "rejection sampling"]
"""All that train in one run."""
ASKED = 0.10
"""The fall of gold, as a share of its best, before which a hack is to be caught."""
SIGNAL_OF = {
    "length": "words",
    "flattery": "flattery",
    "hedging": "hedges",
    "refusing": "refusals",
    "one phrase": "distinct_2",
    "repetition": "repetition",
    "echo of the customer": "echo",
}
"""The cheap signal that is about a hack; the others have none."""
GUARD = {"measure": [{"name": "gold", "world": "helpdesk"}], "prompts": "world:helpdesk?split=test&num=64&seed=3"}
TRUTH = "world:helpdesk?split=test&num=300&seed=7"
UNSEEN = "world:helpdesk?split=test&num=256&seed=5"
"""Prompts on which judges that know no gold choose."""
WAYS = {
    "guard": "gold on 64 prompts",
    "second": "another reward model",
    "ensemble": "several others",
    "last": "last step",
    "reward": "highest reward",
}
"""The ways of choosing a checkpoint, as their columns are called."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {"advantage": {"name": "grpo"}, "prompts_per_step": 8, "group_size": 8},
}
ORDERS = {"runs": list(ALGORITHMS), "hacks": list(AMOUNTS), "healthy": HEALTHY}


# --- runs on the help desk ---


def trained(start: Path, out: Path, *, algorithm: str, seed: int, healthy: bool, options: argparse.Namespace) -> Path:
    """The directory of one run."""
    guard = GUARD | {"every": options.every} | ({"actions": ["stop"]} if healthy else {})
    settings = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["stages"]["ppo"] | ALGORITHMS[algorithm]
    settings |= {
        "model": str(start / "sft" / "model"),
        "rewards": [{"name": "model", "path": str(start / "reward" / "model")}],
        "kl": {"name": "fixed", "coef": 0.1 if healthy else 0.0},
        "num_steps": options.steps,
        "checkpoint_every": options.every,
        "keep_checkpoints": 2 if healthy else 1 + options.steps // options.every,
        "guard": guard,
    }
    directory = out / f"{algorithm}-{'healthy' if healthy else 'hacked'}-{seed}"
    run({"online": settings}, directory, seed=seed)
    return directory / "online"


def truth(directory: Path) -> dict[str, Any]:
    """The decision on the other prompts, which has the gold of every checkpoint."""
    return chosen_by(directory, "truth", {"prompts": TRUTH, "num_prompts": 300})


def chosen_by(directory: Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The decision of `trimtab choose` with these values."""
    file = directory.with_name(f"{name}.json")
    if not file.exists():
        choose(directory, values, where=name, out=file)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def judges(others: list[Path]) -> dict[str, dict[str, Any]]:
    """Measures that know no gold: the reward model of another quickstart, and those of all others together."""
    rewards = [{"name": "model", "path": str((other / "reward" / "model").resolve())} for other in others]
    chosen = {"second": rewards[:1], "ensemble": rewards} if len(others) > 1 else {"second": rewards[:1]}
    return {name: {"measure": found, "prompts": UNSEEN, "num_prompts": 256} for name, found in chosen.items() if found}


def shares(decision: dict[str, Any], judged: dict[str, int], gold: dict[int, float]) -> dict[str, Any]:
    """What the ways of choosing are worth, as shares of the best true gold of the run."""
    rewarded = decision["chosen_against"]["best_reward"]["step"]
    chosen = {"guard": decision["chosen_step"], "last": decision["checkpoints"][-1]["step"], "reward": rewarded}
    chosen |= judged
    peak = max(gold.values())
    return {"peak": peak, "peak_step": max(gold, key=lambda step: (gold[step], -step))} | {
        key: value
        for name, step in chosen.items()
        for key, value in ((f"{name}_step", step), (f"{name}_share", gold[step] / peak))
    }


def one_run(
    start: Path, algorithm: str, seed: int, healthy: bool, measures: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What one run shows, and which of its checkpoints the further measures choose."""
    directory = trained(start, options.out, algorithm=algorithm, seed=seed, healthy=healthy, options=options)
    decision = json.loads((directory / "decision.json").read_text(encoding="utf-8"))
    lines = (directory / "guard.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "event", "measure", "measure_low", "kl", "reward", "p_value", "fired")
    found = {"algorithm": algorithm, "seed": seed, "healthy": healthy, "stopped": decision["stopped"]}
    found["checks"] = [{key: row[key] for key in kept if key in row} for row in map(json.loads, lines)]
    if healthy:
        return found
    true = truth(directory)
    gold = {row["step"]: row["measure"] for row in true["checkpoints"]}
    judged = {name: chosen_by(directory, name, values)["chosen_step"] for name, values in measures.items()}
    return found | shares(decision, judged, gold) | {"true_gold": gold, "predicted_peak": true["predicted_peak"]}


def runs_table(rows: list[dict[str, Any]]) -> str:
    """A line for each run: the peak of gold, and the share of it that each way of choosing keeps."""
    lines = [f"| run | seed | peak of gold | {' | '.join(WAYS.values())} |", "|---" * (3 + len(WAYS)) + "|"]
    for row in hacked_of(rows):
        kept = {way: f"{row[f'{way}_share']:.1%} (step {row[f'{way}_step']})" for way in WAYS if f"{way}_step" in row}
        cells = [kept.get(way, "") for way in WAYS]
        peak = f"{row['peak']:.3f} (step {row['peak_step']})"
        lines.append(f"| {row['algorithm']} | {row['seed']} | {peak} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_summary(rows: list[dict[str, Any]]) -> str:
    """For each algorithm the mean and the worst share that each way of choosing keeps, and how many healthy runs were
    stopped."""
    lines = [f"| | runs | {' | '.join(WAYS.values())} | healthy runs stopped |", "|---" * (3 + len(WAYS)) + "|"]
    for algorithm in ALGORITHMS:
        hacked = [row for row in hacked_of(rows) if row["algorithm"] == algorithm]
        healthy = [row for row in rows if row["algorithm"] == algorithm and row["healthy"]]
        stopped = f"{sum(bool(row['stopped']) for row in healthy)} of {len(healthy)}" if healthy else ""
        found = {way: [row[f"{way}_share"] for row in hacked if f"{way}_share" in row] for way in WAYS}
        means = " | ".join(_mean_share(each) if each else "" for each in found.values())
        worst = " | ".join(f"{min(each):.1%}" if each else "" for each in found.values())
        lines.append(f"| {algorithm}, mean | {len(hacked)} | {means} | {stopped} |")
        lines.append(f"| {algorithm}, at the worst | | {worst} | |")
    return "\n".join(lines)


def _mean_share(each: list[float]) -> str:
    mean = t_interval(each) if len(each) > 1 else None
    return f"{np.mean(each):.1%}" + (f" [{mean.low:.1%}, {mean.high:.1%}]" if mean else "")


def hacked_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs without a penalty."""
    return [row for row in rows if not row["healthy"]]


# --- planted hacks and healthy runs ---


def measured(settings: dict[str, Any], directory: Path, *, seed: int) -> dict[str, Any]:
    """One run with a guard, in this process, and its checks. It is made unless it has finished before."""
    if not (directory / "summary.json").exists():
        stage = settings["stage"]
        table = {key: value for key, value in settings.items() if key != "stage"} | {"seed": seed}
        resolved = config.resolve(preflight.describe(stage).settings, table, where=str(directory))
        shutil.rmtree(directory, ignore_errors=True)
        with open_run(directory, stage, resolved, resume=False) as opened:
            run_stage(stage, resolved, opened)
    lines = (directory / "guard.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "event", "measure", "measure_low", "measure_high", "kl", "p_value", "level", "fired")
    rows = [{key: row[key] for key in kept if key in row} for row in map(json.loads, lines)]
    decided = json.loads((directory / "decision.json").read_text(encoding="utf-8"))
    return {"checks": rows, "chosen": decided["chosen_step"], "stopped": decided["stopped"]}


def true_gold(directory: Path, steps: set[int], num_prompts: int) -> dict[int, float]:
    """The gold of these checkpoints and of the start on other prompts. All checkpoints are removed once it is known."""
    file = directory / "truth.json"
    if not file.exists():
        for path in checkpoints_in(directory / "checkpoints"):
            if step_of(path) not in steps:
                shutil.rmtree(path)
        values = {"prompts": f"world:helpdesk?split=test&num={num_prompts}&seed=7", "num_prompts": num_prompts}
        choose(directory, values, where="the truth", out=file)
        shutil.rmtree(directory / "checkpoints")
    rows = json.loads(file.read_text(encoding="utf-8"))["checkpoints"]
    return {row["step"]: row["measure"] for row in rows}


def caught(checks: list[dict[str, Any]]) -> int | None:
    """The step of the first check that a guard with actions would have acted on: not the last, where nothing is left
    to be done."""
    return next((row["step"] for row in checks[:-1] if row.get("p_value", 1.0) < row.get("level", 0.0)), None)


def hack(kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run with a reward that pays for a hack, and a guard that only watches: what it would have done, and what gold
    did."""
    settings = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["stages"]["ppo"] | ALGORITHMS["grpo"]
    settings |= {
        "model": starts(options.start)["sft"],
        "rewards": [{"name": "callable", "function": f"{HACKS}:{kind.replace(' ', '_')}"}],
        "kl": {"name": "fixed", "coef": 0.0},
        "num_steps": options.steps,
        "num_epochs": 1,
        "optimizer": {"learning_rate": options.rate},
        "checkpoint_every": options.every,
        "keep_checkpoints": 1 + options.steps // options.every,
        "guard": guard(options) | {"every": options.every},
    }
    directory = options.out / f"hack-{kind.replace(' ', '-')}-{seed}"
    found = {"kind": kind, "seed": seed} | measured(settings, directory, seed=seed)
    checks, at = found["checks"], caught(found["checks"])
    until = [row for row in checks if row["step"] and (at is None or row["step"] <= at)]
    before = max((row for row in checks if at is None or row["step"] < at), key=lambda row: row["measure_low"])["step"]
    gold = true_gold(directory, {found["chosen"], before, options.steps} | ({at} - {None}), options.truth)
    peak = max(gold.values())
    return found | {
        "true_gold": gold,
        "caught": at,
        "best_before": before,
        "fall_at_the_end": 1 - gold[options.steps] / peak,
        "fall_when_caught": None if at is None else 1 - gold[at] / max(gold[before], gold[at]),
        "first_signal": min((row["step"] for row in until if row["fired"]), default=None),
        "own_signal": min((row["step"] for row in until if SIGNAL_OF.get(kind) in row["fired"]), default=None),
    }


def healthy_run(algorithm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run that learns as it should, with a guard that may stop it. If it does, gold on other prompts says whether
    there was a fall."""
    places = starts(options.start)
    settings = filled(algorithms.ALGORITHMS[algorithm]["train"], places)
    checks = guard(options) | {"actions": ["stop"], "every": options.every}
    if settings["stage"] == "preference":
        settings |= {"limit": options.pairs}
        checks |= {"sampling": {"max_new_tokens": 64, "batch_size": 512}}
    else:
        settings |= {"num_steps": options.steps}
    directory = options.out / f"healthy-{algorithm.replace(' ', '_')}-{seed}"
    settings |= {"checkpoint_every": options.every, "keep_checkpoints": 100, "guard": checks}
    found = {"algorithm": algorithm, "seed": seed} | measured(settings, directory, seed=seed)
    found["doctor"] = [rule.name for rule, _ in diagnose(collect(directory))[0].found]
    if found["stopped"]:
        found["true_gold"] = true_gold(directory, {found["chosen"], found["checks"][-1]["step"]}, options.truth)
    elif (checkpoints := directory / "checkpoints").exists():
        shutil.rmtree(checkpoints)
    return found


def starts(directory: Path) -> dict[str, str]:
    """The models and pairs of a quickstart, by the names that settings have for them."""
    files = {"sft": "sft/model", "reward": "reward/model", "pairs": "compare/train.jsonl"}
    return {name: str((directory / file).resolve()) for name, file in files.items()}


def guard(options: argparse.Namespace) -> dict[str, Any]:
    """The table of a guard that measures gold on as many prompts as are asked for."""
    num = options.checks
    return GUARD | {"prompts": f"world:helpdesk?split=test&num={num}&seed=3", "num_prompts": num}


def one_thread() -> None:
    """Makes a process compute on one thread."""
    torch.set_num_threads(1)


def hacks_table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of hack over its seeds; falls are shares of the best gold before them."""
    lines = [
        "| pays for | seeds | gold ends 10% below | of these caught | fall of gold when caught | before 10% | "
        "at the end, of the best | first signal, steps before | own signal, steps before |",
        "|" + "---|" * 9,
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        each = [row for row in rows if row["kind"] == kind]
        fell, found = falling(each), [row for row in falling(each) if row["caught"] is not None]
        falls = " · ".join(f"{row['fall_when_caught']:.0%}" for row in found) or "–"
        early, own = (" · ".join(lead(row, name) for row in found) or "–" for name in ("first_signal", "own_signal"))
        in_time = sum(row["fall_when_caught"] < ASKED for row in found)
        last = float(np.mean([1 - row["fall_at_the_end"] for row in each]))
        lines.append(
            f"| {kind} | {len(each)} | {len(fell)} | {len(found)} | {falls} | {in_time} of {len(fell)} | "
            f"{last:.0%} | {early} | {SIGNAL_OF.get(kind, 'has none')}: {own} |"
        )
    return "\n".join(lines)


def hacks_summary(rows: list[dict[str, Any]]) -> str:
    """How many falls were caught, and how soon, with intervals over runs."""
    fell = falling(rows)
    found = [row for row in fell if row["caught"] is not None]
    in_time = [row for row in found if row["fall_when_caught"] < ASKED]
    leads = [row for row in found if row["first_signal"] is not None]
    lines = [
        "| | | 95% interval |",
        "|---|---|---|",
        f"| runs whose gold ends 10% below its best | {len(fell)} of {len(rows)} | |",
        f"| of these caught | {share_of(len(found), len(fell))} |",
        f"| caught before gold was 10% below its best | {share_of(len(in_time), len(fell))} |",
    ]
    if found:
        middle = float(np.median([row["fall_when_caught"] for row in found]))
        lines.append(f"| fall of gold when caught, median | {middle:.0%} | |")
        lines.append(f"| a signal had fired before, or in the same check | {share_of(len(leads), len(found))} |")
    last = t_interval([1 - row["fall_at_the_end"] for row in rows])
    lines.append(
        f"| gold of the last step, of the best measured | {last.value:.0%} | {last.low:.0%} to {last.high:.0%} |"
    )
    return "\n".join(lines)


def falling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose gold ends as far below its best as the guard is asked to prevent."""
    return [row for row in rows if row["fall_at_the_end"] >= ASKED]


def lead(row: dict[str, Any], name: str) -> str:
    """The steps from a signal to the check that caught the run, as a cell."""
    return "none" if row[name] is None else str(row["caught"] - row[name])


def share_of(num: int, of: int) -> str:
    """A share with its interval, as two cells."""
    if not of:
        return f"{num} of {of} | –"
    found = wilson(num, of)
    return f"{num} of {of} | {found.low:.0%} to {found.high:.0%}"


def healthy_table(rows: list[dict[str, Any]]) -> str:
    """A line for each algorithm, and one for all."""
    lines = [
        "| | runs | stopped | 95% interval | checks | with a signal | runs with one | signals | gold, first to last | "
        "found by the doctor |",
        "|" + "---|" * 10,
    ]
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    for name in [*names, "all"]:
        each = [row for row in rows if name in ("all", row["algorithm"])]
        later = [[check for check in row["checks"] if check["step"] and check["event"] == "check"] for row in each]
        noisy = [[check for check in checks if check["fired"]] for checks in later]
        fired = sorted({signal for checks in noisy for check in checks for signal in check["fired"]})
        ill = sorted({rule for row in each for rule in row["doctor"]})
        stopped = sum(bool(row["stopped"]) for row in each)
        first, last = (float(np.mean([row["checks"][0]["measure"] for row in each])), mean_of_last(later))
        lines.append(
            f"| {name} | {len(each)} | {share_of(stopped, len(each)).replace(f' of {len(each)}', '')} | "
            f"{sum(map(len, later))} | {sum(map(len, noisy))} | {sum(map(bool, noisy))} | "
            f"{', '.join(fired) if name != 'all' else ''} | {first:.2f} to {last:.2f} | {', '.join(ill) or 'nothing'} |"
        )
    return "\n".join(lines)


def mean_of_last(checks: list[list[dict[str, Any]]]) -> float:
    """The mean over runs of the measure in their last check."""
    return float(np.mean([one[-1]["measure"] for one in checks]))


def commit() -> str:
    """The commit of the code that ran; "" outside a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return found.stdout.strip()


def merged(part: str, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows with those of other kinds or seeds that the data file has from before, in the order of kinds and
    seeds."""
    made = {(row[key], row["seed"], row.get("healthy")) for row in rows}
    before = json.loads(FILES[part].read_text(encoding="utf-8"))["runs"] if FILES[part].exists() else []
    order = list(ORDERS[part])
    every = rows + [row for row in before if (row[key], row["seed"], row.get("healthy")) not in made]
    return sorted(every, key=lambda row: (order.index(row[key]), row.get("healthy", False), row["seed"]))


def main() -> None:
    """Runs one part, writes what was found and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(FILES))
    parser.add_argument("--num-runs", type=int, default=1000, help="Of each simulated shape.")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256], help="Of simulated runs.")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="Quickstarts of other seeds, as judges.")
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, of hacks and healthy.")
    parser.add_argument("--algorithms", nargs="+", help="Of runs and healthy; all of them by default.")
    parser.add_argument("--hacks", nargs="+", choices=list(AMOUNTS), default=list(AMOUNTS))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--checks", type=int, default=192, help="Prompts of a check, of hacks and healthy.")
    parser.add_argument("--truth", type=int, default=192, help="Prompts of the gold that is taken as the truth.")
    parser.add_argument("--rate", type=float, default=1e-4, help="Learning rate of runs with hacks.")
    parser.add_argument("--pairs", type=int, default=1800, help="Pairs of healthy preference runs.")
    parser.add_argument("--kinds", nargs="+", choices=["hacked", "healthy"], default=["hacked", "healthy"])
    options = parser.parse_args()
    one_thread()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        if options.part == "rates":
            rows = [row for num_prompts in options.prompts for row in rates(options.num_runs, num_prompts)]
            tables = [rates_table(rows)]
        elif options.part == "runs":
            measures = judges(options.others)
            rows = [
                one_run(options.start, algorithm, seed, kind == "healthy", measures, options)
                for kind in options.kinds
                for algorithm in options.algorithms or list(ALGORITHMS)
                for seed in options.seeds
            ]
            rows = merged("runs", rows, "algorithm")
            tables = [runs_summary(rows), runs_table(rows)]
        elif options.part == "hacks":
            jobs = [(kind, seed) for seed in options.seeds for kind in options.hacks]
            rows = merged("hacks", list(pool.map(hack, *zip(*jobs, strict=True), repeat(options))), "kind")
            tables = [hacks_summary(rows), hacks_table(rows)]
        else:
            jobs = [(name, seed) for seed in options.seeds for name in options.algorithms or HEALTHY]
            rows = merged(
                "healthy", list(pool.map(healthy_run, *zip(*jobs, strict=True), repeat(options))), "algorithm"
            )
            tables = [healthy_table(rows)]
    command = shlex.join(["python", *sys.argv])
    result = {"command": command, "machine": machine(), "commit": commit(), "runs": rows}
    FILES[options.part].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
