"""Rules over what online training learns from: the sampler, the spread and scale of rewards, the size of steps."""

from __future__ import annotations

from trimtab.reports.collect import RunRecord
from trimtab.reports.diagnosis.kl_coefficient import KL_PER_TOKEN, NO_SPREAD, kl_change, reward_unit
from trimtab.reports.diagnosis.learning_rate import raised_by_kl, usual_said
from trimtab.reports.diagnosis.rule import (
    Failure,
    RuleOutcome,
    SettingChange,
    at_the_end,
    changed,
    ends_at,
    last_sample,
    moved,
    number_setting,
    numbers_of,
    rule,
    scaled,
    scaled_whole,
    setting,
    trend_of,
)
from trimtab.reports.diagnosis.trends import trend
from trimtab.reports.headline import percent, show

ONLINE = ("online",)

SAMPLER_DIFFERENCE = 0.1
"""Nats on one token between sampler and policy. Rounding of float32 stays below 1e-4, that of bfloat16 below this
(docs/evidence/engines.md); the stage itself refuses what no setting explains."""
EFFECTIVE_FRACTION = 0.5
"""Share of the tokens that are left after weighing them: below a half, most of a step's sampling is thrown away."""
NO_GRADIENT = 1e-4
"""A gradient norm this small means that all advantages are zero. That of a step that learns is about 0.1 to 10."""
ENTROPY_LEFT = 0.02
"""Nats per token. Below it, nineteen of twenty tokens are certain, wherever the run began."""
KL_OF_NOTHING = 0.1
"""Nats per reply. A policy this near to its reference gives the same replies: the quickstart passes it in 5 steps."""
HELD_STILL = 10.0
"""How much more a nat of KL costs than rewards differ by, above which nothing that a reward says is worth a move. The
usual coefficients of 0.01 to 0.2 cost less than rewards differ by."""
REWARD_SPREAD = 10.0
"""Standard deviation of rewards above which the usual KL coefficients of 0.01 to 0.2 weigh nothing, and above which the
value clip of 0.2 holds the critic back."""
REWARD_SPREAD_LEAST = 0.01
"""Standard deviation of rewards below which those KL coefficients weigh more than every reward."""
CLIPPED_REWARDS = 0.2
"""Share of rewards cut off by shaping.clip."""


@rule(
    "sampler_mismatch",
    "Stale sampler or other distribution",
    stages=ONLINE,
    needs=("rollout/logprob_difference",),
    min_points=1,
)
def sampler_mismatch(run: RunRecord) -> RuleOutcome:
    """Replies come from another distribution than the one that is trained."""
    apart = trend(run.metrics["rollout/logprob_difference"])
    kept = ends_at(run, "rollout/effective_fraction")
    if not (apart.end > SAMPLER_DIFFERENCE or kept < EFFECTIVE_FRACTION):
        return None
    symptom = f"Sampler and policy differ by {at_the_end(apart)} nats on one token (bound {SAMPLER_DIFFERENCE})"
    if kept < EFFECTIVE_FRACTION:
        symptom += f", and weighing the tokens leaves {percent(kept)} of them (bound {percent(EFFECTIVE_FRACTION)})"
    sampling = setting(run, "sampling") or {}
    truncates = number_setting(run, "sampling.top_p") < 1 or number_setting(run, "sampling.top_k") > 0
    lag = number_setting(run, "engine.max_staleness")
    if truncates:
        cut = f"top_p = {sampling.get('top_p')} and top_k = {sampling.get('top_k')}"
        causes = [f"{cut} draw from a truncated distribution, and the policy is trained on another"]
        changes = changed(run, sampling__top_p=1.0, sampling__top_k=0)
        advice = "Draw from the whole distribution, or weigh the tokens with [correction]."
    elif lag > 0:
        causes = [f"rollouts lag by {show(lag)} steps, in which the policy moves far"]
        changes = changed(run, engine__max_staleness=0)
        advice = "Draw with the newest weights, or take smaller steps."
    else:
        causes = ["the sampler's weights are older than the policy's", "its chat template or precision is another"]
        changes = changed(run, sampling__precision=setting(run, "precision"))
        advice = "`trimtab check` says whether the ways of computing agree on this machine."
    return Failure(
        symptom=f"{symptom}.",
        causes=tuple(causes),
        changes=changes,
        advice=advice,
        evidence=numbers_of("rollout/logprob_difference", apart),
    )


@rule("flat_reward", "Flat reward: nothing to compare", stages=ONLINE, needs=("reward/mean", "reward/std"))
def flat_reward(run: RunRecord) -> RuleOutcome:
    """All replies get the same reward, or nothing in it tells the replies to a prompt apart."""
    level, spread = trend(run.metrics["reward/mean"]), trend(run.metrics["reward/std"])
    gradient = ends_at(run, "optimizer/policy_gradient_norm")
    usual = max(1.0, abs(level.end))
    no_spread = max(spread.start, spread.end) < NO_SPREAD * usual
    if not no_spread and _lost_on_the_way(run):
        return None
    if no_spread or (gradient < NO_GRADIENT and not level.rose):  # at the end of a solved task nothing differs either
        symptom = f"Rewards do not differ: their standard deviation is {at_the_end(spread)}"
        if not no_spread:
            symptom = (
                f"The replies to a prompt do not differ in reward: the gradient norm is {show(gradient)} at the end"
            )
        return Failure(
            symptom=f"{symptom}.",
            causes=_causes_of_no_signal(run),
            changes=_more_signal(run),
            advice="If the reward gives every reply the same number, no sampling helps: `trimtab card` judges a reward "
            "model, and a verifier must be able to succeed at least sometimes.",
            evidence=numbers_of("reward/mean", level)
            | numbers_of("reward/std", spread)
            | {"optimizer/policy_gradient_norm": gradient},
            sample=last_sample(run),
        )
    return None


def _lost_on_the_way(run: RunRecord) -> bool:
    """Whether there was something to learn from until the policy had gone far from its reference: such replies are
    alike, and no reward tells them apart, but that is what an explosion of the KL leads to. Replies that were alike
    from the start, as at a temperature near zero, are none of its doing."""
    gradient, entropy = trend_of(run, "optimizer/policy_gradient_norm"), trend_of(run, "policy/entropy")
    if entropy is not None and entropy.start < ENTROPY_LEFT:
        return False
    far = ends_at(run, "policy/kl") > KL_PER_TOKEN * max(ends_at(run, "rollout/length_mean"), 1.0)
    return far and gradient is not None and gradient.start >= NO_GRADIENT


def _causes_of_no_signal(run: RunRecord) -> tuple[str, ...]:
    causes = ["the reward gives the same number to every reply, or the task is solved or out of reach for all of them"]
    if (temperature := number_setting(run, "sampling.temperature")) < 0.7:
        causes.insert(0, f"sampling.temperature = {show(temperature)} makes the replies to a prompt alike")
    return tuple(causes)


def _more_signal(run: RunRecord) -> tuple[SettingChange, ...]:
    if number_setting(run, "sampling.temperature") < 0.7:
        return changed(run, sampling__temperature=1.0)
    if number_setting(run, "group_size") > 1:
        rounds = () if setting(run, "dynamic_sampling") else changed(run, dynamic_sampling__max_rounds=4)
        return scaled_whole(run, "group_size", 2) + rounds
    return scaled_whole(run, "prompts_per_step", 2)


@rule(
    "policy_stays",
    "Nothing learned: the policy does not move",
    stages=ONLINE,
    needs=("policy/kl", "reward/mean"),
    follows=("flat_reward", "reward_scale"),
)
def policy_stays(run: RunRecord) -> RuleOutcome:
    """The reward has not risen, and the policy is as near to its reference as at the start, or a move costs far more
    than any reward."""
    kl, level = trend(run.metrics["policy/kl"]), trend(run.metrics["reward/mean"])
    gradient = ends_at(run, "optimizer/policy_gradient_norm")
    rate, spread = number_setting(run, "optimizer.learning_rate"), ends_at(run, "reward/std")
    price = ends_at(run, "kl/coef") * reward_unit(run)
    held_still = price > HELD_STILL * spread > 0
    if (kl.end >= KL_OF_NOTHING and not held_still) or level.rose or gradient < NO_GRADIENT:
        return None
    if price > spread > 0:
        causes = (
            f"a nat of KL costs {show(price)}, more than rewards differ ({show(spread)}): the policy is held still",
        )
        changes = kl_change(run, spread / 10 / reward_unit(run))
        advice = "Make a nat of KL cost a tenth of what rewards differ by."
    else:
        causes = (f"the learning rate of {show(rate)} is too small for {run.num_steps} steps",)
        changes = raised_by_kl(run)
        advice = f"Raise the learning rate, and again if the KL still stays at zero.{usual_said(run)}"
    bound = f"bound {KL_OF_NOTHING}"
    if kl.end >= KL_OF_NOTHING:  # what it moves by is the noise of the charge
        bound = f"a nat costs {show(price / spread)} times what rewards differ by, bound {show(HELD_STILL)}"
    return Failure(
        symptom=f"After {run.num_steps} steps the KL to the reference is {at_the_end(kl)} nats per reply "
        f"({bound}), and the reward went {moved(level)}.",
        causes=causes,
        changes=changes,
        advice=advice,
        evidence=numbers_of("policy/kl", kl) | numbers_of("reward/mean", level),
    )


@rule("reward_scale", "Reward on an unusual scale", stages=ONLINE, needs=("reward/std",))
def reward_scale(run: RunRecord) -> RuleOutcome:
    """Rewards are so large or small that the KL coefficient and the value clip no longer fit."""
    spread, clipped = trend(run.metrics["reward/std"]), ends_at(run, "reward/clipped_fraction")
    evidence = numbers_of("reward/std", spread)
    if clipped > CLIPPED_REWARDS:
        return Failure(
            symptom=f"shaping.clip cuts off {percent(clipped)} of the rewards (bound {percent(CLIPPED_REWARDS)}).",
            causes=("shaping.clip is smaller than the rewards are",),
            changes=changed(run, shaping__normalize=True) or scaled(run, "shaping.clip", 3),
            advice="Normalise rewards before they are clipped, or clip later.",
            evidence=evidence | {"reward/clipped_fraction": clipped},
        )
    in_reward = setting(run, "kl_in") == "reward" and setting(run, "shaping.normalize") is False
    has_critic = "critic/loss" in run.metrics
    large, small = spread.end > REWARD_SPREAD, NO_SPREAD < spread.start < REWARD_SPREAD_LEAST
    if not in_reward or not (large or (small and not has_critic)):
        return None
    bound, effect = (
        (REWARD_SPREAD, "the KL coefficient weighs nothing against it, and the critic cannot follow")
        if large
        else (REWARD_SPREAD_LEAST, "the KL coefficient weighs more than any reward")
    )
    return Failure(
        symptom=f"The standard deviation of rewards is {at_the_end(spread)} (bound {bound}): {effect}.",
        causes=("the rewards are not near a standard deviation of 1, for which the other settings are made",),
        changes=changed(run, shaping__normalize=True),
        advice="Divide rewards by their running deviation.",
        evidence=evidence,
    )
