"""Rules over what online training does to the policy: KL, reward against quality, entropy, variety, length, critic."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from trimtab.reports.collect import RunRecord, finite
from trimtab.reports.diagnosis.kl_coefficient import KL_PER_TOKEN, kl_change, kl_coef_at, kl_coef_holding
from trimtab.reports.diagnosis.learning_rate import (
    CRITIC_RATE,
    RATE,
    far_above,
    lowered_rate,
    raised_rate,
    usual_said,
)
from trimtab.reports.diagnosis.rule import (
    Failure,
    NotLooked,
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
    scaled_whole,
    setting,
    trend_of,
    two_digits,
)
from trimtab.reports.diagnosis.sampled_replies import SHARED_BY, holds_words, shared_phrase
from trimtab.reports.diagnosis.signal_rules import ENTROPY_LEFT, KL_OF_NOTHING
from trimtab.reports.diagnosis.trends import MIN_POINTS, known, trend
from trimtab.reports.headline import percent, score, show
from trimtab.reports.quality import MeasuredQuality, measured_quality

ONLINE = ("online",)

CLIP_FRACTION = 0.3
"""Share of clipped tokens above which most of an update is cut off."""
STEP_KL = 0.1
"""Nats per token that a policy may move within one step. PPO codes stop a step at 0.01 to 0.02; the quickstart moves
0.01, and 0.03 at most."""
ENTROPY_FALL = 1 / 3
"""Entropy below this share of its start. DAPO (arXiv:2503.14476, figure 2) shows collapse as a fall to nearly zero;
healthy runs of the quickstart keep three quarters of it."""
DIVERSITY_FALL = 0.5
"""Distinct bigrams below this share of their start, at an equal number of words. Measured: the quickstart keeps 0.7,
and 0.4 where one sentence is repeated."""
VOCABULARY_GROWTH = 0.5
"""Heaps' exponent: the number of different n-grams grows about as this power of the number of words (0.4 to 0.6 in
English), so their share falls as replies become longer without any loss of variety."""
LENGTH_GROWTH = 1.3
"""Ratio of lengths above which growth is looked at (Singhal et al., arXiv:2310.03716: most of the reward gained by PPO
is often bought by length)."""
TRUNCATED = 0.05
"""Share of replies that are cut off. Above one in twenty the reward judges many unfinished replies."""
CRITIC_EXPLAINS = 0.02
"""Share of the variance of returns. One constant for all tokens explains nothing of it, give or take about a hundredth
in the returns of a step; a critic that was of use ends at 0.3 to 0.5 in the quickstart."""
FLAT_STEPS = 20
"""The fewest steps after which a reward that has not moved counts as flat."""
MIN_CHECKS = 3
"""The fewest checkpoints that a guard has measured, each with an error of its own: a peak between two of them."""


@rule("reward_hacking", "Reward up, quality down", stages=ONLINE, needs=("reward/mean", "policy/kl"))
def reward_hacking(run: RunRecord) -> RuleOutcome:
    """The reward rises while a measure that training does not see, gold or the guard's, falls."""
    quality = measured_quality(run)
    if quality is None or len(quality.points) < (MIN_POINTS if quality.errors is None else MIN_CHECKS):
        return NotLooked("no independent measure of quality is logged (world = '…' logs gold scores, [guard] measures)")
    if not quality.was_gamed:
        return None
    found, level = quality.summary, trend(run.metrics["reward/mean"])
    step = quality.steps[found.peak_index]
    stop = f"stop at step {show(step)} (num_steps)" if step > 0 else "keep the model that training began with"
    return Failure(
        symptom=f"{quality.name[0].upper()}{quality.name[1:]} peaked at {score(found.peak_gold)} around step "
        f"{show(step)} (KL {show(found.peak_kl)}) and ended at {score(found.final_gold)}, while the reward went "
        f"{moved(level)}.",
        causes=("the policy collects what the reward gets wrong, and the KL does not hold it back",),
        changes=kl_change(run, kl_coef_at(run, found.peak_kl), target=found.peak_kl),
        advice=f"Make the KL cost at its peak what the reward gained there, or {stop}. A larger "
        "coefficient moves along the same curve (Gao et al., arXiv:2210.10760); only a better reward lifts it.",
        evidence={
            "measure": quality.name,
            "peak": found.peak_gold,
            "final": found.final_gold,
            "peak_step": step,
        }
        | numbers_of("reward/mean", level),
        sample=last_sample(run),
    )


@rule(
    "kl_explosion",
    "KL explosion",
    stages=ONLINE,
    needs=("policy/kl", "rollout/length_mean"),
    follows=("flat_reward", "reward_scale"),
)
def kl_explosion(run: RunRecord) -> RuleOutcome:
    """The policy is far from its reference, or moves too far in every step."""
    kl, length = trend(run.metrics["policy/kl"]), trend(run.metrics["rollout/length_mean"])
    per_token = kl.end / max(length.end, 1.0)
    clipped, step_kl = ends_at(run, "policy/clip_fraction"), ends_at(run, "policy/approx_kl")
    too_far, jumps = per_token > KL_PER_TOKEN, clipped > CLIP_FRACTION or step_kl > STEP_KL
    # Within the first fifth of the steps no coefficient is late: they were too large.
    first = float(known(run.metrics["policy/kl"]).values[0])
    too_fast = jumps or kl.start - first > KL_PER_TOKEN * max(length.start, 1.0)
    if not too_far and not too_fast:
        return None
    symptom = f"The KL to the reference went {moved(kl)} nats per reply, {show(per_token)} per token"
    if jumps:
        symptom += f"; a step clips {percent(clipped)} of the tokens and moves {show(step_kl)} nats per token"
    target = KL_PER_TOKEN / 4 * max(length.start, 1.0)
    held = kl_change(run, kl_coef_at(run, target), target=target) if too_far else ()
    slower = lowered_rate(run, 0.3) if too_fast else ()
    causes = []
    if too_fast:
        causes.append("the steps are too large: learning rate, epochs or minibatches")
    if too_far:
        causes.append(f"the KL is held back too little (coefficient {show(ends_at(run, 'kl/coef'))})")
    return Failure(
        symptom=f"{symptom} (bounds {KL_PER_TOKEN}, {percent(CLIP_FRACTION)} and {STEP_KL}).",
        causes=tuple(causes),
        changes=held + slower,
        advice=" and ".join(
            ["Hold the policy nearer to its reference"] * too_far + ["take smaller steps"] * too_fast
        ).capitalize()
        + "."
        + (usual_said(run) if too_fast else ""),
        evidence=numbers_of("policy/kl", kl)
        | {"kl_per_token": per_token, "clip_fraction": clipped, "step_kl": step_kl},
    )


@rule(
    "reward_stays",
    "The reward stays while the policy moves",
    stages=ONLINE,
    needs=("reward/mean", "reward/std", "policy/kl"),
    min_points=FLAT_STEPS,
    follows=("flat_reward", "kl_explosion", "entropy_collapse"),
)
def reward_stays(run: RunRecord) -> RuleOutcome:
    """The policy moves away from its reference, and the reward ends where it began."""
    level, spread, kl = (trend(run.metrics[name]) for name in ("reward/mean", "reward/std", "policy/kl"))
    still = not level.rose and level.change < level.error and abs(level.change) < 0.1 * spread.start
    if kl.end <= KL_OF_NOTHING or not still:
        return None
    return Failure(
        symptom=f"The reward went {moved(level)} while the policy moved {show(kl.end)} nats from its reference.",
        causes=(
            "the gradient is mostly noise: a step sees too few replies",
            "the policy was already as good by this reward as it can be",
        ),
        changes=scaled_whole(run, "prompts_per_step", 2),
        advice="Sample more replies a step.",
        evidence=numbers_of("reward/mean", level) | numbers_of("reward/std", spread) | numbers_of("policy/kl", kl),
    )


@rule(
    "entropy_collapse",
    "Entropy collapse",
    stages=ONLINE,
    needs=("policy/entropy",),
    follows=("flat_reward", "reward_hacking", "kl_explosion"),
)
def entropy_collapse(run: RunRecord) -> RuleOutcome:
    """The policy has become nearly certain of each token."""
    found = trend(run.metrics["policy/entropy"])
    fell = found.fell and found.end < ENTROPY_FALL * found.start
    if not fell and found.end >= ENTROPY_LEFT:
        return None
    coef = number_setting(run, "entropy_coef")
    clip_high = number_setting(run, "loss.clip_high")
    changes = changed(run, entropy_coef=0.01 if not coef > 0 else two_digits(coef * 3))
    if setting(run, "loss.name") == "ppo" and clip_high < 0.28:
        changes += changed(run, loss__clip_high=0.28)
    if ends_at(run, "kl/coef") == 0:
        changes += kl_change(run, kl_coef_at(run, KL_PER_TOKEN / 4 * ends_at(run, "rollout/length_mean")))
    causes = ["unlikely tokens are never raised: the clip leaves no room, or the learning rate is too large"]
    if too_fast := far_above(run):
        causes.insert(0, f"the learning rate of {show(number_setting(run, RATE))} is far above the usual ones")
        changes += lowered_rate(run, 0.3)
    return Failure(
        symptom=f"Entropy fell {moved(found)} nats per token (bounds: a third of the start, or {ENTROPY_LEFT}).",
        causes=tuple(causes),
        changes=changes,
        advice="Pay for entropy, and clip high ratios later (clip-higher of DAPO, arXiv:2503.14476)."
        + (usual_said(run) if too_fast else ""),
        evidence=numbers_of("policy/entropy", found),
    )


@rule(
    "mode_collapse",
    "Mode collapse: replies become alike",
    stages=ONLINE,
    needs=("rollout/distinct_2",),
    follows=("reward_hacking", "kl_explosion", "entropy_collapse"),
)
def mode_collapse(run: RunRecord) -> RuleOutcome:
    """The replies of a step use ever fewer different word pairs, beyond what their length explains, or nearly all of
    them hold the same words while no independent measure says that this is good."""
    found, length = trend(run.metrics["rollout/distinct_2"]), trend_of(run, "rollout/length_mean")
    longer = length.end / length.start if length is not None and min(length.start, length.end) > 0 else 1.0
    kept = found.end / found.start * longer**VOCABULARY_GROWTH if found.start > 0 else 1.0
    fell, shared, quality = found.fell and kept < DIVERSITY_FALL, shared_phrase(run), measured_quality(run)
    alike = shared is not None and not (quality is not None and _rose(run, quality))
    if not fell and not alike:
        return None
    symptom = (
        f"Distinct bigrams fell {moved(found)}: {percent(kept)} of the start at an equal number of words (bound "
        f"{percent(DIVERSITY_FALL)})"
    )
    if shared is not None and alike:
        stands = (
            f'"{shared.text}" stands in {shared.after} of {shared.num_after} of the last replies, and in '
            f"{shared.before} of {shared.num_before} of the first"
        )
        symptom = f"{symptom}; {stands}" if fell else stands
    target = KL_PER_TOKEN / 4 * (length.start if length is not None else math.nan)
    coefs = [kl_coef_at(run, target)]
    if shared is not None and alike:
        coefs.append(kl_coef_holding(run, partial(holds_words, text=shared.text), most=SHARED_BY / 2))
    coef = max((one for one in coefs if not math.isnan(one)), default=math.nan)
    return Failure(
        symptom=f"{symptom}.",
        causes=("one reply pays best whatever the prompt is, and the KL does not hold the policy back",),
        changes=kl_change(run, coef, target=target) + changed(run, entropy_coef=0.01),
        advice="Hold the policy nearer to its reference and pay for entropy; look at what the reward pays for.",
        evidence=numbers_of("rollout/distinct_2", found) | {"kept_fraction": kept},
        sample=last_sample(run),
    )


@rule(
    "length_growth",
    "Length growth",
    stages=ONLINE,
    needs=("rollout/length_mean", "reward/mean"),
    follows=("reward_hacking", "kl_explosion"),
)
def length_growth(run: RunRecord) -> RuleOutcome:
    """Replies grow with the reward, and no independent measure says that this is good."""
    found, quality = trend(run.metrics["rollout/length_mean"]), measured_quality(run)
    ratio = found.end / max(found.start, 1.0)
    if not (found.rose and ratio > LENGTH_GROWTH) or (quality is not None and _rose(run, quality)):
        return None
    rewards = setting(run, "rewards")
    asked = _length_asked_for(run, rewards, found.start)
    judged = "and no independent measure says whether that is good"
    if quality is not None:
        judged = f"while {quality.name} did not rise"
    return Failure(
        symptom=f"Replies grew {moved(found)} tokens, {show(ratio)} times (bound {LENGTH_GROWTH}), {judged}.",
        causes=("the reward `length` asks for such replies",) * bool(asked) + ("the reward pays for length",),
        changes=asked or _length_charged(run, rewards, found.start),
        advice="Charge for tokens beyond 1.3 times the first length. `trimtab card` says how much a reward model pays "
        "for length alone.",
        evidence=numbers_of("rollout/length_mean", found) | {"ratio": ratio},
        sample=last_sample(run),
    )


def _length_charged(run: RunRecord, rewards: Any, start: float) -> tuple[SettingChange, ...]:
    """A charge on tokens beyond 1.3 times the first length, added to the rewards."""
    most, price = number_setting(run, "sampling.max_new_tokens"), _price_of_a_token(run, start)
    if not isinstance(rewards, list) or not all(isinstance(one, dict) for one in rewards):
        return ()
    if not math.isfinite(most) or not math.isfinite(price):
        return ()
    free = math.ceil(LENGTH_GROWTH * start)
    added = {"name": "length", "max_tokens": free, "per_token": price, "most": two_digits(price * most)}
    return (SettingChange(("rewards", str(len(rewards))), None, added),)


def _length_asked_for(run: RunRecord, rewards: Any, start: float) -> tuple[SettingChange, ...]:
    """The first reward for length, made to hold replies to their first length: its range is cut to 1.3 times of it
    either way, and a token outside it costs as much as tells replies apart. Empty if there is none, or if its range is
    no wider."""
    names = [one.get("name") if isinstance(one, dict) else None for one in rewards] if isinstance(rewards, list) else []
    if "length" not in names:
        return ()
    place = names.index("length")
    old = rewards[place]
    least, most, paid = (finite(old.get(key)) for key in ("min_tokens", "max_tokens", "per_token"))
    new: dict[str, float] = {}
    if least > (shortest := math.floor(start / LENGTH_GROWTH)):
        new["min_tokens"] = shortest
    if most > (longest := math.ceil(LENGTH_GROWTH * start)):
        new["max_tokens"] = longest
    if new and paid < (price := _price_of_a_token(run, start)):
        new["per_token"] = price
    return tuple(SettingChange(("rewards", str(place), key), old[key], value) for key, value in new.items())


def _price_of_a_token(run: RunRecord, start: float) -> float:
    """Two deviations of the reward for as many tokens as replies began with."""
    return two_digits(2 * max(ends_at(run, "reward/std"), 0.1) / max(start, 1.0))


@rule(
    "truncated_replies",
    "Truncated replies",
    stages=ONLINE,
    needs=("rollout/truncated_fraction",),
    follows=("length_growth", "reward_hacking", "kl_explosion"),
)
def truncated_replies(run: RunRecord) -> RuleOutcome:
    """Many replies hit the length limit before they end."""
    found = trend(run.metrics["rollout/truncated_fraction"])
    if not found.end > TRUNCATED:
        return None
    limit, penalty = setting(run, "sampling.max_new_tokens"), number_setting(run, "shaping.missing_eos_penalty")
    grew = found.start <= TRUNCATED
    causes: tuple[str, ...]
    if grew and penalty == 0:
        causes = ("a reply that never ends costs nothing, and the reward pays for what is in it",)
        changes = changed(run, shaping__missing_eos_penalty=two_digits(max(1.0, ends_at(run, "reward/std"))))
        advice = "Charge for a missing end."
    else:
        causes = (f"sampling.max_new_tokens = {limit} is too short for the replies", "the model never learned to end")
        changes = scaled_whole(run, "sampling.max_new_tokens", 2)
        advice = "Double the limit; if that many are still cut off, train the end of the reply with the sft stage."
    sample = next((row for row in reversed(run.samples) if row.get("finish_reason") == "length"), None)
    return Failure(
        symptom=f"{percent(found.end)} of the replies are cut off in steps {found.last_steps[0]} to "
        f"{found.last_steps[1]}, {percent(found.start)} at the start (bound {percent(TRUNCATED)}).",
        causes=causes,
        changes=changes,
        advice=advice,
        evidence=numbers_of("rollout/truncated_fraction", found),
        sample=sample,
    )


@rule(
    "critic_instability",
    "Critic instability",
    stages=ONLINE,
    needs=("critic/explained_variance", "critic/loss"),
    follows=("reward_scale", "kl_explosion"),
)
def critic_instability(run: RunRecord) -> RuleOutcome:
    """The critic predicts returns no better than a constant does, at the end of the run."""
    found, loss = trend(run.metrics["critic/explained_variance"]), trend(run.metrics["critic/loss"])
    if not found.end < CRITIC_EXPLAINS:
        return None
    clipped = trend_of(run, "critic/clip_fraction")
    shared = setting(run, "critic.init") == "value_head"
    wild = found.fell or loss.rose or (clipped is not None and max(clipped.start, clipped.end) > CLIP_FRACTION)
    wild = wild or (not shared and far_above(run, CRITIC_RATE))
    cause = "its learning rate is too large" if wild else "it learns too slowly, or began too far from the returns"
    if shared:
        changes = changed(run, critic__init="policy")
    elif wild:
        changes = lowered_rate(run, 0.1, CRITIC_RATE)
    else:
        changes = raised_rate(run, CRITIC_RATE)
    if not shared and number_setting(run, "critic.warmup_steps") == 0:
        changes += changed(run, critic__warmup_steps=2)
    return Failure(
        symptom=f"The critic explains {at_the_end(found)} of the variance of returns (bound {CRITIC_EXPLAINS}; a "
        f"constant explains none); its loss went {moved(loss)}.",
        causes=(cause, "rewards change their scale during the run"),
        changes=changes,
        advice="Let the critic learn alone for the first steps, at a rate that its loss can follow."
        + (usual_said(run, CRITIC_RATE) if not shared else ""),
        evidence=numbers_of("critic/explained_variance", found) | numbers_of("critic/loss", loss),
    )


def _rose(run: RunRecord, quality: MeasuredQuality) -> bool:
    """Whether an independent measure rose: gold by its trend, what a guard measured by its own errors."""
    if quality.errors is not None:
        return quality.rose
    gold = trend_of(run, "gold/mean")
    return gold is not None and gold.rose
