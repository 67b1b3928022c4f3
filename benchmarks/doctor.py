"""Failures produced on purpose, what `trimtab doctor` says of them, and whether its remedy mends them.

    python benchmarks/doctor.py --models runs/quickstart --out runs/doctor --seeds 0

MODELS is the directory of a quickstart, of which the stages sft, compare and reward are used. Every case is a small run
with one bad setting or bad data; the doctor's changes are applied to its settings, and it is run again. Each run is
short (16 to 40 steps of 32 replies, or at most 150 updates), so that all cases take minutes on one core. Runs that have
finished are not repeated unless their settings have changed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spine import DATA

from trimtab.core import config
from trimtab.core.errors import Interrupted
from trimtab.core.files import finite
from trimtab.reports.collect import RunRecord, collect
from trimtab.reports.diagnosis import RULES, RunDiagnosis, diagnose
from trimtab.reports.diagnosis.remedy import mended
from trimtab.stages import preflight
from trimtab.stages.pipeline import open_run, run_stage

OUT = DATA / "doctor.json"
HEALTHY = "none"
MOST_ATTEMPTS = 3
"""How often a remedy is applied while the same failure is found again: a learning rate is raised tenfold each time."""
NUM_PAIRS = 7200
"""Pairs that reward models and DPO learn from: about six of each of 1,200 prompts."""
ONLINE: dict[str, Any] = {
    "stage": "online",
    "model": "$sft",
    "prompts": "world:helpdesk?num=2000&seed=1",
    "rewards": [{"name": "model", "path": "$reward"}],
    "world": "helpdesk",
    "kl": {"name": "fixed", "coef": 0.1},
    "prompts_per_step": 8,
    "group_size": 4,
    "advantage": {"name": "grpo", "scale": "group"},
    "num_steps": 24,
    "num_epochs": 1,
    "num_minibatches": 2,
    "optimizer": {"learning_rate": 5e-4},
    "shaping": {"missing_eos_penalty": 1.0},
    "sampling": {"max_new_tokens": 64},
    "sample_every": 2,
    "num_samples": 8,
    "checkpoint_every": 1000,
}
PPO = {
    "advantage": {"name": "gae"},
    "num_epochs": 2,
    "critic": {"optimizer": {"learning_rate": 1e-3}, "warmup_steps": 2},
}
SHORT = {"num_steps": 16}
FREE = {"kl": {"name": "fixed", "coef": 0.0}}
SFT: dict[str, Any] = {
    "stage": "sft",
    "model": "$base",
    "data": "world:helpdesk?num=1000",
    "batch_size": 16,
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.05},
    "validate_every": 10,
    "checkpoint_every": 1000,
}
REWARD: dict[str, Any] = {
    "stage": "reward",
    "model": "$base",
    "data": "$pairs",
    "held_out_data": "$held_out",
    "batch_size": 8,
    "optimizer": {"learning_rate": 5e-4, "schedule": "cosine", "warmup_fraction": 0.05},
    "checkpoint_every": 1000,
}
DPO: dict[str, Any] = {
    "stage": "preference",
    "model": "$sft",
    "data": "$pairs",
    "held_out_data": "$held_out",
    "batch_size": 8,
    "loss": {"name": "dpo", "beta": 0.1, "nll_coef": 1.0},
    "optimizer": {"learning_rate": 2e-4, "schedule": "cosine", "warmup_fraction": 0.1},
    "checkpoint_every": 1000,
}


def phrase(pattern: str) -> list[dict[str, Any]]:
    """A reward for replies in which the pattern is found."""
    return [{"name": "regex", "pattern": pattern, "match": "search"}]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: the rule that should find it, the run, and what is wrong with it
    "healthy PPO": (HEALTHY, ONLINE, PPO),
    "healthy GRPO": (HEALTHY, ONLINE, {}),
    "healthy SFT": (HEALTHY, SFT, {}),
    "healthy reward model": (HEALTHY, REWARD, {}),
    "healthy DPO": (HEALTHY, DPO, {}),
    "no KL coefficient": ("reward_hacking", ONLINE, FREE | {"num_steps": 40}),
    "learning rate times 20": ("kl_explosion", ONLINE, FREE | {"optimizer": {"learning_rate": 1e-2}}),
    "one easy reward, rate times 10": (
        "entropy_collapse",
        ONLINE,
        SHORT | FREE | {"rewards": phrase("[Hh]ello"), "world": None, "optimizer": {"learning_rate": 5e-3}},
    ),
    "reward for one phrase": ("mode_collapse", ONLINE, FREE | {"rewards": phrase("[Hh]ello"), "world": None}),
    "reward for length": (
        "length_growth",
        ONLINE,
        SHORT
        | FREE
        | {"rewards": [{"name": "length", "min_tokens": 60, "max_tokens": 64}], "world": None, "shaping": {}},
    ),
    "temperature near zero": ("flat_reward", ONLINE, SHORT | {"sampling": {"max_new_tokens": 64, "temperature": 0.01}}),
    "learning rate of 1e-6": ("policy_stays", ONLINE, SHORT | {"optimizer": {"learning_rate": 1e-6}}),
    "KL coefficient of 50": ("policy_stays", ONLINE, SHORT | {"kl": {"name": "fixed", "coef": 50.0}}),
    "reward times 100": (
        "reward_scale",
        ONLINE,
        PPO | {"rewards": [{"name": "model", "path": "$reward", "weight": 100.0}]},
    ),
    "replies from top-p 0.5": ("sampler_mismatch", ONLINE, SHORT | {"sampling": {"max_new_tokens": 64, "top_p": 0.5}}),
    "20 tokens a reply": ("truncated_replies", ONLINE, SHORT | {"sampling": {"max_new_tokens": 20}}),
    "critic's rate times 100": ("critic_instability", ONLINE, PPO | {"critic": {"optimizer": {"learning_rate": 1e-1}}}),
    "reward for refusing": (
        "over_refusal",
        ONLINE,
        SHORT | FREE | {"rewards": phrase("can not help"), "world": None, "optimizer": {"learning_rate": 1e-3}},
    ),
    "reward for flattery": (
        "sycophancy",
        ONLINE,
        SHORT | FREE | {"rewards": phrase("amazing|wonderful"), "world": None, "optimizer": {"learning_rate": 1e-3}},
    ),
    "SFT with rate 1": ("loss_spikes", SFT, {"optimizer": {"learning_rate": 1.0}}),
    "SFT with rate 1e-6": ("nothing_learned", SFT, {"optimizer": {"learning_rate": 1e-6}}),
    "SFT on 60 rows, 40 times": ("overfitting", SFT, {"limit": 60, "num_epochs": 40.0, "held_out": 0.3}),
    "reward model with rate 0.01": (
        "reward_model_collapse",
        REWARD,
        {"limit": 3600, "optimizer": {"learning_rate": 1e-2}},
    ),
    "reward model of swapped pairs": ("reward_model_collapse", REWARD, {"data": "$swapped"}),
    "reward model, 30 passes of 200 pairs": ("overfitting", REWARD, {"limit": 200, "num_epochs": 30.0}),
    "DPO with rate 1e-9": ("nothing_learned", DPO, {"limit": 1200, "optimizer": {"learning_rate": 1e-9}}),
    "DPO alone": (
        "chosen_falls",
        DPO,
        {"limit": 1200, "loss": {"name": "dpo", "beta": 0.1}, "optimizer": {"learning_rate": 5e-4}},
    ),
}


def make_data(models: Path, out: Path) -> dict[str, str]:
    """The places that the cases name. The swapped pairs are the others, half of them with chosen and rejected
    exchanged."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [
        json.loads(line) for line in (models / "compare" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chosen = chosen[:NUM_PAIRS]
    held_out = (models / "compare" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:600]
    swapped = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if random.Random(i).random() < 0.5 else row
        for i, row in enumerate(chosen)
    ]
    texts = {
        "pairs": [json.dumps(row) for row in chosen],
        "swapped": [json.dumps(row) for row in swapped],
        "held_out": held_out,
    }
    for name, rows in texts.items():
        (out / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    places = {name: str(models / name / "model") for name in ("base", "sft", "reward")}
    return places | {name: str(out / f"{name}.jsonl") for name in texts}


def filled(value: Any, places: dict[str, str]) -> Any:
    """The settings with "$name" replaced by its place, and without those that are None."""
    if isinstance(value, dict):
        return {key: filled(one, places) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [filled(one, places) for one in value]
    return places[value[1:]] if isinstance(value, str) and value.startswith("$") else value


def run_once(values: dict[str, Any], out: Path) -> tuple[RunDiagnosis, RunRecord, str]:
    """The run, made unless it has finished before with these settings, and its diagnosis; an error that ended it is
    given as text."""
    error, stage = "", values["stage"]
    table = {key: value for key, value in values.items() if key != "stage"}
    settings = config.resolve(preflight.describe(stage).settings, table, where=str(out))
    text = config.to_toml({"stage": stage, **config.dump(settings)})
    if not (out / "summary.json").exists() or (out / "settings.toml").read_text(encoding="utf-8") != text:
        try:
            with open_run(out, stage, settings, resume=False) as run:
                run_stage(stage, settings, run)
        except Interrupted:
            raise
        except Exception as failed:  # a run that a bad setting ends is a failure to diagnose too
            error = f"{type(failed).__name__}: {failed}".splitlines()[0]
    record = collect(out)
    assert isinstance(record, RunRecord)
    return diagnose(record)[0], record, error


def quality(record: RunRecord) -> tuple[str, float]:
    """What a run is judged by and its value, higher is better: gold, held-out accuracy or minus the held-out loss. A
    run whose reward is itself the failure, and which logs no gold, is judged by whether the failure is found again."""
    if record.stage == "online":
        if "gold/mean" not in record.metrics:
            return "", math.nan
        values = record.metrics["gold/mean"].values
        return "gold/mean", float(np.median(values[-max(3, len(values) // 5) :]))
    if "accuracy" in record.summary:
        return "held-out accuracy", float(record.summary["accuracy"])
    series = record.metrics.get("loss/validation")
    return "held-out loss, negative", math.nan if series is None else -float(series.values[-1])


def case(name: str, seed: int, places: dict[str, str], out: Path) -> dict[str, Any]:
    """One case: the rules found, and what its remedy did."""
    expected, base, wrong = CASES[name]
    started = time.perf_counter()
    values = filled(copy.deepcopy(base) | copy.deepcopy(wrong) | {"seed": seed}, places)
    place = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    diagnosis, record, error = run_once(values, place)
    found = [rule.name for rule, _ in diagnosis.found]
    roots = [rule.name for rule, _ in diagnosis.found if diagnosis.explains(rule) is None]
    measure, before = quality(record) if record.metrics else ("", math.nan)
    row: dict[str, Any] = {
        "case": name,
        "stage": base["stage"],
        "seed": seed,
        "expected": expected,
        "found": found,
        "roots": roots,
        "not_looked": [rule.name for rule, _ in diagnosis.not_looked],
        "error": error,
        "measure": measure,
        "before": before,
        "changes": {
            change.key: f"a {change.new['name']} reward" if change.path[0] == "rewards" else change.new
            for change in diagnosis.changes
        },
    }
    for attempt in range(1, MOST_ATTEMPTS + 1):
        if expected == HEALTHY or not diagnosis.changes:
            break
        again = mended(record, diagnosis.changes, where=str(place))
        diagnosis, record, error = run_once(again, place.with_name(f"{place.name}-mended-{attempt}"))
        row |= {
            "attempts": attempt,
            "found_after": [rule.name for rule, _ in diagnosis.found],
            "after": quality(record)[1] if record.metrics else math.nan,
            "error_after": error,
        }
        if expected not in row["found_after"]:
            break
    print(f"{time.perf_counter() - started:.0f} s  ", end="")
    return row


def is_mended(row: dict[str, Any]) -> bool:
    """Whether the failure was found, and the run made again no longer shows it and is not worse by its measure."""
    if row["expected"] not in row["found"]:
        return False
    if row["expected"] in row.get("found_after", [row["expected"]]) or row.get("error_after"):
        return False
    return row["before"] is None or (row["after"] is not None and row["after"] >= row["before"])


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each case: what was found, what was changed, and what that did."""
    lines = [
        "| produced by | should be found | found | changed | judged by | before | after | mended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        others = [name for name in row["found"] if name != row["expected"]]
        first = [f"**{row['expected']}**"] if row["expected"] in row["found"] else []
        changed = ", ".join(f"{key} = {value}" for key, value in row["changes"].items()) or "–"
        is_failure = row["expected"] != HEALTHY
        after = f"{row['after']:.3g}" if row.get("after") is not None else "–"
        before = f"{row['before']:.3g}" if row["before"] is not None else "–"
        tries = f" (attempt {row['attempts']})" if row.get("attempts", 1) > 1 else ""
        done = (f"yes{tries}" if is_mended(row) else "no") if is_failure else ""
        lines.append(
            f"| {row['case']} | {row['expected']} | {', '.join(first + others) or 'none'} "
            f"| {changed if is_failure else ''} | {row['measure'] or 'the failure alone'} "
            f"| {before} | {after if is_failure else ''} | {done} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """How many failures were found, and mended, and how many rules fired without cause."""
    ill = [row for row in rows if row["expected"] != HEALTHY]
    well = [row for row in rows if row["expected"] == HEALTHY]
    found = [row for row in ill if row["expected"] in row["found"]]
    kinds = {row["expected"] for row in ill}
    mended_kinds = {kind for kind in kinds if all(is_mended(row) for row in found if row["expected"] == kind)}
    mended_kinds &= {row["expected"] for row in found}
    false = sum(len(row["found"]) for row in well)
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            f"| failures found by their rule | {len(found)} of {len(ill)} |",
            f"| kinds of failure, all of whose cases were mended | {len(mended_kinds)} of {len(kinds)} |",
            f"| rules that fired on healthy runs | {false} in {len(well)} runs |",
        ]
    )


def confusion(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How often each rule was found in the runs of each expected one."""
    names = [HEALTHY, *RULES]
    return {
        expected: {
            name: num
            for name in names
            if (num := sum(name in (row["found"] or [HEALTHY]) for row in rows if row["expected"] == expected))
        }
        for expected in names
        if any(row["expected"] == expected for row in rows)
    }


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of other cases and seeds that the data file has from before, in the order of the cases."""
    made = {(row["case"], row["seed"]) for row in rows}
    before = json.loads(OUT.read_text(encoding="utf-8"))["cases"] if OUT.exists() else []
    every = rows + [row for row in before if (row["case"], row["seed"]) not in made]
    return sorted(every, key=lambda row: (row["seed"], list(CASES).index(row["case"])))


def main() -> None:
    """Runs the cases and writes what they gave, beside what was written of others before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="directory of a quickstart")
    parser.add_argument("--out", type=Path, required=True, help="where runs are written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dry", action="store_true", help="print only; leave the committed file as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    places = make_data(options.models, options.out)
    rows = []
    for seed in options.seeds:
        for name in options.cases:
            row = finite(case(name, seed, places, options.out))
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    if not options.dry:
        rows = merged(rows)
    cases = [name for name in CASES if any(row["case"] == name for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    result = {
        "command": "python benchmarks/doctor.py --models runs/quickstart --out runs/doctor --seeds "
        + " ".join(map(str, seeds))
        + ("" if cases == list(CASES) else f" --cases {shlex.join(cases)}"),
        "cases": rows,
        "confusion": confusion(rows),
    }
    if not options.dry:
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows), summary(rows), sep="\n\n")


if __name__ == "__main__":
    main()
