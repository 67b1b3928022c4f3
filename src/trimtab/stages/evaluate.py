"""Measure a policy against a baseline, with intervals.

One checkpoint answers prompts that it was not trained on, and so does another if one is named.

Replies are scored by a world, by a reward model, or by any reward that online training knows: accuracy on exact answers
is `rewards = ["exact_answer"]`. A reply that a reward cannot judge has no score: it is left out on both sides, and
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

from trimtab import worlds
from trimtab.batches.rollouts import in_groups, rollout_trees
from trimtab.core import seeds
from trimtab.core.config import Choice
from trimtab.core.terminal import note
from trimtab.core.types import Prompt, Rollout, prompt_id
from trimtab.data.chat import Chat
from trimtab.engines.build import Engines, load_policy, sampling_roles
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.evals.overoptimisation import best_of_n_curve, sizes_up_to
from trimtab.evals.text import text_stats, words
from trimtab.math.masking import sum_per_sequence
from trimtab.models.forward import exact_kl_of, token_logprobs_of
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy
from trimtab.models.vocabulary import refuse_other_vocabulary
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.gold import GoldReward, GoldScorer
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import RewardModelScorer
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise
from trimtab.stages.reading import read
from trimtab.stages.reward_positions import refuse_short_reward_models
from trimtab.stages.stage import Stage, few_prompts
from trimtab.stats import bootstrap_mean, paired_difference, win_rate


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Settings of the evaluate stage."""

    model: str
    """The checkpoint to evaluate."""
    baseline: str | None = None
    """The checkpoint to compare it with, usually the SFT model; the KL is taken to it too. None compares nothing."""
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
    rewards: Annotated[tuple[Any, ...], Choice("reward")] = ()
    """Score by these, each under its name; if there are several, also by their weighted sum, as in online training."""
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
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How the stage is computed."""
    seed: int = 0
    """Seed of the replies; both models draw with the same random numbers."""

    def __post_init__(self) -> None:
        if self.best_of and (self.world is None or self.baseline is None):
            raise ValueError(
                f"best_of = {self.best_of} ranks replies of the baseline by gold: it needs world and baseline"
            )
        if self.world is None and self.reward_model is None and not self.rewards:
            raise ValueError("set world, reward_model or rewards: there is nothing to score by")
        if self.reward_model is not None and self.rewards:
            raise ValueError("reward_model with rewards: name the reward model among the rewards")
        if self.world is not None and any(isinstance(r, GoldReward) for r in self.rewards):
            raise ValueError("world with the reward gold: both are called gold; leave one of them out")


Scores = Mapping[str, np.ndarray]
"""The scores of one model's replies by the name of the judge; nan for a reply that it could not judge."""


def run(settings: EvaluateSettings, run: Run) -> None:
    """Writes the numbers to summary.json and replies to samples.jsonl."""
    chat = Chat(load_tokenizer(settings.model))
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "accepts": chat.refusal}
    loaded = read(Prompt, settings.prompts, run, limit=settings.num_prompts, **options)
    models = load_models(settings, chat)
    score = load_judges(settings, loaded.records, chat)
    with Engines.start(settings, run.directory, load=sampling_roles, models=models) as engines:
        generators = {
            name: engines.sampler(model, chat, settings.sampling, name=name) for name, model in models.items()
        }
        for generator in generators.values():
            generator.check_prompts(loaded.records)
        replies = {
            name: generator.generate(loaded.records, group_size=1, seed=seeds.derive(settings.seed, "evaluate"))
            for name, generator in generators.items()
        }
        best_of = best_of_baseline(settings, generators["baseline"], loaded.records) if settings.best_of else None
    for name, generator in generators.items():
        run.note_path(f"sampler of {name}", generator.sampler)
    seed_noise(settings.seed, "evaluate")  # for judges that draw random numbers
    # Both models are scored in one call, so that equal replies to a prompt get one score: they are a tie, and rounding
    # does not decide between them.
    together = score([reply for rollouts in replies.values() for reply in rollouts])
    num = len(loaded.records)
    scores = {
        name: {judge: values[i * num : (i + 1) * num] for judge, values in together.items()}
        for i, name in enumerate(replies)
    }
    prompt_ids = [prompt_id(p.messages) for p in loaded.records]  # rows of one prompt may have an id each
    # Longer texts repeat more words, so variety is compared at an equal number of them.
    num_words = min(sum(len(words(r.response)) for r in rollouts) for rollouts in replies.values())
    summary: dict[str, object] = {
        name: describe(rollouts, scores[name], prompt_ids, num_words)
        | {"sampler": generators[name].sampler, "logprob_difference": generators[name].difference}
        for name, rollouts in replies.items()
    }
    summary["judges"] = list(scores["policy"])
    if "baseline" in models:
        summary |= compare(scores["policy"], scores["baseline"], prompt_ids)
        if settings.sampling.truncates:
            note(
                f"with sampling.top_p = {settings.sampling.top_p} and sampling.top_k = {settings.sampling.top_k} "
                "replies are drawn from another distribution than the policy's, so its KL to the baseline cannot be "
                "measured on them and is left out"
            )
        else:
            summary["kl"] = kl_to_baseline(
                models["policy"], models["baseline"], replies["policy"], settings.token_budget
            )
    if best_of is not None:
        summary["best_of"] = best_of
    run.rewind(-1)  # a run killed between here and its end has written the samples already
    run.add_samples(0, sample_rows(replies, scores, settings.num_samples))
    run.finish(summary)


def load_models(settings: EvaluateSettings, chat: Chat) -> dict[str, Policy]:
    """The policy and, if one is named, its baseline. Raises ConfigError for a baseline of another vocabulary."""
    models = {"policy": load_policy(settings.model, chat, settings)}
    if settings.baseline is not None:
        refuse_other_vocabulary(chat.tokenizer, settings.baseline, role="baseline")
        models["baseline"] = load_policy(settings.baseline, chat, settings)
    return models


def load_judges(
    settings: EvaluateSettings, prompts: Sequence[Prompt], chat: Chat
) -> Callable[[Sequence[Rollout]], dict[str, np.ndarray]]:
    """A function that gives every reply its scores: by "gold", by "reward", and by the rewards under their names.
    Raises ConfigError if a reward model could not read the longest reply to one of the prompts."""
    judges: dict[str, GoldScorer | RewardModelScorer] = {}
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": settings.engine.find_device()}
    if settings.world is not None:
        judges["gold"] = GoldScorer(worlds.load(settings.world))
    if settings.reward_model is not None:
        judges["reward"] = RewardModel(path=settings.reward_model).load(**options)
    combined = load_rewards(settings.rewards, **options) if settings.rewards else None
    every = [*judges.values(), combined]
    refuse_short_reward_models(every, prompts, chat, max_new_tokens=settings.sampling.max_new_tokens)

    def score(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
        scores = {name: judge.score(rollouts)[0].numpy() for name, judge in judges.items()}
        if combined is not None:
            total, by_name, _ = combined.score_parts(rollouts)
            scores |= {name: values.numpy() for name, values in by_name.items()}
            if len(by_name) > 1:
                scores["reward"] = total.numpy()
        return scores

    return score


def compare(ours: Scores, theirs: Scores, prompt_ids: Sequence[str]) -> dict[str, object]:
    """How often the policy is above its baseline on the same prompts, and by how much, by each judge."""
    found: dict[str, object] = {}
    for judge in ours:
        judged = np.isfinite(ours[judge]) & np.isfinite(theirs[judge])
        groups = [prompt for prompt, known in zip(prompt_ids, judged, strict=True) if known]
        if not groups:
            continue
        a, b = ours[judge][judged], theirs[judge][judged]
        found[f"win_rate_by_{judge}"] = win_rate(a, b, groups=groups).named("win_rate")
        found[f"{judge}_difference"] = paired_difference(a, b, groups=groups).named("difference")
    return found


def describe(
    rollouts: Sequence[Rollout], scores: Scores, prompt_ids: Sequence[str], num_words: int
) -> dict[str, object]:
    """Scores with their intervals, lengths and text statistics of one model's replies; those of variety are of the
    first `num_words` words."""
    numbers: dict[str, object] = {}
    for judge, values in scores.items():
        judged = np.isfinite(values)
        numbers[f"num_{judge}_failed"] = int((~judged).sum())
        if judged.any():
            groups = [prompt for prompt, known in zip(prompt_ids, judged, strict=True) if known]
            numbers |= bootstrap_mean(values[judged], groups=groups).named(judge)
    lengths = [len(r.response_ids) for r in rollouts]
    truncated = sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)
    numbers |= {"length_mean": float(np.mean(lengths)), "truncated_fraction": truncated, "num_replies": len(rollouts)}
    return numbers | text_stats([r.response for r in rollouts], num_words=num_words)


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
    groups = [prompt_id(r.prompt.messages) for r in rollouts]
    kl_sampled, kl_exact = (bootstrap_mean(each, groups=groups) for each in (sampled, exact))
    return kl_sampled.named("kl_sampled") | kl_exact.named("kl_exact")


def best_of_baseline(
    settings: EvaluateSettings, baseline: LocalSampler, prompts: Sequence[Prompt]
) -> dict[str, object]:
    """Unbiased estimates of the gold of the baseline's best-of-n, chosen by gold: how good its best replies are."""
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
    replies: Mapping[str, Sequence[Rollout]], scores: Mapping[str, Scores], num: int
) -> list[dict[str, object]]:
    """Rows of samples.jsonl: the first prompts, not the best, with the replies and scores of every model."""
    rows = []
    for i, ours in enumerate(replies["policy"][:num]):
        row: dict[str, object] = {"prompt": ours.prompt.text}
        for name, prefix in (("policy", ""), ("baseline", "baseline_")):
            if name in replies:
                row[f"{prefix}response"] = replies[name][i].response
                row |= {f"{prefix}{judge}": float(values[i]) for judge, values in scores[name].items()}
        rows.append(row)
    return rows


STAGE = Stage(
    settings=EvaluateSettings,
    run=run,
    writes=("samples.jsonl",),
    few=few_prompts("num_prompts", "best_of_prompts"),
    about="The final policy and its baseline answered the same held-out prompts.",
)
