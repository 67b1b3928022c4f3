"""Rules over what every stage logs, and over the stages that train on fixed data: losses, rewards, preferences."""

from __future__ import annotations

import math

import numpy as np

from trimtab.reports.collect import RunRecord, Series
from trimtab.reports.diagnosis.learning_rate import (
    RATE,
    below,
    far_above,
    lowered_rate,
    raised_rate,
    usual_rates,
    usual_said,
)
from trimtab.reports.diagnosis.rule import (
    Failure,
    NotLooked,
    RuleOutcome,
    SettingChange,
    at_the_end,
    changed,
    moved,
    number_setting,
    numbers_of,
    rule,
    scaled,
    scaled_whole,
    trend_of,
    two_digits,
)
from trimtab.reports.diagnosis.trends import CHANCE, MEDIAN_ERROR, Trend, deviation, known, spikes, trend
from trimtab.reports.headline import interval, number, percent, section, show
from trimtab.stats import Interval

SUPERVISED = ("pretrain", "sft", "reward", "preference")
COMPARING = ("reward", "preference")

SPIKE_SHARE = 0.5
"""A loss this share above its neighbours is a spike, if it also stands out of their noise."""
MIN_SPIKES = 2
"""One outlying batch is bad luck, two are a habit."""
DIVERGED = 1.1
"""A loss that ends this many times its beginning has diverged."""
BLOWN_UP = 2.0
"""A loss that ends at this many times the first value, which is that of the model as it came: the first update may have
destroyed it, and then the beginning of the run is as bad as its end. Batches of one data set differ by less."""
LEARNED = 0.02
"""Share by which a loss must fall to have learned something. Noisy votes leave little: the loss of the quickstart's
reward model falls by 0.14 of its first value."""
LEARNED_ERRORS = 2.0
"""Number of standard errors by which a loss must fall to have learned something."""
FEW_UPDATES = 100
"""Updates below which a rate of the usual range may well teach nothing: AdamW moves a weight by at most about the rate
in each, and the published rates are those of runs of hundreds to thousands."""
MORE_PASSES = 3.0
"""Factor by which a run of few updates passes over its data more often."""
FIRST_VALUES = 3
"""The first values of a loss that stand for the model as it came: of five passes over data, the median of a fifth of
the steps is a whole pass too late. A median of three ignores one outlying batch."""
CHANCE_ACCURACY = 0.5
"""The accuracy of a coin."""
USEFUL_ACCURACY = 0.6
"""An accuracy on held-out pairs that a reward model may be used with; those of noisy human votes reach 0.6 to 0.7. Too
few pairs are held out if an interval holds this and that of a coin."""
OVERFIT_LOSS = 0.05
"""Share by which a held-out loss rises above its lowest value."""
OVERFIT_ACCURACY = 0.15
"""Accuracy on training pairs above that on held-out pairs. After one pass the two are 0.08 apart in the
quickstart's reward model."""
TEMPERATURE = 2.0
"""Factor by which the logits of a calibrated model would be divided, or multiplied. Below 2 the reliability curve is
within about a tenth of the diagonal."""
CALIBRATION_ERROR = 0.1
"""Expected calibration error: forecasts that are wrong by ten points on average."""
CHOSEN_FALL = 10.0
"""Nats per reply by which the chosen replies may become less likely: e^-10 is never sampled again."""


@rule("loss_spikes", "Loss: not finite, spikes, or diverged", stages=(*SUPERVISED, "online"), min_points=1)
def loss_spikes(run: RunRecord) -> RuleOutcome:
    """A loss that is no finite number at its end or twice, one with spikes, or one that ended higher than it began.

    A single missing value is that of a step without a loss, such as one whose replies were all filtered out.
    """
    series = {name: one for name, one in run.metrics.items() if not name.startswith("time/")}
    if not series:
        return NotLooked("no metric is logged")
    broken = {name: int(s.steps[np.isnan(s.values)][0]) for name, s in series.items() if np.isnan(s.values).any()}
    losses = [name for name in ("loss/train", "policy/loss", "critic/loss") if name in broken and _breaks(series[name])]
    if losses:
        name = losses[0]
        return Failure(
            symptom=f"{name} is not a finite number, first at step {broken[name]}.",
            causes=("the learning rate is too large", "a logarithm or a ratio of the loss overflowed"),
            changes=_slower(run, 0.1),
            advice="Take smaller steps, and warm up.",
            evidence={"first_step_by_metric": broken},
        )
    if "loss/train" not in run.metrics:
        return None
    loss = run.metrics["loss/train"]
    high, found = spikes(loss, least=SPIKE_SHARE), trend_of(run, "loss/train")
    first = float(known(loss).values[0])
    rose = found is not None and found.rose and found.end > DIVERGED * found.start > 0
    if found is not None and (rose or found.end > BLOWN_UP * first > 0):
        return Failure(
            symptom=f"The training loss went {moved(found)}; it was {show(first)} before the first update.",
            causes=("the learning rate is too large",),
            changes=_slower(run, 0.1),
            advice="Take smaller steps, and warm up.",
            evidence=numbers_of("loss/train", found),
        )
    if len(high) >= MIN_SPIKES:
        worst = int(high.values.argmax())
        usual = float(np.median(known(loss).values))
        return Failure(
            symptom=f"The training loss has {len(high)} spikes, the highest {show(float(high.values[worst]))} at step "
            f"{show(float(high.steps[worst]))} (median {show(usual)}).",
            causes=("the learning rate is too large for some batches", "some rows of the data are broken"),
            changes=_slower(run, 0.3),
            advice="Take smaller steps, warm up, and look at the rows of these steps (`trimtab data show`).",
            evidence={"steps": high.steps.tolist(), "values": high.values.tolist()},
        )
    return None


def _breaks(loss: Series) -> bool:
    """Whether the last value of a loss, or as many as make a habit, are no finite numbers."""
    return bool(np.isnan(loss.values[-1])) or loss.num_unknown >= MIN_SPIKES


def _slower(run: RunRecord, factor: float) -> tuple[SettingChange, ...]:
    changes = lowered_rate(run, factor)
    if number_setting(run, "optimizer.warmup_fraction") < 0.1:
        changes += changed(run, optimizer__warmup_fraction=0.1)
    return changes


@rule("nothing_learned", "Nothing learned: the loss does not fall", stages=SUPERVISED, needs=("loss/train",))
def nothing_learned(run: RunRecord) -> RuleOutcome:
    """The training loss ends where it began, and pairs are not told apart any better either.

    Whether the rate is too small or too large is told by its usual range, else by the loss: a rate that is too large
    throws it up within the first fifth of the steps.
    """
    found = trend(run.metrics["loss/train"])
    margin = trend_of(run, f"{_owner(run)}/margin")
    # What is claimed is that nothing happened, so a fall need not be as certain here as where a fall is the claim.
    learned = -found.change > max(LEARNED * abs(found.start), LEARNED_ERRORS * found.error)
    if learned or found.rose or _left_start(run, found):
        return None
    if margin is not None and margin.rose:
        return None
    rate = number_setting(run, "optimizer.learning_rate")
    if _too_large(run, found):
        cause, changes = f"the learning rate of {show(rate)} is too large: nothing is kept", _slower(run, 0.1)
        advice = "Take smaller steps, and warm up."
    else:
        cause = f"the learning rate of {show(rate)} is too small for {run.num_steps} steps"
        changes, advice = _further(run), "Raise the learning rate, or train for longer."
    return Failure(
        symptom=f"The training loss went {moved(found)}"
        + (f", and the margin between chosen and rejected {moved(margin)}" if margin is not None else "")
        + ".",
        causes=(cause, "the data hold nothing to learn for this model, or it knows them already"),
        changes=changes,
        advice=f"{advice}{usual_said(run)} If the loss still stays, look at the data (`trimtab data show`).",
        evidence=numbers_of("loss/train", found) | (numbers_of("margin", margin) if margin is not None else {}),
    )


@rule("reward_model_collapse", "Reward model collapse", stages=("reward",), min_points=1)
def reward_model_collapse(run: RunRecord) -> RuleOutcome:
    """Held-out pairs are ordered no better than by a coin, or all scores are the same."""
    accuracy, resembles = interval(run.summary, "accuracy"), run.summary.get("resembles")
    seen = trend_of(run, "reward/accuracy")
    few = None if accuracy is None else _too_few_held_out(accuracy)
    if accuracy is not None and (few is None or seen is None):
        at_chance = accuracy.low <= CHANCE_ACCURACY
        said = f"{percent(accuracy.value)} [{percent(accuracy.low)}, {percent(accuracy.high)}] of held-out pairs"
    elif seen is not None:
        at_chance = seen.end - CHANCE_ACCURACY <= seen.error
        said = f"{at_the_end(seen)} of training pairs"
    else:
        return NotLooked("there is no card, and too few steps are logged")
    constant = resembles == "constant"
    if not constant and few is not None and (seen is None or not at_chance):
        return few
    if not at_chance and not constant:
        return None
    wrong_way = accuracy is not None and accuracy.high < CHANCE_ACCURACY
    rate, found, margin = (
        number_setting(run, "optimizer.learning_rate"),
        trend_of(run, "loss/train"),
        trend_of(run, "reward/margin"),
    )
    causes = ["the labels are noise, or half of them are swapped: compare with the card's bag of words"]
    changes: tuple[SettingChange, ...] = ()
    advice = "Look at the pairs (`trimtab data show`) and at the agreement of the annotators."
    if wrong_way:
        causes.insert(0, "chosen and rejected are swapped, in the training or in the held-out pairs")
    elif found is not None and margin is not None:
        if _too_large(run, found):
            causes.insert(0, f"the learning rate of {show(rate)} is so large that the first steps destroyed the model")
            changes, advice = _slower(run, 0.1), f"Take smaller steps, and warm up.{usual_said(run)}"
        elif below(run) or not (margin.rose or _left_start(run, found)):
            causes.insert(0, f"the learning rate of {show(rate)} is too small for {run.num_steps} steps")
            changes, advice = _further(run), f"Raise the learning rate, or train for longer.{usual_said(run)}"
        elif margin.rose and number_setting(run, "num_epochs") > 1:
            causes.insert(0, "training pairs were learned by heart")
            changes, advice = changed(run, num_epochs=1.0), "Pass over the pairs once."
    return Failure(
        symptom=f"The reward model orders {said} as labelled" + ", and gives every reply one score" * constant + ".",
        causes=tuple(causes),
        changes=changes,
        advice=advice,
        evidence=({"accuracy": accuracy.named("accuracy")} if accuracy is not None else {})
        | (numbers_of("loss/train", found) if found is not None else {}),
    )


@rule("overfitting", "Training improves, held-out data do not", stages=SUPERVISED, needs=("loss/train",))
def overfitting(run: RunRecord) -> RuleOutcome:
    """The held-out loss has turned upwards, or training pairs are ordered much better than held-out ones."""
    train, judged = trend(run.metrics["loss/train"]), run.metrics.get("loss/validation")
    if judged is None or not len(known(judged)):
        return NotLooked("nothing was held out, or nothing was judged yet (held_out, validate_every)")
    held_out = known(judged)
    lowest = int(held_out.values.argmin())
    best_step, best, last = int(held_out.steps[lowest]), float(held_out.values[lowest]), float(held_out.values[-1])
    evidence = numbers_of("loss/train", train) | {"held_out_loss": last, "lowest_held_out_loss": best}
    if len(held_out) >= 3 and last - best > OVERFIT_LOSS * abs(best) and not train.rose:
        early = lowest == 0 and not best_step * number_setting(run, "num_epochs") >= run.num_steps
        return Failure(
            symptom=f"The held-out loss was lowest at step {best_step} ({show(best)}) and rose to {show(last)}, while "
            f"the training loss went {moved(train)}.",
            causes=(
                "the learning rate is too large: no pass over the data was over"
                if early
                else "training data are learned by heart after that step",
            ),
            changes=_slower(run, 0.3) if early else changed(run, max_steps=best_step),
            advice="Take smaller steps." if early else "Stop at that step, or give more data.",
            evidence=evidence | {"best_step": best_step},
        )
    owner = _owner(run)
    seen, accuracy = trend_of(run, f"{owner}/accuracy"), run.metrics.get(f"{owner}/validation_accuracy")
    if run.stage in COMPARING and seen is not None and accuracy is not None and len(known(accuracy)):
        right, card = float(known(accuracy).values[-1]), interval(run.summary, "accuracy")
        bounds = [OVERFIT_ACCURACY, 4 * _error_of_end(seen)]
        if card is not None and math.isfinite(card.high):  # a few held-out pairs are far from their mean by chance
            bounds.append(card.high - card.value)
        if seen.end - right > max(bounds):
            epochs = number_setting(run, "num_epochs")
            fewer = _fewer_steps(run, right) if epochs > 1 else _slower(run, 0.3)
            return Failure(
                symptom=f"The model is right about {percent(seen.end)} of training pairs and {percent(right)} of "
                f"held-out pairs (bound: {percent(OVERFIT_ACCURACY)} apart).",
                causes=("training pairs are learned by heart",),
                changes=fewer,
                advice="Stop where training pairs began to be known better than held-out ones, or give more data.",
                evidence=evidence | {"training_accuracy": seen.end, "held_out_accuracy": right},
            )
    return None


@rule("miscalibration", "Reward model: over- or underconfident", stages=("reward",), min_points=1)
def miscalibration(run: RunRecord) -> RuleOutcome:
    """The differences of rewards are far from the log-odds that people prefer one reply."""
    temperature, error = number(run.summary, "temperature"), number(run.summary, "ece")
    accuracy = interval(run.summary, "accuracy")
    if temperature is None or error is None:
        return NotLooked("there is no card: the run is not finished")
    if accuracy is not None and accuracy.low <= CHANCE_ACCURACY:
        return NotLooked("a reward model at chance has no scale")
    if 1 / TEMPERATURE <= temperature <= TEMPERATURE or error < CALIBRATION_ERROR:
        return None
    over = temperature > 1
    epochs = number_setting(run, "num_epochs")
    if over:
        changes = changed(run, num_epochs=1.0) if epochs > 1 else lowered_rate(run, 0.3)
    else:
        changes = scaled(run, "num_epochs", 2)
    fitted = number(section(run.summary, "calibrated"), "ece")
    return Failure(
        symptom=f"Forecasts of preferences are wrong by {show(error)} on average (bound {CALIBRATION_ERROR}); divided "
        f"by {show(temperature)} they would be by {show(fitted)}.",
        causes=("training pairs were learned by heart" if over else "training stopped early",),
        changes=changes,
        advice="The order of replies stays as it is: a KL coefficient tuned to this scale is the other remedy.",
        evidence={"temperature": temperature, "ece": error, "calibrated_ece": fitted},
    )


@rule(
    "chosen_falls",
    "Preference up, chosen replies ever less likely",
    stages=("preference",),
    needs=("policy/chosen_logprobs", "policy/margin"),
)
def chosen_falls(run: RunRecord) -> RuleOutcome:
    """The margin grows because rejected replies become unlikely faster than chosen ones do."""
    chosen, margin = trend(run.metrics["policy/chosen_logprobs"]), trend(run.metrics["policy/margin"])
    if not (chosen.fell and -chosen.change > CHOSEN_FALL and margin.rose):
        return None
    coef = number_setting(run, "loss.nll_coef")
    changes = changed(run, loss__nll_coef=two_digits(max(1.0, 2 * coef))) if not math.isnan(coef) else ()
    return Failure(
        symptom=f"The log-probability of chosen replies fell {moved(chosen)} nats, while the margin rose "
        f"{moved(margin)}.",
        causes=("the loss only sees the difference, so probability goes to replies that nobody judged",),
        changes=changes or scaled(run, "loss.beta", 3),
        advice="Imitate the chosen replies too (arXiv:2404.19733), or raise beta.",
        evidence=numbers_of("policy/chosen_logprobs", chosen) | numbers_of("policy/margin", margin),
    )


@rule("preference_at_chance", "Preferences are not learned", stages=("preference",), min_points=1)
def preference_at_chance(run: RunRecord) -> RuleOutcome:
    """The implied reward orders held-out pairs no better than a coin, although training pairs are told apart."""
    accuracy, margin = interval(run.summary, "accuracy"), trend_of(run, "policy/margin")
    if accuracy is None or margin is None:
        return NotLooked("nothing was held out, or the run is not finished")
    if accuracy.low > CHANCE_ACCURACY or not margin.rose:
        return None
    if few := _too_few_held_out(accuracy):
        return few
    return Failure(
        symptom=f"The implied reward is right about {percent(accuracy.value)} [{percent(accuracy.low)}, "
        f"{percent(accuracy.high)}] of held-out preferences, while the margin of training pairs rose {moved(margin)}.",
        causes=("training pairs are learned by heart", "the labels are noise"),
        changes=changed(run, num_epochs=1.0) if number_setting(run, "num_epochs") > 1 else (),
        advice="Pass over the data once, and look at the pairs (`trimtab data show`).",
        evidence=accuracy.named("accuracy") | numbers_of("policy/margin", margin),
    )


def _further(run: RunRecord) -> tuple[SettingChange, ...]:
    """A larger rate; if it lies in its usual range and the updates are few, it stays in that range, and passes over the
    data become more."""
    usual, rate = usual_rates(run), number_setting(run, RATE)
    changes = raised_rate(run)
    if usual is None or not rate >= usual.low or run.num_steps >= FEW_UPDATES:
        return changes
    longer = scaled(run, "num_epochs", MORE_PASSES) + scaled_whole(run, "max_steps", int(MORE_PASSES))
    return changed(run, optimizer__learning_rate=two_digits(max(rate, min(changes[0].new, usual.high)))) + longer


def _left_start(run: RunRecord, found: Trend) -> bool:
    """Whether the training loss ends lower than its first values, by more than chance explains: what was to be learned
    was learned early, if only that nothing tells the pairs apart (a loss of log 2)."""
    values = known(run.metrics["loss/train"]).values
    first = float(np.median(values[:FIRST_VALUES]))
    error = MEDIAN_ERROR * deviation(np.diff(values)) / math.sqrt(2 * FIRST_VALUES)
    return first - found.end > max(LEARNED * abs(first), CHANCE * error)


def _too_large(run: RunRecord, found: Trend) -> bool:
    """Whether the rate is what keeps a loss from falling by being too large: it is far above its usual range, or not
    below it and the loss was thrown up in the first fifth of the steps."""
    if below(run):
        return False
    loss = known(run.metrics["loss/train"])
    first = float(np.median(loss.values[:FIRST_VALUES]))
    early = loss.values[loss.steps <= found.first_steps[1]]
    return far_above(run) or float(early.max()) > BLOWN_UP * first > 0 or found.start > DIVERGED * first > 0


def _fewer_steps(run: RunRecord, right: float) -> tuple[SettingChange, ...]:
    """The end of the run where training pairs, seen again, began to be ordered better than held-out ones: the last step
    up to which the accuracy on them was, on average over a fifth of the steps, within half of the bound."""
    seen = known(run.metrics[f"{_owner(run)}/accuracy"])
    width = max(1, len(seen) // 5)
    means = np.convolve(seen.values, np.full(width, 1 / width), mode="valid")
    apart = np.flatnonzero(means > right + OVERFIT_ACCURACY / 2)
    step = int(seen.steps[apart[0] + width // 2]) if len(apart) else run.num_steps
    return changed(run, max_steps=step) if step < run.num_steps else changed(run, num_epochs=1.0)


def _too_few_held_out(accuracy: Interval) -> NotLooked | None:
    """What a rule says that cannot tell a useful model from a coin; None if it can."""
    if not accuracy.low <= CHANCE_ACCURACY < USEFUL_ACCURACY <= accuracy.high:
        return None
    bounds = f"[{percent(accuracy.low)}, {percent(accuracy.high)}]"
    return NotLooked(f"too few held-out pairs: {percent(accuracy.value)} {bounds} holds chance and a useful accuracy")


def _owner(run: RunRecord) -> str:
    return "reward" if run.stage == "reward" else "policy"


def _error_of_end(found: Trend) -> float:
    return found.error / math.sqrt(2)
