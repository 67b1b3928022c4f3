"""Metrics of rollouts and values, and the check that sampler and scorer agree before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from trimtab.batches.rollouts import PolicyBatch
from trimtab.core.errors import EngineError
from trimtab.core.metrics import Mean, Metrics, Peak, Total, mean_of, merge
from trimtab.core.terminal import note
from trimtab.core.types import Rollout
from trimtab.engines.local.agreement import allowed_difference
from trimtab.evals.text import distinct_n
from trimtab.math.combining import WeightedSum
from trimtab.math.losses.value import explained_variance
from trimtab.rewards.combined import COST, part_names, scales_apart
from trimtab.rewards.gold import GoldScorer
from trimtab.stages.online.rollouts import RolloutBatch
from trimtab.stages.online.settings import OnlineSettings


def rollout_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Lengths, ends and diversity of rollouts."""
    num = len(rollouts)
    return {
        "rollout/length_mean": Mean(sum(len(r.response_ids) for r in rollouts), num),
        "rollout/truncated_fraction": Mean(sum(r.finish_reason == "length" for r in rollouts), num),
        "rollout/distinct_2": Mean(distinct_n([r.response for r in rollouts], 2), 1),
        **event_metrics(rollouts),
    }


def say_truncation(settings: OnlineSettings) -> None:
    """Says on stderr if replies come from a truncated distribution and no correction weighs them."""
    sampling = settings.sampling
    if sampling.truncates and settings.correction is None:
        note(
            f"with sampling.top_p = {sampling.top_p} and sampling.top_k = {sampling.top_k} replies "
            "are drawn from another distribution than the policy's, and are trained on unweighed; to weigh them: "
            "correction.kind=truncate, or leave both settings at their defaults"
        )


def check_scores(parts: Mapping[str, Tensor], settings: OnlineSettings, *, pays_tokens: bool = False) -> None:
    """Looks at the scores [B] of each reward in the first round of a run, before anything is trained.

    Says on stderr if one reward varies more than 100 times as much as another, so that their sum is the one alone.
    Raises EngineError if a limited cost is the same for all replies: there is nothing to learn from it.
    """
    if settings.cost and len(seen := set(parts[COST][parts[COST].isfinite()].tolist())) == 1:
        paid = settings.cost.reward.weight * seen.pop()
        raise EngineError(
            f"the cost of all {len(parts[COST])} replies is {paid:g}, so that no reply shows how to cost less",
            where="cost.reward, in step 1",
            fix="see that the cost judges what the prompts ask for; if it is only rare, raise prompts_per_step or add "
            "prompts that lead to it",
        )
    summed = settings.combine == WeightedSum() and not settings.reads_parts
    if not summed or len(settings.rewards) < 2:
        return
    weights = {name: reward.weight for name, reward in zip(part_names(settings.rewards), settings.rewards, strict=True)}
    if apart := scales_apart(parts, weights):
        # Rewards of tokens can not be normalised before they are added up.
        advice = "" if pays_tokens else "combine.normalize=running brings each to deviation 1 before it is weighed, or "
        note(f"in step 1, {apart}; {advice}change the weights")


def check_sampler(difference: float, settings: OnlineSettings, where: str) -> Metrics:
    """The largest difference of sampler and policy on one token, in nats, as a metric; refuses a sampler that is not
    the policy.

    Without a correction, a difference that is more than rounding raises EngineError, on the first step and on every
    other: training on it would be off-policy without anyone knowing, and a copy of the weights may go stale at any
    step. With top-p or top-k the two are different distributions, and only the metric is kept. A correction that is
    there for a lag (engine.max_staleness) explains no difference of rollouts that do not lag.
    """
    bound = allowed_difference(settings.precision, settings.sampling.precision)
    lags = settings.engine.max_staleness > 0
    explained = settings.sampling.truncates or (settings.correction is not None and not lags)
    if not explained and not difference <= bound:
        raise EngineError(
            f"sampler and policy disagree by {difference:.3g} nats on the same token (bound: {bound})",
            where=where,
            fix="the sampler's weights, template or precision differ from the policy's; do not train on its samples, "
            "or weigh them with [correction]" + " and engine.max_staleness = 0" * lags,
        )
    return {"rollout/logprob_difference": Peak(difference)}


def event_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """The events that samplers and environments counted, in all rollouts, as `rollout/NAME`; for turns also their
    mean."""
    metrics: Metrics = merge({f"rollout/{name}": Total(n) for name, n in r.events.items()} for r in rollouts)
    if turns := metrics.get("rollout/turns"):
        metrics["rollout/turns_mean"] = Mean(turns.value, len(rollouts))
    return metrics


def value_metrics(values: Tensor, returns: Tensor) -> Metrics:
    """How much of the returns the critic's values explain, and the means of values and returns."""
    return {
        "critic/explained_variance": explained_variance(values, returns),
        "critic/value_mean": mean_of(values.tolist()),
        "critic/return_mean": mean_of(returns.tolist()),
    }


def rollout_rows(
    rollouts: Sequence[Rollout], rewards: Tensor, kl: Tensor, world: GoldScorer | None, num: int
) -> list[dict[str, object]]:
    """The first `num` rollouts as rows of samples.jsonl."""
    rows: list[dict[str, object]] = []
    for i, r in enumerate(rollouts[:num]):
        row: dict[str, object] = {
            "prompt": r.prompt.text,
            "response": r.response,
            "reward": float(rewards[i]),
            "kl": float(kl[i]),
            "length": len(r.response_ids),
            "finish_reason": r.finish_reason,
        }
        if world is not None:
            row["gold"] = world.world.gold(r.prompt, r.response).total
        rows.append(row)
    return rows


class Clock:
    """Measures the seconds between marks, as `time/NAME_seconds`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.metrics: Metrics = {}
        """The seconds of all stretches so far."""

    def mark(self, name: str) -> None:
        """Ends the stretch that began with the clock or the last mark; stretches with one name add up."""
        now = time.perf_counter()
        self.metrics = merge([self.metrics, {f"time/{name}_seconds": Total(now - self._last)}])
        self._last = now


def learned_from(number: int, batch: PolicyBatch, rollouts: RolloutBatch, settings: OnlineSettings) -> PolicyBatch:
    """The part of the batch that updates are made from. Says on stderr if that is nothing in the first step."""
    if not settings.skip_truncated:
        return batch
    if number == 0 and not rollouts.finished.any():
        note(
            f"none of the {batch.num_sequences} replies of the first step ends within sampling.max_new_tokens = "
            f"{settings.sampling.max_new_tokens}, and with skip_truncated = true nothing is learnt from them"
        )
    return batch.filter(rollouts.finished)
