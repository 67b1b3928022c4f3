"""Failures produced on purpose, what `trimtab doctor` says of them, and whether its remedy mends them.

    python benchmarks/doctor.py --models runs/quickstart --out runs/doctor --seeds 1 2 3

The rules were written and mended on runs of seed 0; the seeds of the evidence were run when they were final. MODELS is
the directory of a quickstart, of which the stages sft, compare and reward are used. Every case is a small run with one
bad setting or bad data; the doctor's changes are applied to its settings, and it is run again. Each run is short (16 to
40 steps of 32 replies, or at most 150 updates), so that all cases of a seed take about half an hour on one core. Runs
that have finished are not repeated unless their settings have changed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shlex
import time
from collections import Counter
from collections.abc import Sequence
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
from trimtab.reports.diagnosis.rule import SettingChange
from trimtab.reports.headline import interval
from trimtab.stages import preflight
from trimtab.stages.pipeline import open_run, run_stage

OUT = DATA / "doctor.json"
HEALTHY = "none"
MOST_ATTEMPTS = 3
"""How often remedies are applied while the same failure is found again."""
NUM_PAIRS, NUM_HELD_OUT = 7200, 2400
"""Pairs that reward models and DPO learn from, and that they are judged by: about six of each of 1,200 prompts, and
as many as make the half-width of an interval of accuracy about four points."""
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
PLAIN: dict[str, Any] = {
    "prompts": "world:helpdesk?split=test&num=300&seed=7",
    "num_prompts": 300,
    "world": "helpdesk",
    "sampling": {"max_new_tokens": 64, "batch_size": 512},
}
"""How policies are judged: on prompts that no run has trained on, by the world's gold. The limit is that of the other
runs; without top-p and at a temperature of 1, replies are those that the policy gives."""
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
    "reward for repetition": (
        "entropy_collapse",
        ONLINE,
        FREE
        | {
            "rewards": [{"name": "repetition", "n": 2, "weight": -1.0}],
            "world": None,
            "shaping": {},
            "optimizer": {"learning_rate": 1e-3},
        },
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
        {
            "limit": 1200,
            "num_epochs": 4.0,
            "loss": {"name": "dpo", "beta": 0.02},
            "optimizer": {"learning_rate": 1e-3},
        },
    ),
}


REWARD_IS_WRONG = tuple(name for name, (_, _, wrong) in CASES.items() if wrong.get("world", "") is None)
"""The cases whose reward pays for the failure and for nothing else. No setting makes a better policy of that reward: a
remedy can hold the policy back or bound the reward, so the failure alone decides whether it is mended."""
NO_SETTING = ("reward model of swapped pairs",)
"""The cases that no change of the run file mends: half of the labels are wrong."""


def make_data(models: Path, out: Path) -> dict[str, str]:
    """The places that the cases name. The swapped pairs are the others, half of them with chosen and rejected
    exchanged."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [
        json.loads(line) for line in (models / "compare" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chosen = chosen[:NUM_PAIRS]
    held_out = (models / "compare" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_HELD_OUT]
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


def in_words(changes: Sequence[SettingChange]) -> dict[str, Any]:
    """The changes as JSON values, a reward that is added by its name."""
    return {
        change.key: f"a {change.new['name']} reward" if isinstance(change.new, dict) else change.new
        for change in changes
    }


def judge(stage: str, runs: Sequence[tuple[Path, RunRecord]], out: Path) -> dict[str, Any]:
    """What the last of the runs is worth beside the first: gold of replies that both policies give to the same held-out
    prompts, sampled alike whatever the run's own sampling was; accuracy on held-out pairs; or minus the held-out loss.
    Of one run alone there is no difference, and of a run that ended in an error nothing."""
    (first, before), (last, after) = runs[0], runs[-1]
    if stage == "online":
        if not (first / "model").exists() or not (last / "model").exists():
            return {}
        values = PLAIN | {"model": str(last / "model")} | ({"baseline": str(first / "model")} if len(runs) > 1 else {})
        settings = config.resolve(preflight.describe("evaluate").settings, values, where=str(out))
        with open_run(out, "evaluate", settings, resume=False) as run:
            run_stage("evaluate", settings, run)
        found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if len(runs) == 1:
            return {"before": found["policy"]["gold"]}
        gap = found["gold_difference"]
        difference = [gap["difference"], gap["difference_low"], gap["difference_high"]]
        return {"before": found["baseline"]["gold"], "after": found["policy"]["gold"], "difference": difference}
    (was, error_before), (now, error_after) = held_out(before), held_out(after)
    if len(runs) == 1:
        return {"before": was}
    gap, half = now - was, math.hypot(error_before, error_after)
    ends = {"before": was, "after": now}
    return ends if math.isnan(was) else ends | {"difference": [gap, gap - half, gap + half]}


def held_out(record: RunRecord) -> tuple[float, float]:
    """A run's accuracy on held-out pairs with half its interval, or of SFT minus the held-out loss; nan if the run did
    not come so far. A run does not keep which pairs it was right about, so that two are not compared pair by pair: the
    interval of their difference is too wide, if anything. The loss is taken without an interval."""
    if record.stage == "sft":
        loss = record.metrics.get("loss/validation")
        return (math.nan if loss is None else -float(loss.values[-1])), 0.0
    accuracy = interval(record.summary, "accuracy")
    return (math.nan, 0.0) if accuracy is None else (accuracy.value, (accuracy.high - accuracy.low) / 2)


def case(name: str, seed: int, places: dict[str, str], out: Path) -> dict[str, Any]:
    """One case: the rules found, and what its remedies did."""
    expected, base, wrong = CASES[name]
    started = time.perf_counter()
    values = filled(copy.deepcopy(base) | copy.deepcopy(wrong) | {"seed": seed}, places)
    place = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    diagnosis, record, error = run_once(values, place)
    row: dict[str, Any] = {
        "case": name,
        "stage": base["stage"],
        "seed": seed,
        "expected": expected,
        "found": [rule.name for rule, _ in diagnosis.found],
        "roots": [rule.name for rule, _ in diagnosis.found if diagnosis.explains(rule) is None],
        "not_looked": [rule.name for rule, _ in diagnosis.not_looked],
        "error": error,
        "attempts": [],
    }
    runs = [(place, record)]
    for attempt in range(1, MOST_ATTEMPTS + 1):
        still = [rule.name for rule, _ in diagnosis.found]
        if expected == HEALTHY or expected not in still or not diagnosis.changes:
            break
        changes = diagnosis.changes
        again = place.with_name(f"{place.name}-mended-{attempt}")
        diagnosis, record, error = run_once(mended(record, changes, where=str(place)), again)
        runs.append((again, record))
        found = [rule.name for rule, _ in diagnosis.found]
        row["attempts"].append({"changes": in_words(changes), "found": found, "error": error})
        if error:
            break
    row |= judge(base["stage"], runs, place.with_name(f"{place.name}-judged"))
    row["seconds"] = round(time.perf_counter() - started)
    return row


def judged_by(row: dict[str, Any]) -> str:
    """The measure of a case. Where the reward is itself the failure, its gold is shown and decides nothing."""
    if row["stage"] != "online":
        return "held-out loss, negative" if row["stage"] == "sft" else "held-out accuracy"
    return "the failure alone (gold)" if row["case"] in REWARD_IS_WRONG else "gold"


def is_mended(row: dict[str, Any]) -> bool:
    """Whether the failure was found, the run made again no longer shows it, and it is not worse by its measure: the
    interval of the difference does not lie below zero."""
    last = row["attempts"][-1] if row["attempts"] else None
    if last is None or row["expected"] not in row["found"] or row["expected"] in last["found"] or last["error"]:
        return False
    if row["case"] in REWARD_IS_WRONG or "difference" not in row:
        return True
    high = row["difference"][2]
    return high is not None and high >= 0


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each case over its seeds: what was found, what was changed first, and what the changes did."""
    lines = [
        "| produced by | should be found | found in | others found | first change | judged by | before | after "
        "| mended (attempts) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        if not (made := [row for row in rows if row["case"] == name]):
            continue
        expected = made[0]["expected"]
        hits = [row for row in made if (expected == HEALTHY and not row["found"]) or expected in row["found"]]
        others = Counter(rule for row in made for rule in row["found"] if rule != expected)
        changes = next((row["attempts"][0]["changes"] for row in made if row["attempts"]), {})
        done = [row for row in made if is_mended(row)]
        tries = ", ".join(str(len(row["attempts"])) for row in done)
        told = f"{len(done)} of {len(made)}" + (f" ({tries})" if tries else "")
        lines.append(
            f"| {name} | {expected} | {len(hits)} of {len(made)} "
            f"| {', '.join(f'{rule} {num}' for rule, num in others.items()) or '–'} "
            f"| {', '.join(f'{key} = {value}' for key, value in changes.items()) or '–'} "
            f"| {judged_by(made[0])} | {mean_of(made, 'before')} | {mean_of(made, 'after')} "
            f"| {'' if expected == HEALTHY else 'no setting can' if name in NO_SETTING else told} |"
        )
    return "\n".join(lines)


def mean_of(rows: list[dict[str, Any]], key: str) -> str:
    """The mean over the rows that have a number under the key, as text."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return f"{np.mean(known):.3g}" if known else "–"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many failures were found, and mended, and how many rules fired without cause."""
    ill = [row for row in rows if row["expected"] != HEALTHY]
    well = [row for row in rows if row["expected"] == HEALTHY]
    found = [row for row in ill if row["expected"] in row["found"]]
    able = [row for row in ill if row["case"] not in NO_SETTING]
    shares = {
        kind: np.mean([is_mended(row) for row in able if row["expected"] == kind])
        for kind in {row["expected"] for row in able}
    }
    most, all_of = (sum(passes(share) for share in shares.values()) for passes in (lambda s: s > 0.5, lambda s: s == 1))
    false = sum(len(row["found"]) for row in well)
    others = [row for row in able if is_mended(row) and set(row["attempts"][-1]["found"]) - set(row["found"])]
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            f"| failures found by their rule | {len(found)} of {len(ill)} runs |",
            f"| failures that a setting can mend, mended | {sum(map(is_mended, able))} of {len(able)} runs |",
            f"| mended runs that show another failure instead | {len(others)} |",
            f"| kinds of failure mended in more than half of their runs | {most} of {len(shares)} |",
            f"| kinds of failure mended in every run | {all_of} of {len(shares)} |",
            f"| rules that fired on healthy runs | {false} in {len(well)} runs |",
        ]
    )


def confusion_table(rows: list[dict[str, Any]]) -> str:
    """In how many runs of each kind each rule was found."""
    lines = ["| made for | runs | rules found, each with its number of runs |", "|---|---|---|"]
    for expected, found in confusion(rows).items():
        num = sum(row["expected"] == expected for row in rows)
        cells = [f"**{rule} {times}**" if rule == expected else f"{rule} {times}" for rule, times in found.items()]
        lines.append(f"| {expected} | {num} | {', '.join(cells)} |")
    return "\n".join(lines)


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
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.cases:
            rows.append(finite(case(name, seed, places, options.out)))
            print(f"{rows[-1]['seconds']} s  {table(rows[-1:]).splitlines()[-1]}", flush=True)
            if not options.dry:
                write(merged(rows))
    print(table(rows), summary(rows), confusion_table(rows), sep="\n\n")


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the rows to the committed file, with the command that makes them."""
    cases = [name for name in CASES if any(row["case"] == name for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    result = {
        "command": "python benchmarks/doctor.py --models runs/quickstart --out runs/doctor --seeds "
        + " ".join(map(str, seeds))
        + ("" if cases == list(CASES) else f" --cases {shlex.join(cases)}"),
        "cases": rows,
        "confusion": confusion(rows),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
