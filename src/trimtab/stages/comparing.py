"""Compares files of replies: pairs the replies of two models, and loads what scores them.

What a comparer says becomes verdicts, and `evals` says what those are worth. Nothing is sampled here: `trimtab
generate` writes the replies, so that the same ones can be compared by a world, a reward model and people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab import worlds
from trimtab.core import config, registry
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Demonstration, Prompt, Rollout, from_dict, prompt_id
from trimtab.data.layouts import load
from trimtab.data.sources import read_rows, records_source
from trimtab.engines.device import device_of
from trimtab.evals.comparers import LENGTH, Comparer, ReplyPair, ScoreComparer, verdicts_by
from trimtab.evals.verdicts import PairVerdict
from trimtab.rewards.gold import GoldScorer
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import TOKEN_BUDGET, rewards_of
from trimtab.stats import Floats


def scored_comparer(by: str, *, device: str | None = None) -> ScoreComparer:
    """A comparer by score: "length", a world's gold ("world:helpdesk"), a reward by its name ("exact_answer"), or a
    reward model (a directory or hub id).

    A reply that a reward model has not enough positions to read cannot be judged by it.
    """
    if by == LENGTH.name:
        return LENGTH
    if by.startswith("world:"):
        gold = GoldScorer(worlds.load(by.removeprefix("world:")))
        return ScoreComparer(by, lambda texts: np.array([gold.gold(prompt, text).total for prompt, text in texts]))
    if by in registry.names("reward"):
        return _comparer_by_reward(by)
    scorer: Any = RewardModel(path=by).load(token_budget=TOKEN_BUDGET, device=device_of(device))

    def score(texts: Sequence[tuple[Prompt, str]]) -> Floats:
        return rewards_of(scorer, texts, unread="nan")

    return ScoreComparer(by, score)


def _comparer_by_reward(name: str) -> ScoreComparer:
    """A comparer by a registered reward with its usual settings. Raises ConfigError for one that needs settings."""
    try:
        reward: Any = config.resolve(registry.find("reward", name, where="--by"), {}, where="--by")
    except ConfigError as error:
        raise ConfigError(
            f"the reward {name!r} has settings without a default ({error.problem})",
            where="--by",
            fix="compare the models by it with `trimtab evaluate`, whose run file holds its settings",
        ) from error
    scorer = reward.load(token_budget=TOKEN_BUDGET)

    def score(texts: Sequence[tuple[Prompt, str]]) -> Floats:
        nothing: dict[str, Any] = {"prompt_ids": (), "response_ids": (), "logprobs": (), "finish_reason": "stop"}
        replies = [Rollout(prompt=prompt, response=text, **nothing) for prompt, text in texts]
        return np.array(scorer.score(replies)[0].tolist())

    return ScoreComparer(name, score)


@dataclass(frozen=True, kw_only=True)
class RepliesFile:
    """The replies of one file."""

    by_prompt: dict[str, tuple[Prompt, list[str]]]
    """By the id of the prompt's messages."""
    sha256: str

    @property
    def num_replies(self) -> int:
        """How many there are."""
        return sum(len(replies) for _, replies in self.by_prompt.values())


def read_replies(source: str) -> RepliesFile:
    """The replies of a file of `trimtab generate`, empty ones too, or of demonstrations in any layout."""
    generated = _generated(source)
    if generated is None:
        loaded = load(Demonstration, source)
        generated = [(one.prompt, one.response) for one in loaded.records], loaded.sha256
    found: dict[str, tuple[Prompt, list[str]]] = {}
    for prompt, reply in generated[0]:
        found.setdefault(prompt_id(prompt.messages), (prompt, []))[1].append(reply)
    return RepliesFile(by_prompt=found, sha256=generated[1])


def _generated(source: str) -> tuple[list[tuple[Prompt, str]], str] | None:
    """The replies of rows as `trimtab generate` writes them, and the hash of the file; None if the rows are others."""
    if records_source(source) is not None:
        return None
    read = read_rows(source)
    rows = [row for _, row in read.rows]
    known = all(isinstance(row.get("response"), str) and isinstance(row.get("response_ids"), list) for row in rows)
    if read.bad or not known:
        return None
    return [(from_dict(Prompt, row["prompt"]), row["response"]) for row in rows], read.sha256


@dataclass(frozen=True, kw_only=True)
class ComparedReplies:
    """What comparers say of the replies of some models beside those of a baseline."""

    verdicts: dict[str, tuple[PairVerdict, ...]]
    """By comparer."""
    num_unpaired: dict[str, int]
    """Replies of each model and of the baseline that have no partner among the other's replies to the same prompt."""
    num_unjudged: dict[str, dict[str, int]]
    """By comparer, the pairs of each model that it could not judge."""
    sha256: dict[str, str]
    """The hash of each file of replies."""


def compare_replies(
    models: Mapping[str, str], baseline: tuple[str, str], load_comparers: Callable[[], Sequence[Comparer]]
) -> ComparedReplies:
    """Has comparers compare the replies of models, each a name with its file, with those of a baseline.

    The replies to a prompt are paired in their order: the first of the one file with the first of the other. The
    comparers are loaded after the files. Raises DataError for two files without a prompt in common, and ConfigError for
    a comparer that judges no pair.
    """
    name, source = baseline
    theirs = read_replies(source)
    hashes, pairs, num_unpaired = {source: theirs.sha256}, {}, {}
    for model, file in models.items():
        ours = read_replies(file)
        hashes[file] = ours.sha256
        pairs[model] = pair_replies(ours, theirs, where=f"{file} and {source}")
        num_unpaired[model] = ours.num_replies + theirs.num_replies - 2 * len(pairs[model])
    verdicts, num_unjudged = {}, {}
    for comparer in load_comparers():
        found = {model: verdicts_by(comparer, own, model=model, baseline=name) for model, own in pairs.items()}
        verdicts[comparer.name] = tuple(one for given, _ in found.values() for one in given)
        num_unjudged[comparer.name] = {model: num for model, (_, num) in found.items()}
        if not verdicts[comparer.name]:
            raise ConfigError(
                f"{comparer.name} judges none of the pairs",
                where="--by",
                fix="name a comparer that knows these replies: a file of verdicts has to hold their texts, and the "
                "prompts as they are here",
            )
    return ComparedReplies(verdicts=verdicts, num_unpaired=num_unpaired, num_unjudged=num_unjudged, sha256=hashes)


def pair_replies(ours: RepliesFile, theirs: RepliesFile, *, where: str) -> list[ReplyPair]:
    """The replies of two files to the same prompts, in pairs. Raises DataError if no prompt is in both."""
    pairs = [
        ReplyPair(prompt=prompt, reply=reply, baseline_reply=other)
        for key, (prompt, replies) in ours.by_prompt.items()
        if key in theirs.by_prompt
        for reply, other in zip(replies, theirs.by_prompt[key][1], strict=False)
    ]
    if not pairs:
        raise DataError(
            "the two files have no prompt in common",
            where=where,
            fix="have both models answer the same prompts, with the same system turn",
        )
    return pairs
