"""A reward model on the rows of RewardBench, for the command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trimtab.core.errors import DataError
from trimtab.core.files import check_out, json_text, write_out
from trimtab.core.types import Message, Prompt
from trimtab.engines.device import device_of
from trimtab.evals.reward_bench import BenchScores, bench_scores, read_bench
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import TOKEN_BUDGET, rewards_of
from trimtab.runs.models import local_digest
from trimtab.stages.card import refuse_repeated_sources


def score_bench(
    *, model: str, data: Sequence[str], out: Path | None = None, seed: int = 0, device: str | None = None
) -> tuple[BenchScores, int]:
    """The scores of a reward model on the rows of all files, and how many rows it cannot read, which are left out.

    Writes them to `out` if it is given. Raises ConfigError if a file is given twice, and DataError for rows that are
    none of RewardBench, and if the model can read none of them.
    """
    refuse_repeated_sources(data)
    check_out(out)
    files = read_bench(data)
    scorer = RewardModel(path=model).load(token_budget=TOKEN_BUDGET, device=device_of(device))
    texts = [
        (Prompt(messages=(Message("user", item.prompt),)), reply) for item in files.items for reply in item.replies
    ]
    ends = np.cumsum([len(item.replies) for item in files.items])[:-1]
    rewards = [part.tolist() for part in np.split(rewards_of(scorer, texts, unread="nan"), ends)]
    read = [
        (item, given)
        for item, given in zip(files.items, rewards, strict=True)
        if not any(math.isnan(reward) for reward in given)
    ]
    if not read:
        raise DataError(
            f"none of {len(files.items)} rows fits into the {scorer.positions} positions of the reward model",
            where=", ".join(data),
            fix="use a reward model that reads longer texts",
        )
    scores = bench_scores([item for item, _ in read], [given for _, given in read], seed=seed)
    num_too_long = len(files.items) - len(read)
    if out is not None:
        ties = None if scores.ties is None else dataclasses.asdict(scores.ties) | {"score": scores.ties.score}
        origin = {
            "model": model,
            "model_sha256": local_digest(model),
            "sha256": files.sha256,
            "num_rows": len(read),
            "num_too_long": num_too_long,
        }
        write_out(out, json_text(origin | dataclasses.asdict(scores) | {"ties": ties}))
    return scores, num_too_long
