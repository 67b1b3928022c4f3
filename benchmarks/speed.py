"""trimtab and TRL on the same work, in turns: seconds, ratios and peak memory, as JSON, a table and a picture.

    python benchmarks/speed.py --peer PYTHON --peer-ppo PYTHON --rows HH_JSONL_GZ

PYTHON are interpreters with TRL 1.16, and 1.12 for PPO, each of an environment made with
`pip install -c constraints.txt torch trl==1.16.0` (or 1.12.0); `make parity` makes both in .venv/trl-1.16.0 and
.venv/trl-1.12.0. HH_JSONL_GZ is harmless-base/test.jsonl.gz of Anthropic/hh-rlhf. `make_models.py` makes the models and
`speed_peer.py` runs the peer. Pairs of another processor are kept in a file of their own, such as
`--data docs/evidence/data/speed_avx512.json` (`speed_avx2.json` for one that is held to AVX2). Every timing is printed
with the share of a core that other processes took meanwhile; a pair above 0.1 is run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks"
DATA = ROOT / "docs" / "evidence" / "data" / "speed.json"
MAX_FOREIGN = 0.1
MAX_PROMPT, MAX_TOKENS = 256, 512


@dataclass(frozen=True)
class Workload:
    """One row of the table: a stage, a model, and the floors it is to reach."""

    stage: str
    model: str
    options: dict[str, int]
    floor: float = 0
    """Times faster than the peer's defaults, where those leave a faster float32 path unused; 0 for none."""
    floor_same: float = 0
    """Times faster at the same precision."""
    memory: float = 0
    shortest_prompt: int = 0
    """Shortest prompt of the rows, in tokens; the longest is 256."""


WORKLOADS = {
    "SFT, 30m": Workload("sft", "30m", {"steps": 3, "batch": 16}, 2.2, 1.5, 1.0),
    "reward, 30m": Workload("reward", "30m", {"steps": 3, "batch": 16}, 3.5, 2.2, 0.6),
    "DPO, 30m": Workload("dpo", "30m", {"steps": 3, "batch": 16}, 3.5, 2.2, 0.6),
    "GRPO, 30m": Workload("grpo", "30m", {"steps": 3, "batch": 16, "group": 8, "gen": 64}, 3.5, 2.5, 0.6, 200),
    "GRPO, groups of 16, 30m": Workload(
        "grpo", "30m", {"steps": 3, "batch": 32, "group": 16, "gen": 64}, 3.5, 2.5, 0.6, 200
    ),
    "PPO, 30m": Workload("ppo", "30m", {"steps": 1, "batch": 16, "gen": 64}, 2.8, 1.7, 0.6),
    "SFT, bigvocab": Workload("sft", "bigvocab", {"steps": 2, "batch": 16}, 6.0, 4.0, 0.5),
    "PPO, bigvocab": Workload("ppo", "bigvocab", {"steps": 1, "batch": 16, "gen": 64}, 5.0, 4.0, 0.35),
    "generate, equal lengths, 30m": Workload(
        "generate", "30m", {"num": 32, "batch": 32, "gen": 128, "promptlen": 64, "stops": 0}, 2.2, 2.2, 1.0
    ),
    "generate, 24 prompts, 96 new, 30m": Workload(
        "generate", "30m", {"num": 24, "batch": 24, "gen": 96, "promptlen": 64, "stops": 0}, 2.2, 2.2, 1.0
    ),
    "generate, lengths spread by EOS, 30m": Workload(
        "generate", "30m", {"num": 128, "batch": 32, "gen": 128, "promptlen": 64, "stops": 128}, 3.0, 3.0, 1.0
    ),
    "SFT, 6m": Workload("sft", "6m", {"steps": 3, "batch": 16}),
    "reward, 6m": Workload("reward", "6m", {"steps": 3, "batch": 16}),
    "DPO, 6m": Workload("dpo", "6m", {"steps": 3, "batch": 16}),
    "GRPO, 6m": Workload("grpo", "6m", {"steps": 3, "batch": 16, "group": 8, "gen": 64}, shortest_prompt=200),
    "PPO, 6m": Workload("ppo", "6m", {"steps": 1, "batch": 16, "gen": 64}),
    "generate, prompts of 32, 64 new, 6m": Workload(
        "generate", "6m", {"num": 32, "batch": 32, "gen": 64, "promptlen": 32, "stops": 0}
    ),
    "generate, prompts of 128, 64 new, 30m": Workload(
        "generate", "30m", {"num": 32, "batch": 32, "gen": 64, "promptlen": 128, "stops": 0}
    ),
    "generate, prompts of 256, 128 new, 30m": Workload(
        "generate", "30m", {"num": 32, "batch": 32, "gen": 128, "promptlen": 256, "stops": 0}
    ),
}


def busy_seconds() -> float:
    """CPU seconds all processes of the machine have used."""
    numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def timed_run(command: list[str]) -> dict[str, Any]:
    """What the command printed as its last JSON object, its losses, and the foreign load while it ran."""
    busy, own, began = busy_seconds(), sum(os.times()[2:4]), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
    wall = time.perf_counter() - began
    foreign = (busy_seconds() - busy - (sum(os.times()[2:4]) - own)) / wall
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"') and line.endswith("}")]
    result = next(p for p in reversed(printed) if "rss_gb" in p)
    result.setdefault("losses", [p["loss"] for p in printed if set(p) == {"loss"}])
    return result | {"foreign_load": round(max(0.0, foreign), 3)}


def seconds_of(stage: str, result: dict[str, Any], options: dict[str, int]) -> float:
    """Seconds of one step, or of a thousand generated tokens."""
    if stage == "generate":
        return 1000 / statistics.median(result["tokens_per_second"])
    if stage == "ppo" and "total_s" in result:  # its trainer calls no step callback
        return result["total_s"] / options["steps"]
    return statistics.median(result["steps_s"])


def choose_rows(source: Path, model: Path, num: int, shortest: int, out: Path) -> list[tuple[int, int, int]]:
    """Writes the first `num` pairs that neither side would cut; returns the tokens of their prompts and replies."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    kept, lengths, seen = [], [], set()
    with gzip.open(source, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            turns = [split(row[side]) for side in ("chosen", "rejected")]
            same = turns[0][:-1] == turns[1][:-1] and turns[0] and all(t[-1]["role"] == "assistant" for t in turns)
            if not same or not all(m["content"] for t in turns for m in t):
                continue
            prompt = str(turns[0][:-1])
            encode = tokenizer.apply_chat_template
            prompt_ids = encode(turns[0][:-1], add_generation_prompt=True)["input_ids"]
            replies = [len(encode(t)["input_ids"]) - len(prompt_ids) for t in turns]
            fits = shortest <= len(prompt_ids) <= MAX_PROMPT and len(prompt_ids) + max(replies) <= MAX_TOKENS
            if not fits or prompt in seen:
                continue
            seen.add(prompt)
            kept.append(line)
            lengths.append((len(prompt_ids), *replies))
            if len(kept) == num:
                break
    with gzip.open(out, "wt", encoding="utf-8") as file:
        file.writelines(kept)
    return lengths


def split(transcript: str) -> list[dict[str, str]]:
    """The turns of a transcript."""
    parts = re.split(r"\n\n(Human|Assistant): ?", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[::2], parts[1::2], strict=True)]


def products_of(stage: str, model: Path, lengths: list[tuple[int, int, int]], options: dict[str, int]) -> list[float]:
    """Floating-point operations of the matrix products of one step: the peer's and ours, for these rows.

    A token costs 2 operations for each weight of the blocks forward and 4 backward, a token whose distribution is
    needed 2 and 4 for each entry of the head. The peer pads each micro-batch of eight to its longest row and forms the
    logits of every place; we hold a shared prompt once, and the head runs for trained tokens only, once more backward.
    The blocks are counted whole for both. Their quotient is what would be gained if everything ran at the speed of the
    products and nothing else were saved.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    d, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    per_layer = d * config["head_dim"] * (2 * heads + 2 * kv) + 3 * d * config["intermediate_size"]
    blocks, head = config["num_hidden_layers"] * per_layer, d * config["vocab_size"]
    micros = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    if stage == "generate":
        tokens = options["num"] * (options["promptlen"] + options["gen"])
        work = 2.0 * tokens * blocks + 2.0 * options["num"] * options["gen"] * head
        return [work, work]
    if stage == "sft":
        padded = sum(len(m) * max(p + c for p, c, _ in m) for m in micros)
        real, trained = sum(p + c for p, c, _ in lengths), sum(c for _, c, _ in lengths)
        both = padded * 6 * (blocks + head), real * 6 * blocks + trained * 8 * head
    elif stage in ("reward", "dpo"):
        padded = sum(2 * len(m) * max(max(p + c, p + r) for p, c, r in m) for m in micros)
        real, trained = sum(p + c + r for p, c, r in lengths), sum(c + r for _, c, r in lengths)
        if stage == "reward":
            both = padded * 6 * blocks, real * 6 * blocks
        else:  # forward and backward of the policy, forward of the reference
            both = padded * 8 * (blocks + head), real * 8 * blocks + trained * 10 * head
    elif stage == "grpo":  # policy forward and backward and the reference
        gen, group = options["gen"], options["group"]
        used = lengths[: options["steps"] * options["batch"] // group]
        padded = sum(group * (p + gen) for p, _, _ in used)
        real, trained = sum(p + group * gen for p, _, _ in used), len(used) * group * gen
        both = padded * 8 * blocks + trained * 8 * head, real * 8 * blocks + trained * 10 * head
    else:
        gen, epochs = options["gen"], 4
        steps = [lengths[i : i + options["batch"]] for i in range(0, len(lengths), options["batch"])]
        padded = sum(len(s) * (max(p for p, _, _ in s) + gen) for s in steps)
        real, trained = sum(p + gen for p, _, _ in lengths), gen * len(lengths)
        # Sampling aside (one forward pass): reference, value and reward forward, policy and critic trained.
        peer = padded * (blocks * (2 * 4 + epochs * 2 * 6) + head * (2 * 2 + epochs * 6))
        ours = real * blocks * (2 * 5 + epochs * 2 * 6) + trained * head * (3 * 2 + epochs * 8)
        both = peer, ours
    return [x / options["steps"] for x in both]


def compare(name: str, work: Workload, o: argparse.Namespace, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Alternating pairs of one workload, added to those measured `before`."""
    models, rows = o.out / "models", o.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.jsonl.gz"
    model = models / work.model
    num = work.options.get("steps", 8) * work.options["batch"]
    lengths = choose_rows(o.rows, model, num, work.shortest_prompt, rows)
    flags = [x for k, v in work.options.items() for x in (f"--{k}", str(v))]
    used = f"{model}-rm" if work.stage == "reward" else str(model)
    ours = [sys.executable, "speed_ours.py", work.stage, used, str(rows), *flags]
    ours += ["--reward-model", f"{model}-rm"] if work.stage == "ppo" else []
    peer_python = o.peer_ppo if work.stage == "ppo" else o.peer
    peer = [peer_python, "speed_peer.py", work.stage, used, str(rows), *flags]
    if work.stage == "generate":
        peer += ["--repeats", "2"]
    else:
        peer += ["--micro", "8"]
    if o.precision:
        ours, peer = [*ours, "--precision", o.precision], [*peer, "--precision", o.precision]
    pairs, wanted = list(before), len(before) + o.pairs
    while len(pairs) < wanted:
        turns = [("ours", ours), ("peer", peer)]
        pair = {side: timed_run(command) for side, command in (turns if len(pairs) % 2 else turns[::-1])}
        seconds = {side: seconds_of(work.stage, pair[side], work.options) for side in pair}
        foreign = max(pair[side]["foreign_load"] for side in pair)
        ratio = seconds["peer"] / seconds["ours"]
        memory = pair["ours"]["rss_gb"] / pair["peer"]["rss_gb"]
        print(f"{name}: {seconds['peer']:.2f} / {seconds['ours']:.2f} = {ratio:.2f}, memory {memory:.2f}, "
              f"foreign load {foreign:.2f}", flush=True)  # fmt: skip
        if foreign > o.max_foreign:
            print("  other processes were at work: this pair is run again", flush=True)
            continue
        facts = {"seconds": seconds, "ratio": ratio, "memory": memory, "foreign_load": foreign}
        pairs.append(facts | {side: {k: pair[side].get(k) for k in ("rss_gb", "losses", "laps")} for side in pair})
    ratios = sorted(p["ratio"] for p in pairs)
    result = {
        "workload": name,
        "stage": work.stage,
        "model": work.model,
        "options": work.options,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "memory": statistics.median(p["memory"] for p in pairs),
        "peer_seconds": statistics.median(p["seconds"]["peer"] for p in pairs),
        "our_seconds": statistics.median(p["seconds"]["ours"] for p in pairs),
        "peer_rss_gb": statistics.median(p["peer"]["rss_gb"] for p in pairs),
        "our_rss_gb": statistics.median(p["ours"]["rss_gb"] for p in pairs),
        "products": products_of(work.stage, model, lengths, work.options),
        "machine": machine(),
        "pairs": pairs,
    }
    losses = [pairs[0][side]["losses"][:1] for side in ("peer", "ours")]
    if all(losses) and work.stage not in ("ppo", "grpo"):
        result["first_loss"] = {"peer": losses[0][0], "ours": losses[1][0]}
        difference = abs(losses[0][0] - losses[1][0])
        print(f"{name}: first loss {losses[0][0]:.6f} and {losses[1][0]:.6f}", flush=True)
        if difference > 1e-4:
            raise SystemExit(f"{name}: the losses of the first step differ by {difference:.2g}: not the same work")
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on. Asked in a process of its own: a child's peak memory, as the system counts it,
    begins at its parent's."""
    command = [sys.executable, "-c", "import json, speed; print(json.dumps(speed.measure_machine()))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def measure_machine() -> dict[str, Any]:
    """The processor, and its rates of products and of reading memory just now."""
    import torch

    info = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), platform.machine()
    )
    x = torch.randn(2048, 2048)
    began = time.perf_counter()
    for _ in range(10):
        x @ x
    gflops = 10 * 2 * 2048**3 / (time.perf_counter() - began) / 1e9
    large = torch.ones(100_000_000)
    large.sum()
    began = time.perf_counter()
    large.sum()
    read = 0.4 / (time.perf_counter() - began)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "gemm_gflops": round(gflops),
        "read_gb_a_second": round(read, 1),
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the chosen workloads and merges them into the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="an interpreter with TRL 1.16")
    parser.add_argument("--peer-ppo", default="", help="an interpreter with TRL 1.12")
    parser.add_argument("--rows", type=Path, required=True, help="harmless-base/test.jsonl.gz of Anthropic/hh-rlhf")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--pairs", type=int, default=5, help="pairs to add to those in the data file")
    parser.add_argument("--fresh", action="store_true", help="forget the pairs in the data file")
    parser.add_argument("--max-foreign", type=float, default=MAX_FOREIGN, help="largest foreign load of a valid pair")
    parser.add_argument("--precision", default="", help="the same for both: a float32 matmul precision, or bfloat16")
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--picture", type=Path, help="where to draw the results, as SVG")
    o = parser.parse_args()
    o.out, o.rows = o.out.resolve(), o.rows.resolve()
    o.out.mkdir(parents=True, exist_ok=True)
    # Imported here: the peer's interpreter imports this file too, for `split`.
    from make_models import make

    make(o.rows, o.out / "models")
    known = json.loads(o.data.read_text(encoding="utf-8")) if o.data.exists() else {"workloads": {}}
    for name in o.workloads:
        key = f"{name} ({o.precision})" if o.precision else name
        before = [] if o.fresh else known["workloads"].get(key, {}).get("pairs", [])
        known["workloads"][key] = compare(name, WORKLOADS[name], o, before)
        o.data.parent.mkdir(parents=True, exist_ok=True)
        o.data.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(table(known["workloads"]))
    if o.picture:
        from pictures import write_picture

        write_picture(picture(known["workloads"]), o.picture)


def bound(r: dict[str, Any]) -> float | None:
    """The quotient of both sides' products; None where lengths are drawn and the products with them."""
    return None if "spread" in r["workload"] else r["products"][0] / r["products"][1]


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| workload | TRL | trimtab | times faster | floors | products saved | of the product rate | memory of TRL's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        work, saved = WORKLOADS[r["workload"]], bound(r)
        seconds = r["our_seconds"] * (
            r["options"]["num"] * r["options"]["gen"] / 1000 if r["stage"] == "generate" else 1
        )
        many = len(r["pairs"])
        spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}, {many} pairs" if many > 1 else "1 pair"
        rate = r["products"][1] / seconds / r["machine"]["gemm_gflops"] / 1e9
        lines.append(
            f"| {name} | {r['peer_seconds']:.2f} s, {r['peer_rss_gb']:.2f} GB | {r['our_seconds']:.2f} s, "
            f"{r['our_rss_gb']:.2f} GB | **{r['ratio']:.2f}** ({spread}) | "
            f"{f'{work.floor}, {work.floor_same}' if work.floor else ''} | "
            f"{f'{saved:.2f}' if saved else ''} | {f'{rate:.0%}' if saved else ''} | "
            f"{r['memory']:.2f}{f' (≤ {work.memory})' if work.memory else ''} |"
        )
    return "\n".join(lines)


def picture(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many times faster, a dot for each pair, with the floors and what saved products alone would give."""
    from trimtab.reports.charts import AMBER, BLUE, GREY, ROSE, Axis, Chart

    names = list(results)
    ticks = tuple((math.log2(times), f"{times:g}") for times in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15))
    chart = Chart(Axis("times faster than TRL", ticks=ticks), Axis(names=tuple(names)), wide=True)
    marks = {
        ("what saved products alone would give", GREY): {n: [bound(results[n])] for n in names},
        ("the floor against defaults", ROSE): {n: [WORKLOADS[results[n]["workload"]].floor] for n in names},
        ("the floor at the same precision", AMBER): {n: [WORKLOADS[results[n]["workload"]].floor_same] for n in names},
        ("a pair of runs", BLUE): {n: [p["ratio"] for p in results[n]["pairs"]] for n in names},
    }
    for (what, colour), of_name in marks.items():
        chart.legend.append((what, colour))
        known = [(math.log2(times), names.index(n), times) for n in names for times in of_name[n] if times]
        x, y, times = zip(*known, strict=True)
        chart.dots(x, y, [colour], [f"{what}: {one:.2f}" for one in times], size=5, opacity=0.8)
    return {"Speed": chart}


if __name__ == "__main__":
    main()
