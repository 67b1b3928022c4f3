"""The rules of selection: which of the replies sampled to a prompt are kept, and what is paired with what."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimtab.core import seeds
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.errors import DataError
from trimtab.core.files import write_rows
from trimtab.core.types import Demonstration, PreferencePair, Prompt, to_dict
from trimtab.evals.overoptimisation import best_of_each, best_of_n_kl, curve_of, sizes_up_to
from trimtab.stages.rows_file import RowsFile
from trimtab.stats import bootstrap_mean

Pairs = Literal["none", "worst", "random", "demonstration"]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which replies are kept. A reply that could not be judged, or that says nothing, is never kept."""

    finished: bool = True
    """Keep only replies that ended by themselves: training on a reply that was cut off teaches to stop in
    mid-sentence."""
    at_least: dict[str, float] = field(default_factory=dict)
    """The lowest scores to keep: of the weighted sum as "reward", or of one reward by its name. { exact_answer = 1 }
    keeps what is correct and lets the sum decide between correct replies."""
    keep: Literal["best", "all"] = "best"
    """Keep the best reply to each prompt (Touvron et al., arXiv:2307.09288), or all that pass (Yuan et al.,
    arXiv:2308.01825)."""
    dedup: bool = True
    """With keep = "all": keep each text once for each prompt."""
    top_fraction: float = 1.0
    """Of all that pass so far, over all prompts, keep this share with the highest reward (RAFT: Dong et al.,
    arXiv:2304.06767)."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "top_fraction")


@dataclass(frozen=True)
class PromptItem:
    """A prompt, with the demonstrated reply if one was given."""

    prompt: Prompt
    demonstration: str | None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One sampled reply and its scores."""

    response: str
    length: int
    """In tokens, with its end token."""
    finished: bool
    reward: float
    """The weighted sum of the rewards; nan if the reply could not be judged."""
    parts: Mapping[str, float]
    """The score of each reward before its weight."""
    gold: float | None

    def refused_by(self, rule: Filter) -> str:
        """Why the reply may not be kept, as the name of a count, or ''."""
        if not self.response.strip():
            return "dropped_empty"
        if rule.finished and not self.finished:
            return "dropped_unfinished"
        if math.isnan(self.reward):
            return "dropped_unjudged"
        scores = {**self.parts, "reward": self.reward}
        return "dropped_below_at_least" if not all(scores[k] >= low for k, low in rule.at_least.items()) else ""


class ReplyFile(RowsFile):
    """replies.jsonl, with a row for each prompt."""

    def append(self, asked: Sequence[PromptItem], replies: Sequence[Sequence[Reply]]) -> None:
        """Adds a row for each prompt."""
        pairs = zip(asked, replies, strict=True)
        self.append_rows({"prompt": to_dict(one.prompt), "replies": [asdict(r) for r in row]} for one, row in pairs)

    def read(self) -> Iterator[list[Reply]]:
        """The replies to each prompt, in the order of prompts."""
        with self.path.open("rb") as file:
            for line in file:
                yield [
                    Reply(
                        **reply
                        | {"reward": _number(reply["reward"])}
                        | {"parts": {name: _number(score) for name, score in reply["parts"].items()}}
                    )
                    for reply in json.loads(line)["replies"]
                ]


@dataclass(frozen=True)
class Selection:
    """The replies that were kept, as their numbers for each prompt, and counts of what became of the others."""

    picked: Sequence[Sequence[int]]
    counts: Mapping[str, int]


def choose(asked: Sequence[PromptItem], rows: Iterable[Sequence[Reply]], rule: Filter, *, seed: int) -> Selection:
    """The replies that the filter keeps. Every other reply is counted once, by what first refused it.

    Ties between equal rewards are broken by a draw from `seed` and the prompt's id. Raises DataError if nothing is
    kept.
    """
    counts: Counter[str] = Counter()
    picked: list[list[int]] = []
    rewards: list[float] = []
    for one, replies in zip(asked, rows, strict=False):  # max_steps may leave prompts at the end unasked
        counts["replies"] += len(replies)
        able = []
        for i, reply in enumerate(replies):
            if reason := reply.refused_by(rule):
                counts[reason] += 1
            else:
                able.append(i)
        counts["prompts_without_choice"] += not able
        if rule.keep == "best" and able:
            tied = _extreme(replies, able, max)
            counts["prompts_with_tied_best"] += len({replies[i].response for i in tied}) > 1
            counts["dropped_not_best"] += len(able) - 1
            able = [_drawn(tied, seed, "best", one.prompt.id)]
        elif rule.dedup:
            once = sorted({replies[i].response: i for i in reversed(able)}.values())
            counts["dropped_repeated"] += len(able) - len(once)
            able = once
        picked.append(able)
        rewards += [replies[i].reward for i in able]
    picked = _top(picked, rewards, rule.top_fraction, seed)
    counts["chosen"] = sum(map(len, picked))
    counts["dropped_below_top_fraction"] = len(rewards) - counts["chosen"]
    if not counts["chosen"]:
        raise DataError(
            f"none of {counts['replies']} replies passes the filter: "
            + ", ".join(f"{num} {name}" for name, num in counts.items() if name.startswith("dropped_") and num),
            where="filter",
            fix="loosen filter.at_least, raise sampling.max_new_tokens, or sample more replies",
        )
    return Selection(picked, dict(counts))


def write_demonstrations(
    path: Path, asked: Sequence[PromptItem], rows: Iterable[Sequence[Reply]], choice: Selection
) -> None:
    """Writes each reply that was kept as a demonstration, with the reward that it was kept for."""
    chosen = (
        to_dict(Demonstration(prompt=one.prompt, response=replies[i].response)) | {"best_reward": replies[i].reward}
        for one, replies, picked in zip(asked, rows, choice.picked, strict=False)
        for i in picked
    )
    write_rows(path, chosen)


def write_pairs(
    path: Path,
    asked: Sequence[PromptItem],
    rows: Iterable[Sequence[Reply]],
    choice: Selection | None,
    *,
    against: Pairs,
    rule: Filter,
    seed: int,
) -> dict[str, int]:
    """Writes preference pairs; returns how many were written, and how many were dropped for each reason.

    `choice` is None if demonstrations are the chosen side. Raises DataError if no pair is left.
    """
    counts: Counter[str] = Counter()
    picked = [()] * len(asked) if choice is None else choice.picked

    def pairs() -> Iterator[dict[str, Any]]:
        for one, replies, kept in zip(asked, rows, picked, strict=False):
            if against == "demonstration":
                found = demonstration_pairs(one, replies, rule, counts)
            else:
                found = reward_pair(one, replies, kept, rule, counts, against=against, seed=seed)
            counts["pairs"] += len(found)
            yield from map(to_dict, found)

    write_rows(path, pairs())
    if not counts["pairs"]:
        raise DataError(
            "no pair could be made: " + ", ".join(f"{num} {name}" for name, num in counts.items() if num),
            where=f'pairs = "{against}"',
            fix="sample more replies of each prompt, or raise sampling.temperature or max_new_tokens",
        )
    return dict(counts)


def reward_pair(
    one: PromptItem,
    replies: Sequence[Reply],
    kept: Sequence[int],
    rule: Filter,
    counts: Counter[str],
    *,
    against: Pairs,
    seed: int,
) -> list[PreferencePair]:
    """The best reply kept for the prompt against another one of lower reward; their difference is the margin. Empty if
    there is no such pair, which is counted."""
    others = [i for i, r in enumerate(replies) if not r.refused_by(Filter(finished=rule.finished))]
    if not kept:
        counts["prompts_without_pair"] += 1
        return []
    best = _drawn(_extreme(replies, kept, max), seed, "best", one.prompt.id)
    others.remove(best)
    if not others:
        counts["prompts_without_pair"] += 1
        return []
    if against == "worst":
        others = _extreme(replies, others, min)
    chosen, rejected = replies[best], replies[_drawn(others, seed, "rejected", one.prompt.id)]
    if chosen.response == rejected.response:
        counts["dropped_identical_pair"] += 1
        return []
    margin = chosen.reward - rejected.reward
    if margin <= 0:  # below 0 if at_least refused a reply that has a higher sum of rewards
        counts["dropped_no_lower_reward"] += 1
        return []
    return [
        PreferencePair(prompt=one.prompt, chosen=chosen.response, rejected=rejected.response, margin=margin),
    ]


def demonstration_pairs(
    one: PromptItem, replies: Sequence[Reply], rule: Filter, counts: Counter[str]
) -> list[PreferencePair]:
    """The demonstration against each different reply of the policy (SPIN: Chen et al., arXiv:2401.01335, eq. 4.7)."""
    assert one.demonstration is not None
    rejected: dict[str, PreferencePair] = {}
    for reply in replies:
        if not reply.response.strip():
            counts["dropped_empty_pair"] += 1
        elif rule.finished and not reply.finished:
            counts["dropped_unfinished_pair"] += 1
        elif reply.response.strip() == one.demonstration.strip():
            counts["dropped_identical_pair"] += 1
        elif reply.response in rejected:
            counts["dropped_repeated_pair"] += 1
        else:
            rejected[reply.response] = PreferencePair(
                prompt=one.prompt, chosen=one.demonstration, rejected=reply.response
            )
    counts["prompts_without_pair"] += not rejected
    return list(rejected.values())


def describe(rows: Iterable[Sequence[Reply]], choice: Selection) -> dict[str, Any]:
    """What the selection gained: the reward (and gold) of what was kept, and unbiased estimates of best-of-n for values
    of n up to N from the same replies. The curve is over the prompts whose replies could all be judged."""
    curve = _Curve()
    kept: dict[str, list[float]] = {"reward": [], "gold": [], "length": []}
    groups: list[int] = []
    waiting: list[Sequence[Reply]] = []
    for number, (replies, picked) in enumerate(zip(rows, choice.picked, strict=True)):
        for i in picked:
            groups.append(number)
            kept["reward"].append(replies[i].reward)
            kept["length"].append(float(replies[i].length))
            kept["gold"] += [gold] if (gold := replies[i].gold) is not None else []
        waiting.append(replies)
        if len(waiting) == _BLOCK:
            curve.add(waiting)
            waiting = []
    curve.add(waiting)
    chosen: dict[str, float] = {"num": len(groups)}
    for name, values in kept.items():
        if values:
            chosen |= bootstrap_mean(values, groups=groups).named(name)
    return {"chosen": chosen, "best_of": curve.summary(num_left_out=len(choice.picked) - curve.num_prompts)}


_BLOCK = 256
"""How many prompts' order statistics are computed together."""


class _Curve:
    """Best-of-n, gathered for some prompts at a time: only one number for each prompt and n is kept."""

    def __init__(self) -> None:
        self.ns: list[int] = []
        self.tables: dict[str, list[Any]] = {}
        self.num_prompts = 0

    def add(self, rows: Sequence[Sequence[Reply]]) -> None:
        """Counts these prompts in, except those with a reply that could not be judged."""
        judged = [row for row in rows if not any(math.isnan(r.reward) for r in row)]
        if not judged:
            return
        self.num_prompts += len(judged)
        self.ns = sizes_up_to(len(judged[0]))
        reward = np.array([[r.reward for r in row] for row in judged])
        self._gather("reward", reward, reward)
        if judged[0][0].gold is not None:
            gold = np.array([[r.gold for r in row] for row in judged], dtype=float)
            self._gather("gold", gold, reward)
            self._gather("gold_by_gold", gold, gold)

    def _gather(self, name: str, values: Any, ranked_by: Any) -> None:
        self.tables.setdefault(name, []).append(best_of_each(values, ranked_by, self.ns))

    def summary(self, *, num_left_out: int) -> dict[str, Any]:
        """A row for each n, with an upper bound of the KL that choosing the best of n costs."""
        rows: list[dict[str, float]] = [{"n": n, "kl": best_of_n_kl(n)} for n in self.ns]
        for name, tables in self.tables.items():
            for row, point in zip(rows, curve_of(np.concatenate(tables), self.ns), strict=True):
                row |= point.value.named(name)
        return {"num_prompts": self.num_prompts, "num_prompts_left_out": num_left_out, "curve": rows}


def _extreme(replies: Sequence[Reply], among: Sequence[int], end: Callable[[Iterable[float]], float]) -> list[int]:
    """The replies of `among` with the highest (`max`) or the lowest (`min`) reward."""
    edge = end(replies[i].reward for i in among)
    return [i for i in among if replies[i].reward == edge]


def _drawn(among: Sequence[int], seed: int, *purpose: str) -> int:
    """One of `among` at random."""
    return among[int(seeds.generator(seed, "select", *purpose).integers(len(among)))]


def _top(picked: list[list[int]], rewards: Sequence[float], fraction: float, seed: int) -> list[list[int]]:
    """The replies with the highest rewards over all prompts; the share is rounded up, and ties are broken by a draw."""
    num = math.ceil(fraction * len(rewards))
    order = np.lexsort((seeds.generator(seed, "select", "top").permutation(len(rewards)), -np.array(rewards)))
    stays = np.zeros(len(rewards), dtype=bool)
    stays[order[:num]] = True
    left = iter(stays.tolist())
    return [[i for i in able if next(left)] for able in picked]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
