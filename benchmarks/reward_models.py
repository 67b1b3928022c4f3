"""What the forms of a reward model cost: `docs/evidence/data/reward_models.json`, and the tables of its page.

    python benchmarks/reward_models.py                  # everything
    python benchmarks/reward_models.py --only kwise

Ways of doing the same work are run in turns in one process, with one thread, and compared by the processor time of this
process, so other work on the machine changes the figures little. The model is a random one of 6 million weights and the
shape of Qwen3, and the tokens are random too: only their numbers matter here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from make_models import SHAPES
from speed import machine
from transformers import AutoModelForSequenceClassification, Qwen3Config

from trimtab.batches.pairs import Compared, PairBatch
from trimtab.batches.trees import TokenTrees, Tree, response_tree
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.math.losses.reward import BradleyTerry
from trimtab.models.adapters import LoRA, add_adapter
from trimtab.models.load import drawn_head
from trimtab.models.roles import ScalarModel
from trimtab.rewards.ensemble import scores_of_members

HERE = Path(__file__).parent
DATA = HERE.parent / "docs" / "evidence" / "data" / "reward_models.json"
ROUNDS = 3
TOKEN_BUDGET = 4096


def random_model(**changed: int) -> ScalarModel:
    """A reward model of random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {**SHAPES["6m"], **changed}
    config = Qwen3Config(**shape, pad_token_id=0, num_labels=1)
    return ScalarModel(AutoModelForSequenceClassification.from_config(config).eval(), pad_id=0, gives="scores")


def random_replies(num_prompts: int, num_replies: int, prompt: int, reply: int) -> list[Tree]:
    """Trees of random tokens with these numbers of them."""
    draw = torch.Generator().manual_seed(0)

    def ids(num: int) -> list[int]:
        drawn: list[int] = torch.randint(1, 8192, (num,), generator=draw).tolist()
        return drawn

    return [response_tree(ids(prompt), [ids(reply) for _ in range(num_replies)]) for _ in range(num_prompts)]


def seconds_of(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median processor seconds of each way, run in turns after a first turn that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn:
                found[name].append(time.process_time() - began)
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


# --- rankings ---

KWISE = {"short prompt": (64, 64), "long prompt": (192, 64)}
"""Tokens of a prompt and of each reply."""


def kwise() -> list[dict[str, Any]]:
    """One update over the six comparisons of four replies to each of 4 prompts: as rankings, and as separate pairs."""
    rows = []
    for name, (prompt, reply) in KWISE.items():
        trees = random_replies(4, 4, prompt, reply)
        every_two = list(combinations(range(4), 2))
        pairs = [Tree(tree.prompt, (tree.branches[a], tree.branches[b])) for tree in trees for a, b in every_two]
        ranked = PairBatch(
            trees=TokenTrees.build(trees),
            compared=(tuple(Compared(a, b, 0.0, 1.0) for a, b in every_two),) * len(trees),
        )
        apart = PairBatch(trees=TokenTrees.build(pairs), compared=((Compared(0, 1, 0.0, 1.0),),) * len(pairs))
        learner = LocalLearner(random_model(), AdamW(), name="reward", token_budget=TOKEN_BUDGET, num_updates=100)
        seconds = seconds_of(
            {
                "rankings": partial(learner.update, [(ranked, [BradleyTerry()])]),
                "pairs": partial(learner.update, [(apart, [BradleyTerry()])]),
            }
        )
        rows.append(
            {
                "name": name,
                "prompt_tokens": prompt,
                "reply_tokens": reply,
                "comparisons": len(apart.chosen_ids),
                "rankings_seconds": seconds["rankings"],
                "pairs_seconds": seconds["pairs"],
                "ratio": round(seconds["rankings"] / seconds["pairs"], 3),
            }
        )
    return rows


def kwise_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of the page."""
    lines = [
        "| tokens of prompt and reply | comparisons | as rankings | as separate pairs | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['prompt_tokens']}, {row['reply_tokens']} | {row['comparisons']} | {row['rankings_seconds']:.2f} s "
            f"| {row['pairs_seconds']:.2f} s | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


# --- ensembles ---

LAST_BLOCKS = (1, 2, 8)
"""Of 8 blocks, how many have adapters."""
MEMBERS = 5


def members_of(num: int, last_blocks: int) -> list[ScalarModel]:
    """Members as adapters on one random base of 8 blocks."""
    model = random_model(num_hidden_layers=8).model
    for number in range(num):
        add_adapter(model, f"member_{number}", LoRA(rank=8, last_blocks=last_blocks), seed=number)
    return [
        ScalarModel(model, pad_id=0, adapter=f"member_{n}", head=drawn_head(model, n), gives="scores")
        for n in range(num)
    ]


def memory_mb(num: int, last_blocks: int) -> float:
    """Peak memory of making and using an ensemble, above that of the libraries; for a process of its own."""
    torch.set_num_threads(1)
    scores_of_members(members_of(1, last_blocks)[:1], TokenTrees.build(random_replies(1, 1, 8, 8)), TOKEN_BUDGET)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _rss_mb("VmRSS")
    scores_of_members(members_of(num, last_blocks), TokenTrees.build(random_replies(16, 4, 64, 64)), TOKEN_BUDGET)
    return _rss_mb("VmHWM") - before


def _rss_mb(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def ensemble() -> list[dict[str, Any]]:
    """Scoring 16 replies with five adapter members on one base, and with one of them."""
    rows = []
    trees = TokenTrees.build(random_replies(4, 4, 64, 64))
    for last_blocks in LAST_BLOCKS:
        members = members_of(MEMBERS, last_blocks)
        seconds = seconds_of(
            {
                "one": partial(scores_of_members, members[:1], trees, TOKEN_BUDGET),
                "all": partial(scores_of_members, members, trees, TOKEN_BUDGET),
            }
        )
        memory = {}
        for num in (1, MEMBERS):
            call = f"import reward_models as r; print(r.memory_mb({num}, {last_blocks}))"
            command = [sys.executable, "-c", call]
            runs = [
                subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True) for _ in range(ROUNDS)
            ]
            memory[num] = statistics.median(float(done.stdout) for done in runs)
        rows.append(
            {
                "last_blocks": last_blocks,
                "one_seconds": seconds["one"],
                "all_seconds": seconds["all"],
                "ratio": round(seconds["all"] / seconds["one"], 2),
                "one_mb": round(memory[1], 1),
                "all_mb": round(memory[MEMBERS], 1),
                "memory_ratio": round(memory[MEMBERS] / memory[1], 2),
            }
        )
    return rows


def ensemble_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of the page."""
    lines = [
        "| adapted blocks of 8 | one member | five members | ratio | memory of one | of five | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['last_blocks']} | {row['one_seconds']:.2f} s | {row['all_seconds']:.2f} s | {row['ratio']:.2f} "
            f"| {row['one_mb']:.0f} MB | {row['all_mb']:.0f} MB | {row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {"kwise": kwise, "ensemble": ensemble}
TABLES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {"kwise": kwise_table, "ensemble": ensemble_table}


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Parts that are not asked for stay as they were measured before.
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    for part in options.only:
        found[part] = PARTS[part]()
        print(TABLES[part](found[part]), end="\n\n", flush=True)
    found["machine"] = machine()
    DATA.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
