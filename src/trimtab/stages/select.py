"""Sample many replies and keep the best: best-of-N, rejection sampling, pairs.

The best reply of each prompt becomes a demonstration (best-of-N, rejection sampling), the best against another a
preference pair (online DPO), or the demonstration against the policy's own reply (SPIN). Replies are sampled a few
prompts at a time into replies.jsonl, from which a killed run goes on; the choice is made at the end, from that file.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from trimtab import worlds
from trimtab.core import seeds
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.config import Choice
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.metrics import Metrics, Peak, Total, mean_of
from trimtab.core.terminal import note
from trimtab.core.types import Demonstration, Prompt, Rollout
from trimtab.data.chat import Chat
from trimtab.data.layouts import Loaded
from trimtab.engines.build import Engines, load_policy, sampling_roles
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_tokenizer
from trimtab.rewards.combined import CombinedReward, load_rewards, scales_apart
from trimtab.rewards.gold import GoldScorer
from trimtab.runs.loop import stepping
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise
from trimtab.stages.reading import read, say_prompts_left_out
from trimtab.stages.reward_positions import refuse_short_reward_models
from trimtab.stages.selection import (
    Filter,
    Pairs,
    PromptItem,
    Reply,
    ReplyFile,
    choose,
    describe,
    write_demonstrations,
    write_pairs,
)
from trimtab.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Settings of the select stage."""

    model: str
    """The policy to sample from."""
    prompts: str | None = None
    """Prompts: a file, a hub id or a world."""
    demonstrations: str | None = None
    """Demonstrations instead of prompts, each to be set against the policy's own replies (pairs = "demonstration")."""
    limit: int | None = None
    """Use only the first prompts."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the prompts at a bad row, or drop and count such rows."""
    rewards: Annotated[tuple[Any, ...], Choice("reward")] = ()
    """The rewards that judge the replies; several are added up with their weights. Only SPIN needs none."""
    world: str | None = None
    """Record this world's gold score too. Watched only: it chooses nothing."""
    replies_per_prompt: int = 8
    """Replies sampled for each prompt: the N of best-of-N."""
    filter: Filter = field(default_factory=Filter)
    """Which replies may be chosen, and how many of them are chosen."""
    pairs: Pairs = "none"
    """Also write pairs.jsonl: the best reply against the worst, against another at random, or the demonstration against
    each of the policy's replies."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn."""
    prompts_per_step: int = 64
    """Prompts sampled and scored together. Bounds memory and what a kill can lose; changes no reply."""
    max_steps: int | None = None
    """Stop after this many steps, and choose from what there is by then; None samples for every prompt."""
    token_budget: int = 4096
    """Tokens of one forward pass of a reward model: memory and speed only."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How the stage is computed."""
    num_samples: int = 12
    """Prompts whose best reply is written to samples.jsonl, beside the first one drawn."""
    seed: int = 0
    """Seed of the replies and of the draws between equal rewards."""
    trackers: Annotated[tuple[Any, ...], Choice("tracker")] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.demonstrations is None):
            raise ValueError("set either prompts, or demonstrations whose prompts are used")
        refuse_out_of_range(self, "replies_per_prompt", "prompts_per_step", "max_steps")
        if self.pairs in ("worst", "random") and self.replies_per_prompt < 2:
            raise ValueError(f'pairs = "{self.pairs}" needs replies_per_prompt of at least 2')
        if self.pairs == "demonstration" and self.demonstrations is None:
            raise ValueError('pairs = "demonstration" needs demonstrations')
        if not self.rewards and self.pairs != "demonstration":
            raise ValueError("rewards is empty; name at least one, such as [[rewards]] name = 'model', path = '…'")
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError(
                "every reward has weight = 0, so that no reply is the best; give one of them another weight"
            )
        if not self.rewards and self.filter != Filter(finished=self.filter.finished):
            raise ValueError("without rewards no reply is better than another: filter can only set finished")


def run(settings: SelectSettings, run: Run) -> None:
    """Writes replies.jsonl and, chosen from it, best.jsonl (demonstrations) and pairs.jsonl (preference pairs)."""
    chat = Chat(load_tokenizer(settings.model))
    asked, counts = load_asked(settings, chat, run)
    device = settings.engine.find_device()
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": device}
    rewards = load_rewards(settings.rewards, **options) if settings.rewards else None
    refuse_unknown_rewards(settings.filter, rewards)
    policy = load_policy(settings.model, chat, settings)
    engines = Engines.start(settings, run.directory, load=sampling_roles, models={"policy": policy})
    sampler = engines.sampler(policy, chat, settings.sampling)
    prompts = [item.prompt for item in asked]
    sampler.check_prompts(prompts)
    refuse_short_reward_models([rewards], prompts, chat, max_new_tokens=settings.sampling.max_new_tokens)
    world = GoldScorer(worlds.load(settings.world)) if settings.world else None
    replies = ReplyFile(run.directory / "replies.jsonl")
    run.note_path("sampler", sampler.sampler)
    num_planned = math.ceil(len(asked) / settings.prompts_per_step)
    num_steps = min(num_planned, settings.max_steps or num_planned)
    with engines, stepping(run, replies, num_steps=num_steps, checkpoint_every=1, description="select") as steps:
        for number in steps:
            seed_noise(settings.seed, "select", number)
            items = asked[number * settings.prompts_per_step :][: settings.prompts_per_step]
            rows, metrics = sample_step(items, sampler=sampler, rewards=rewards, world=world, settings=settings)
            if number == 0 and rewards is not None:
                say_scales_apart(rows, rewards)
            replies.append(items, rows)
            if shown := max(0, settings.num_samples - number * settings.prompts_per_step):
                first = zip(items[:shown], rows, strict=False)
                run.add_samples(number + 1, [sample_row(one, row, settings.filter) for one, row in first])
            steps.log(metrics)
    choice, written = None, dict[str, int]()
    if settings.rewards:
        choice = choose(asked, replies.read(), settings.filter, seed=settings.seed)
        write_demonstrations(run.directory / "best.jsonl", asked, replies.read(), choice)
    if settings.pairs != "none":
        written = write_pairs(
            run.directory / "pairs.jsonl",
            asked,
            replies.read(),
            choice,
            against=settings.pairs,
            rule=settings.filter,
            seed=settings.seed,
        )
    run.finish(
        {
            "num_steps": num_steps,
            "num_planned_steps": num_planned,
            "replies_per_prompt": settings.replies_per_prompt,
            "sampler": sampler.sampler,
            "counts": counts | (dict(choice.counts) if choice else {}) | written,
        }
        | (describe(replies.read(), choice) if choice else {})
    )


def sample_step(
    items: Sequence[PromptItem],
    *,
    sampler: LocalSampler,
    rewards: CombinedReward | None,
    world: GoldScorer | None,
    settings: SelectSettings,
) -> tuple[list[list[Reply]], Metrics]:
    """The replies to these prompts, sampled and scored; and metrics."""
    started, size = time.perf_counter(), settings.replies_per_prompt
    # One seed for every step: a reply's random numbers come from its prompt and its place in the group.
    seed = seeds.derive(settings.seed, "select")
    rollouts = sampler.generate([item.prompt for item in items], group_size=size, seed=seed)
    generated = time.perf_counter()
    replies, metrics = scored(rollouts, rewards, world)
    rows = [replies[i : i + size] for i in range(0, len(replies), size)]
    best: Metrics = {}
    if rewards is not None:
        known = [[r.reward for r in row if not math.isnan(r.reward)] for row in rows]
        best["select/best_reward"] = mean_of(max(found) for found in known if found)
    logged: Metrics = {
        "rollout/logprob_difference": Peak(sampler.difference),
        "rollout/length_mean": mean_of(r.length for r in replies),
        "rollout/truncated_fraction": mean_of(not r.finished for r in replies),
        "time/generate_seconds": Total(generated - started),
        "time/score_seconds": Total(time.perf_counter() - generated),
    }
    return rows, best | metrics | logged


def scored(
    rollouts: Sequence[Rollout], rewards: CombinedReward | None, world: GoldScorer | None
) -> tuple[list[Reply], Metrics]:
    """The rollouts as replies with their rewards, the parts of these, and gold; and metrics."""
    metrics: Metrics = {}
    totals: Tensor | None = None
    by_part: dict[str, Tensor] = {}
    if rewards is not None:
        totals, by_part, metrics = rewards.score_parts(rollouts)
    gold = None
    if world is not None:
        gold, gold_metrics = world.score(rollouts)
        metrics = metrics | gold_metrics
    # A reward model sums in another order at another place in the batch. Equal replies are to be exact ties, so all
    # take the score of the first.
    first: dict[tuple[str, tuple[int, ...]], int] = {}
    replies = []
    for i, r in enumerate(rollouts):
        same = first.setdefault((r.prompt.id, r.response_ids), i)
        replies.append(
            Reply(
                response=r.response,
                length=len(r.response_ids),
                finished=r.finish_reason == "stop",
                reward=math.nan if totals is None else float(totals[same]),
                parts={name: float(scores[same]) for name, scores in by_part.items()},
                gold=None if gold is None else float(gold[same]),
            )
        )
    return replies, metrics


def say_scales_apart(rows: Sequence[Sequence[Reply]], rewards: CombinedReward) -> None:
    """Says on stderr if, among these replies, one of the rewards hardly counts beside another."""
    weights = {part.name: part.weight for part in rewards.parts}
    parts = {name: torch.tensor([reply.parts[name] for row in rows for reply in row]) for name in weights}
    if apart := scales_apart(parts, weights):
        note(f"in step 1, {apart}; change the weights")


def sample_row(asked: PromptItem, replies: Sequence[Reply], rule: Filter) -> dict[str, object]:
    """A row of samples.jsonl: the best reply that passes the filter, and as `baseline_response` the first one drawn,
    which is what a single sample would give. If none passes, the row holds only the first one."""
    able = [r for r in replies if not r.refused_by(rule)]
    if not able:
        return {"prompt": asked.prompt.text, "response": replies[0].response}
    best = max(able, key=lambda r: r.reward)
    row: dict[str, object] = {"prompt": asked.prompt.text}
    for prefix, reply in (("baseline_", replies[0]), ("", best)):
        row |= {f"{prefix}response": reply.response, f"{prefix}reward": reply.reward}
        row |= {f"{prefix}gold": reply.gold} if reply.gold is not None else {}
    return row


def refuse_unknown_rewards(rule: Filter, rewards: CombinedReward | None) -> None:
    """Raises ConfigError if the filter names a reward that the settings do not have."""
    known = ["reward", *(part.name for part in rewards.parts)] if rewards else []
    if unknown := sorted(set(rule.at_least) - set(known)):
        raise ConfigError(
            f"filter.at_least names {', '.join(map(repr, unknown))}, which no reward is called",
            where="filter.at_least",
            fix=f"name the sum of all rewards or one of them: {', '.join(known)}",
        )


def load_asked(settings: SelectSettings, chat: Chat, run: Run) -> tuple[list[PromptItem], dict[str, int]]:
    """The prompts, each once, with their demonstrations if these are given; and the counts.

    A prompt that comes again would be answered by the same replies again, since its random numbers come from its id.
    """
    source = settings.demonstrations or settings.prompts
    assert source is not None
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "limit": settings.limit, "accepts": chat.refusal}
    kind: type[Any] = Prompt if settings.demonstrations is None else Demonstration
    loaded: Loaded[Any] = read(kind, source, run, **options)
    found = [PromptItem(r, None) if kind is Prompt else PromptItem(r.prompt, r.response) for r in loaded.records]
    counts = Counter(loaded.counts)
    asked: dict[str, PromptItem] = {}
    for one in found:
        before = asked.setdefault(one.prompt.id, one)
        if before.prompt.messages != one.prompt.messages:
            raise DataError(
                f"two different prompts have the id {one.prompt.id!r}",
                where=source,
                fix="give every prompt an id of its own, or leave the ids out",
            )
        counts["dropped_repeated_prompts"] += before is not one
    longest = settings.sampling.max_prompt_tokens
    lengths = chat.prompt_lengths(a.prompt for a in asked.values())
    kept = [a for a, length in zip(asked.values(), lengths, strict=True) if length <= longest]
    counts["dropped_long_prompts"] = len(asked) - len(kept)
    if not kept:
        raise DataError(
            f"none of {len(asked)} prompts has at most {longest} tokens",
            where=source,
            fix="raise sampling.max_prompt_tokens",
        )
    say_prompts_left_out(counts, len(found), longest=longest)
    return kept, dict(counts)


STAGE = Stage(
    settings=SelectSettings,
    run=run,
    writes=("best.jsonl", "pairs.jsonl", "replies.jsonl", "metrics.jsonl", "samples.jsonl"),
    grows=("max_steps",),
    about="Many replies to each prompt were sampled and scored; the best are kept as data to train on.",
    charts=(),  # nothing is trained, so a step is only the next prompts
)
