"""What each metric means: its title, its unit and how to read its curve."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """How a metric is shown."""

    title: str
    unit: str
    how_to_read: str


# Patterns are tried in order; the first that matches the whole name is used. An empty title is made from the name.
_MEANINGS: tuple[tuple[str, str, str, str], ...] = (
    (r"loss/train", "Training loss", "nats", "Should fall quickly, then level out."),
    (
        r"loss/validation",
        "Validation loss",
        "nats",
        "Loss on held-out data. Where it rises while the training loss falls, the model overfits.",
    ),
    (r"loss/.*", "", "", "One term of the loss."),
    (r"reward/mean", "Reward", "units of reward", "What training raises. Gold says whether that is good."),
    (
        r"reward/beyond_card_fraction",
        "Replies beyond the card",
        "fraction",
        "Replies longer than any on which the reward model was judged. Its card says nothing about them.",
    ),
    (r"reward/std", "Spread of rewards", "units of reward", "Near zero there is nothing left to learn from."),
    (r"reward/accuracy", "Accuracy, training pairs", "share", "Ordered as the annotators did. Chance is 0.5."),
    (
        r"reward/validation_accuracy",
        "Accuracy, held-out pairs",
        "share",
        "Pairs ordered as the annotators did. Held-out pairs are the honest measure; chance is 0.5.",
    ),
    (r"reward/(validation_)?margin", "Margin", "units of reward", "Chosen minus rejected: how sure the model is."),
    (r"reward/.*", "", "units of reward", "Terms of the reward: which of them the policy is collecting."),
    (r"gold/mean", "Gold score", "score 0–1", "True quality, never seen in training. Should rise with the reward."),
    (r"gold/.*", "", "score 0–1", "Criteria of the gold score, 1 is full marks: what was learned and what given up."),
    (
        r"policy/kl",
        "KL from the reference",
        "nats per reply",
        "How far the policy has moved. Gold should rise with it.",
    ),
    (r"policy/kl_k3", "KL, k3 estimate", "nats per reply", "The same KL estimated another way; a wide gap is noise."),
    (r"policy/entropy", "Entropy", "nats per token", "Variety of the next token. At zero one reply is repeated."),
    (r"policy/clip_fraction", "Clipped tokens", "share", "Updates cut off. Above 0.3 the steps are too large."),
    (r"policy/approx_kl", "KL within one step", "nats per token", "Movement of one step. Should stay small and even."),
    (r"policy/loss", "Policy loss", "no unit", "A surrogate: its level means little, sudden jumps do."),
    (r"policy/ratio_mean", "Mean ratio", "new over old", "Probability of the sampled tokens; should stay near 1."),
    (
        r"policy/accuracy",
        "Accuracy, training pairs",
        "share",
        "Preferences that the implied reward puts right. Chance is 0.5, and at the first step it is rounding.",
    ),
    (
        r"policy/validation_accuracy",
        "Accuracy, held-out pairs",
        "share",
        "Preferences that the implied reward puts right. Held-out ones are the honest measure; chance is 0.5.",
    ),
    (
        r"policy/(validation_)?margin",
        "Margin",
        "implied reward",
        "Chosen minus rejected. Should rise, slowly at the end.",
    ),
    (
        r"policy/(validation_)?(chosen|rejected)_reward",
        "Implied reward",
        "beta × nats",
        "Of chosen and rejected replies. Both may fall; where the chosen one falls far, raise beta or add nll_coef.",
    ),
    (
        r"policy/(validation_)?(chosen|rejected)_logprobs",
        "Log-probability of replies",
        "nats per reply",
        "Where that of the chosen replies falls, probability goes to replies nobody judged.",
    ),
    (r"policy/(validation_)?baseline", "Baseline", "nats", "What good and bad replies are measured from."),
    (
        r"policy/log_ratio_max",
        "Largest log-ratio",
        "nats",
        "Of one token, between the policy in an update and the one that sampled. In a single update: rounding only.",
    ),
    (r"policy/.*", "", "", "Of the policy update."),
    (r"critic/loss", "Critic loss", "reward²", "Error of predicted returns. Should fall, then follow their scale."),
    (
        r"critic/explained_variance",
        "Critic: explained variance",
        "share",
        "Of the returns, foreseen by the critic: 1 is perfect, 0 no better than a constant.",
    ),
    (r"critic/clip_fraction", "Critic: clipped values", "share", "Values whose update was cut off."),
    (r"critic/.*", "", "units of reward", "Of the critic."),
    (r"rollout/length_mean", "Reply length", "tokens", "Growth together with reward, but not gold, is a length hack."),
    (r"rollout/truncated_fraction", "Replies cut off", "share", "Hit the length limit. Should stay near 0."),
    (r"rollout/logprob_difference", "Sampler against scorer", "nats", "Largest gap on one token: rounding only."),
    (r"rollout/distinct_2", "Distinct bigrams", "share", "Variety of word pairs. A fall means replies become alike."),
    (r"rollout/.*", "", "", "Of the sampled replies."),
    (r"select/best_reward", "Best reward", "units of reward", "Of the best reply of each prompt of the step."),
    (
        r"guard/measure",
        "Measure of the guard",
        "units of the measure",
        "Asked on fixed prompts, never trained on. Where it falls while the reward rises, the reward is being gamed.",
    ),
    (r"guard/measure_(low|high)", "", "units of the measure", "Bound of the 95% interval over prompts."),
    (r"guard/kl", "KL in checks", "nats per reply", "On the prompts of the guard."),
    (r"guard/kl_slope", "KL slope", "nats per step", "Since the last check."),
    (r"guard/(signals|unjudged|best_step)", "", "", "Of the guard's checks."),
    (r"guard/.*", "", "", "A cheap signal of the guard's checks; it asks for the measure and decides nothing."),
    (r"kl/coef", "KL coefficient", "reward per nat", "Weight of the leash, raised when KL passes its target."),
    (r"optimizer/.*_updates", "", "steps", "Optimizer steps made within one step of the run."),
    (r"optimizer/.*learning_rate", "", "no unit", "Follows the schedule of the settings."),
    (r"optimizer/.*gradient_norm", "", "no unit", "Before clipping. Spikes announce an unstable step."),
    (r".*/tokens_per_second", "Throughput", "tokens/s", "Dips are pauses, such as checkpoints or a busy machine."),
    (r"time/step_seconds", "Time per step", "seconds", "Spikes are pauses, such as checkpoints or a busy machine."),
    (r"time/.*_seconds", "", "seconds", "Of one step spent here."),
    (r"data/.*", "", "", "Of the data read."),
)


def meaning(name: str) -> Meaning:
    """How to show the metric of this name; the title of an unknown metric is made from its name."""
    for pattern, title, unit, how_to_read in _MEANINGS:
        if re.fullmatch(pattern, name):
            return Meaning(title or _title(name), unit, how_to_read)
    return Meaning(_title(name), "", "No description is known for this metric.")


def _title(name: str) -> str:
    owner, _, quantity = name.rpartition("/")
    words = quantity.replace("_seconds", "").replace("_", " ")
    return f"{owner.capitalize()}: {words}" if owner else words
