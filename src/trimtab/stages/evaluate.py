"""Evaluation: one checkpoint against another on the same prompts, every difference with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trimtab import seeds, worlds
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.engines.local_generator import LocalGenerator, Sampling
from trimtab.evals.overoptimisation import best_of_n_curve, sizes_up_to
from trimtab.evals.stats import bootstrap_mean, paired_difference, win_rate
from trimtab.evals.text import text_stats
from trimtab.math.masking import sum_per_sequence
from trimtab.models.forward import exact_kl_of, token_logprobs_of
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.models.vocabulary import refuse_other_vocabulary
from trimtab.rewards.gold import GoldScorer
from trimtab.rewards.model import RewardModelScorer
from trimtab.runs.run import Run
from trimtab.stages.online_sampling import in_groups, rollout_trees
from trimtab.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the evaluate stage."""

    model: str
    """The checkpoint to evaluate."""
    baseline: str
    """The checkpoint to compare it with, usually the SFT model; also what the KL is taken to."""
    prompts: str
    """Prompts that no stage has trained on: a file, a hub id or a world's test split."""
    num_prompts: int = 200
    """How many of them."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the prompts at a bad row, or drop and count such rows."""
    world: str | None = None
    """Score by this world's gold."""
    reward_model: str | None = None
    """Score by this reward model."""
    best_of: int = 0
    """Also sample the baseline this often for each prompt and report best-of-n by gold; 0 does not. Needs world."""
    best_of_prompts: int = 64
    """Prompts used for best_of."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn, for both models."""
    num_samples: int = 24
    """Replies of both models written to samples.jsonl."""
    token_budget: int = 8192
    """Tokens of one forward pass: memory and speed only."""
    seed: int = 0
    """Seed of the replies; both models draw with the same random numbers."""

    def __post_init__(self) -> None:
        if self.best_of and self.world is None:
            raise ValueError(f"best_of = {self.best_of} ranks by gold and needs world")
        if self.world is None and self.reward_model is None:
            raise ValueError("set world or reward_model: there is nothing to score by")


def run(settings: Settings, run: Run) -> None:
    """Writes the numbers to summary.json and replies of both models to samples.jsonl."""
    chat = Chat(load_tokenizer(settings.model))
    loaded = load(
        Prompt, settings.prompts, on_bad_row=settings.on_bad_row, limit=settings.num_prompts, accepts=chat.refusal
    )
    run.add_data(settings.prompts, loaded.sha256, len(loaded.records), loaded.report)
    temperature = settings.sampling.temperature
    policy = Policy(load_causal(settings.model), pad_id=chat.pad_id, temperature=temperature)
    refuse_other_vocabulary(
        chat.tokenizer,
        settings.baseline,
        role="baseline",
        where="baseline and model",
        fix="compare with a model of the policy's own family and tokenizer; for another, sample both with "
        "`trimtab generate` and score the files with `trimtab score`",
    )
    baseline = Policy(load_causal(settings.baseline), pad_id=chat.pad_id, temperature=temperature)
    generators = {
        name: LocalGenerator(model, chat, settings.sampling)
        for name, model in (("policy", policy), ("baseline", baseline))
    }
    for generator in generators.values():
        generator.check_prompts(loaded.records)
    replies = {
        name: generator.generate(loaded.records, group_size=1, seed=seeds.derive(settings.seed, "evaluate"))
        for name, generator in generators.items()
    }
    judges = load_judges(settings)
    scores: dict[str, dict[str, np.ndarray]] = {"policy": {}, "baseline": {}}
    for judge, scorer in judges.items():
        # In one call, in which equal replies to a prompt have one score: as a tie, not as a coin flip of rounding.
        both = scorer.score([*replies["policy"], *replies["baseline"]])[0].numpy()
        scores["policy"][judge], scores["baseline"][judge] = np.split(both, [len(replies["policy"])])
    prompt_ids = [p.id for p in loaded.records]
    summary: dict[str, object] = {
        name: describe(rollouts, scores[name], prompt_ids) | sampled_by(generators[name])
        for name, rollouts in replies.items()
    }
    summary["kl"] = kl_to_baseline(policy, baseline, replies["policy"], settings.token_budget)
    for judge in judges:
        ours, theirs = scores["policy"][judge], scores["baseline"][judge]
        summary[f"win_rate_by_{judge}"] = win_rate(ours, theirs, groups=prompt_ids).named("win_rate")
        summary[f"{judge}_difference"] = paired_difference(ours, theirs, groups=prompt_ids).named("difference")
    if settings.best_of:
        summary["best_of"] = best_of_baseline(settings, generators["baseline"], loaded.records)
    run.rewind(-1)  # a run killed between here and its end has written the samples already
    run.add_samples(0, sample_rows(replies, scores, settings.num_samples))
    run.finish(summary)


def load_judges(settings: Settings) -> dict[str, GoldScorer | RewardModelScorer]:
    """What replies are scored by: "gold", "reward" or both."""
    judges: dict[str, GoldScorer | RewardModelScorer] = {}
    if settings.world is not None:
        judges["gold"] = GoldScorer(worlds.load(settings.world))
    if settings.reward_model is not None:
        judges["reward"] = RewardModelScorer.from_directory(settings.reward_model, token_budget=settings.token_budget)
    return judges


def describe(
    rollouts: Sequence[Rollout], scores: dict[str, np.ndarray], prompt_ids: Sequence[str]
) -> dict[str, object]:
    """Scores with their intervals, lengths and text statistics of one model's replies."""
    numbers: dict[str, object] = {}
    for judge, values in scores.items():
        numbers |= bootstrap_mean(values, groups=prompt_ids).named(judge)
    lengths = [len(r.response_ids) for r in rollouts]
    truncated = sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)
    numbers |= {"length_mean": float(np.mean(lengths)), "truncated_fraction": truncated, "num_replies": len(rollouts)}
    return numbers | text_stats([r.response for r in rollouts])


def sampled_by(generator: LocalGenerator) -> dict[str, object]:
    """How replies were decoded, and how far the sampler's log-probabilities were from the policy's."""
    return {"sampler": generator.sampler, "logprob_difference": generator.difference}


def kl_to_baseline(
    policy: Policy, baseline: Policy, rollouts: Sequence[Rollout], token_budget: int
) -> dict[str, float]:
    """KL(policy || baseline) in nats per reply over the policy's own replies, with its interval.

    `kl_sampled` is the mean log-ratio (k1). `kl_exact` sums the exact KL of every next-token distribution met on the
    way (Rao-Blackwellised): the same expectation, much less noise.
    """
    trees = rollout_trees(in_groups(rollouts, 1))
    log_ratio = token_logprobs_of(policy, trees, token_budget) - token_logprobs_of(baseline, trees, token_budget)
    sampled = sum_per_sequence(log_ratio, trees.sequence_ids, trees.num_sequences).numpy()
    exact_per_token = exact_kl_of(policy, baseline, trees, token_budget)
    exact = sum_per_sequence(exact_per_token, trees.sequence_ids, trees.num_sequences).numpy()
    return bootstrap_mean(sampled).named("kl_sampled") | bootstrap_mean(exact).named("kl_exact")


def best_of_baseline(settings: Settings, baseline: LocalGenerator, prompts: Sequence[Prompt]) -> dict[str, object]:
    """Unbiased gold of best-of-n of the baseline, chosen by gold itself: how good its own best replies are."""
    assert settings.world is not None
    chosen = prompts[: settings.best_of_prompts]
    rollouts = baseline.generate(chosen, group_size=settings.best_of, seed=seeds.derive(settings.seed, "best of"))
    gold = GoldScorer(worlds.load(settings.world)).score(rollouts)[0].numpy().reshape(len(chosen), settings.best_of)
    curve = best_of_n_curve(gold, gold, sizes_up_to(settings.best_of))
    return {
        "num_prompts": len(chosen),
        "curve": [{"n": point.n, "kl": point.kl} | point.value.named("gold") for point in curve],
    }


def sample_rows(
    replies: dict[str, list[Rollout]], scores: dict[str, dict[str, np.ndarray]], num: int
) -> list[dict[str, object]]:
    """Rows of samples.jsonl: the first prompts, not the best, with both models' replies and scores."""
    rows = []
    for i, (ours, theirs) in enumerate(zip(replies["policy"][:num], replies["baseline"][:num], strict=True)):
        row: dict[str, object] = {
            "prompt": ours.prompt.text,
            "response": ours.response,
            "baseline_response": theirs.response,
        }
        for judge in scores["policy"]:
            row[judge] = float(scores["policy"][judge][i])
            row[f"baseline_{judge}"] = float(scores["baseline"][judge][i])
        rows.append(row)
    return rows
