"""What the card of a reward model says, in sentences. A figure that the card lacks has no sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.reports.headline import bounds, interval, number, percent, reward_model_sentences, section, show
from trimtab.stats import Interval

UNINFORMATIVE = 999.0
"""A temperature above this is the end of the range that is searched: it turns every probability into a half."""

_RESEMBLES = {
    "constant": "Every reply gets the same reward: this is a constant, not a judge.",
    "length": "The rewards follow the length of the replies (Spearman {length}): this is a scorer of length.",
}
_BASELINES = {
    "bag_of_words": "a bag of words {}",
    "shuffled_replies": "the model itself, shown another prompt, {}",
    "random": "a score that ignores the replies {}",
}


def card_sentences(card: Mapping[str, Any]) -> list[str]:
    """The sentences of a card, the most important first."""
    found = reward_model_sentences(card) + _counted(card) + _trained_on(card)
    if (kind := card.get("resembles")) in _RESEMBLES:
        found.append(_RESEMBLES[kind].format(length=show(number(card, "length_spearman"))))
    shares = [(text, interval(card, name)) for name, text in _BASELINES.items()]
    if beside := [text.format(_share(share)) for text, share in shares if share is not None]:
        found.append(f"Beside it: {', '.join(beside)}.")
    if by_length := _listed({_plain(name): one for name, one in section(card, "slices").items()}):
        found.append(f"By length: {by_length}.")
    found += _length(section(card, "length"))
    if by_slice := _listed(section(card, "by_slice")):
        found.append(f"By slice: {by_slice}.")
    found += _teacher(section(card, "teacher"))
    found += _calibration(card)
    texts = section(card, "degenerate")
    above = [(name, interval(section(texts, name), "above_rejected")) for name in texts]
    if preferred := [f"{_plain(name)} {_share(share)}" for name, share in above if share is not None]:
        found.append(f"It prefers a text without content to a rejected reply: {', '.join(preferred)}.")
    styles = [(name, interval(section(card, "styles"), name)) for name in section(card, "styles")]
    if paid := [f"{name} {amount(added)}" for name, added in styles if added is not None]:
        found.append(f"A style adds to the reward of a reply: {', '.join(paid)}.")
    for name, text in (
        ("num_bad_rows", "rows are left out, because they cannot be used"),
        ("num_too_long", "pairs are left out, because the model cannot read texts so long"),
        ("num_probes_unscored", "changed replies are left out, because the model cannot read texts so long"),
    ):
        if left_out := number(card, name):
            found.append(f"{show(left_out)} {text}.")
    return found


def cautions(card: Mapping[str, Any]) -> list[str]:
    """The sentences of a card that speak against training on the model: an accuracy that may be that of chance,
    rewards that are those of a simple scorer, and figures of pairs that it was trained on."""
    found = []
    accuracy = interval(card, "accuracy")
    if accuracy is not None and not accuracy.low > 0.5:
        found += reward_model_sentences(card)
    if (kind := card.get("resembles")) in _RESEMBLES:
        found.append(_RESEMBLES[kind].format(length=show(number(card, "length_spearman"))))
    return found + _trained_on(card)


def _trained_on(card: Mapping[str, Any]) -> list[str]:
    """The sources that the model has seen in training."""
    sources = card.get("trained_on")
    return [said_of_training(sources)] if isinstance(sources, list) and sources else []


def said_of_training(sources: Sequence[str]) -> str:
    """The sentence about sources that a model was judged by and trained on."""
    return (
        f"The model was trained on {' and '.join(sources)}, except for what its run held out, so the figures are too "
        "good: judge it by pairs that it has not seen."
    )


def _counted(card: Mapping[str, Any]) -> list[str]:
    """How many pairs the accuracy is of, and how many have no right side."""
    num, even, accuracy = number(card, "num_pairs"), number(card, "num_even") or 0, number(card, "accuracy")
    if not num:
        return []
    if even == num:
        return [f"No accuracy can be told: there was nothing to order, because all {show(num)} pairs have even labels."]
    if accuracy is None:
        return []
    left_out = f"; {show(even)} more have an even label, and so no right side" if even else ""
    return [f"It is right about {accuracy * (num - even):g} of {show(num - even)} pairs, ties half{left_out}."]


def _length(figures: Mapping[str, Any]) -> list[str]:
    """What length earns, and what is left of that and of the accuracy after each correction."""
    premium, deviation = interval(section(figures, "none"), "premium"), number(figures, "std_tokens")
    if premium is None or deviation is None:
        return []
    told = [f"one standard deviation of length ({deviation:.0f} tokens) goes with {amount(premium)} of reward"]
    for name in figures:
        one = section(figures, name)
        left, accuracy = interval(one, "premium"), interval(one, "accuracy")
        if name != "none" and left is not None and accuracy is not None:
            value = _with_sign(left.value, _decimals(premium))
            told.append(f"with length_correction = {name!r} {value}, and the accuracy is {_share(accuracy)}")
    text = "; ".join(told)
    return [f"{text[0].upper()}{text[1:]}."]


def amount(added: Interval) -> str:
    """How much is added to a reward, with its sign and bounds, such as "+0.31 [0.25, 0.40]". Rewards come in any unit,
    so all three have the decimals in which the bounds can be told apart."""
    decimals = _decimals(added)
    within = bounds(added, lambda value: _plain_zero(f"{value:.{decimals}f}"))
    return f"{_with_sign(added.value, decimals)} {within}".rstrip()


def _decimals(estimate: Interval) -> int:
    """The decimals that give the width of an interval two digits; of a number without one, three digits."""
    width = estimate.high - estimate.low
    size, digits = (width, 2) if width > 0 else (abs(estimate.value), 3)  # a width of nan is not above 0
    return max(0, digits - 1 - math.floor(math.log10(size))) if size > 0 else 2


def _with_sign(value: float, decimals: int) -> str:
    return _plain_zero(f"{value:+.{decimals}f}")


def _plain_zero(text: str) -> str:
    """The number without a sign if all its digits are zeros."""
    return text if text.strip("+-0.") else text.lstrip("+-")


def _teacher(figures: Mapping[str, Any]) -> list[str]:
    """How far the model orders replies as its teacher does, and how well the teacher orders them itself."""
    agreement, accuracy = interval(figures, "agreement"), interval(figures, "accuracy")
    if agreement is None:
        return []
    rank = show(number(figures, "margin_spearman"))
    own = f"; the teacher itself is right about {_share(accuracy)}" if accuracy is not None else ""
    return [f"It orders {_share(agreement)} of the pairs as its teacher does (Spearman of the margins {rank}){own}."]


def _calibration(card: Mapping[str, Any]) -> list[str]:
    before = [show(number(card, name)) for name in ("ece", "brier")]
    after = [show(number(section(card, "calibrated"), name)) for name in ("ece", "brier")]
    if number(card, "ece") is None or number(section(card, "calibrated"), "ece") is None:
        return []
    plain = f"As probabilities its rewards have an ECE of {before[0]} and a Brier score of {before[1]}"
    temperature = number(card, "temperature")
    if temperature is not None and temperature > UNINFORMATIVE:
        return [f"{plain}; no temperature makes them better than saying a half of every pair."]
    fitted = f"divided by the temperature {show(temperature)}, which fits these pairs, {after[0]} and {after[1]}"
    return [f"{plain}; {fitted}."]


def _share(share: Interval) -> str:
    return f"{percent(share.value)} {bounds(share, percent)}".rstrip()


def _listed(shares: Mapping[str, Any]) -> str:
    named = [(name, interval(shares, name)) for name in shares]
    return ", ".join(
        f"{name} {_share(share)} of {share.count}" for name, share in named if share is not None and share.count
    )


def _plain(name: str) -> str:
    return name.replace("_", " ")
