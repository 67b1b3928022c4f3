"""A policy learns to use tools: `examples/tools/pipeline.toml` over seeds, and what computing every turn anew costs.

    python benchmarks/tools.py --seeds 0 --out runs/tools

Writes `docs/evidence/data/tools.json` and prints it as a table. Runs that have finished are not repeated. Seconds are
of one thread; `cpu_seconds` do not count what else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from trimtab import worlds
from trimtab.core.types import Prompt
from trimtab.data.chat import Chat
from trimtab.engines.episodes import EpisodeLimits, EpisodeSampler
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.environments import ReAct
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stats import t_interval

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "evidence" / "data" / "tools.json"
SAMPLING = Sampling(max_new_tokens=96, batch_size=512)
LIMITS = EpisodeLimits(max_turns=6, max_observation_tokens=24)


def train(seed: int, out: Path) -> dict[str, float]:
    """Wall and CPU seconds of the pipeline with this seed, run now unless it has finished before."""
    directory, note = out / f"seed-{seed}", out / f"seed-{seed}.json"
    if not note.exists():
        command = [sys.executable, "-m", "trimtab", "run", str(ROOT / "examples" / "tools" / "pipeline.toml")]
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, f"seed={seed}", "--out", str(directory)], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        note.write_text(json.dumps({"seconds": time.perf_counter() - started, "cpu_seconds": cpu}))
    return json.loads(note.read_text())


def policy_of(model: Path) -> tuple[Policy, Chat]:
    chat = Chat(load_tokenizer(str(model)))
    return Policy(load_causal(str(model)), pad_id=chat.pad_id), chat


def test(model: Path, prompts: list[Prompt], *, with_tools: bool) -> dict[str, float]:
    """Gold and use of the tools on prompts that were not trained on."""
    policy, chat = policy_of(model)
    if with_tools:
        environment = ReAct(corpus="world:catalogue").load()
        generator = EpisodeSampler(policy, chat, SAMPLING, environment, LIMITS)
    else:
        generator = LocalSampler(policy, chat, SAMPLING)
    rollouts = generator.generate(prompts, group_size=1, seed=0)
    world = worlds.load("catalogue")
    gold = [world.gold(r.prompt, r.response).total for r in rollouts]
    by_level = {
        f"gold_level_{level}": mean([g for g, p in zip(gold, prompts, strict=True) if p.facts["level"] == level])
        for level in (1, 2, 3)
    }
    calls = [r.events.get("tool_calls", 0) for r in rollouts]
    used = [all(x in r.response for x in ("Action: search[", "Observation: ")) for r in rollouts]
    return {"gold": mean(gold), "tool_calls": mean(calls), "looked_up_fraction": mean(used)} | by_level


def cost(model: Path, prompts: list[Prompt]) -> dict[str, float]:
    """How long a batch of episodes takes, and how much of that is computing earlier turns again."""
    policy, chat = policy_of(model)
    generator = EpisodeSampler(policy, chat, SAMPLING, ReAct(corpus="world:catalogue").load(), LIMITS)
    inner, again = generator.generator, {"seconds": 0.0, "tokens": 0}
    first = True

    def watched(prefixes, **options):
        nonlocal first
        drawn = LocalSampler.continue_ids(inner, prefixes, **options)
        if not first and prefixes:
            started = time.process_time()
            ones = torch.ones(len(prefixes), dtype=torch.int64)
            LocalSampler.continue_ids(inner, prefixes, group_size=1, uniforms=options["uniforms"], limits=ones)
            again["seconds"] += time.process_time() - started
            again["tokens"] += sum(map(len, prefixes))
        first = False
        return drawn

    inner.continue_ids = watched
    started = time.process_time()
    rollouts = generator.generate(prompts, group_size=4, seed=1)
    total = time.process_time() - started - again["seconds"]  # the turns were computed once more to time them
    return {
        "episodes": len(rollouts),
        "turns": sum(r.events["turns"] for r in rollouts),
        "sampled_tokens": sum(len(r.logprobs) for r in rollouts),
        "observed_tokens": sum(r.events["observation_tokens"] for r in rollouts),
        "tokens_computed_again": again["tokens"],
        "cpu_seconds": total,
        "cpu_seconds_computing_again": again["seconds"],
        "share_computing_again": again["seconds"] / total,
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Runs, tests, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tools")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = worlds.load("catalogue").prompts("test", 300, seed=9)
    rows = []
    for seed in options.seeds:
        spent = train(seed, options.out)
        directory = options.out / f"seed-{seed}"
        metrics = [json.loads(line) for line in (directory / "tools" / "metrics.jsonl").read_text().splitlines()]
        before = test(directory / "sft" / "model", prompts, with_tools=True)
        after = test(directory / "tools" / "model", prompts, with_tools=True)
        without = test(directory / "tools" / "model", prompts, with_tools=False)
        rows.append(
            {"seed": seed, **spent}
            | {f"sft_{name}": value for name, value in before.items()}
            | {f"trained_{name}": value for name, value in after.items()}
            | {"trained_gold_without_environment": without["gold"]}
            | {"reward_by_step": [round(m["reward/mean"], 4) for m in metrics]}
            | {"largest_logprob_difference": max(m["rollout/logprob_difference"] for m in metrics)}
        )
    gains = [row["trained_gold"] - row["sft_gold"] for row in rows]
    result = {
        "test_prompts": len(prompts),
        "seeds": rows,
        "gold_gain": t_interval(gains).named("gold_gain") if len(gains) > 1 else {"gold_gain": gains[0]},
        "cost_of_a_batch": cost(options.out / f"seed-{options.seeds[0]}" / "tools" / "model", prompts[:64]),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    names = [name for name in rows[0] if name != "reward_by_step"]
    for name in names:
        print(f"{name:36}", *(f"{row[name]:10.3f}" for row in rows))
    print(json.dumps({name: result[name] for name in ("gold_gain", "cost_of_a_batch")}, indent=1))


if __name__ == "__main__":
    main()
