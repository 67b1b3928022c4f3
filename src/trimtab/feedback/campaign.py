"""What an annotation campaign costs and what it can be expected to show, before anybody is asked.

You give prices and minutes. `ASSUMPTIONS` lists everything that is assumed, and is printed next to the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from trimtab.core.errors import ConfigError

ASSUMPTIONS = (
    "annotators are equally good and err independently and symmetrically: two agree with chance a = p² + (1 - p)²",
    "the label of an item is the majority of its votes, a coin where they are even",
    "wrong labels cost a reward model what fewer labels would: an item with a label right with chance q is worth "
    "(2q - 1)² items with a right one (the information about the mean of a sign that is flipped with chance 1 - q)",
    "nobody can agree with single votes more often than p: that is the limit of a reward model's accuracy on them",
)


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A plan of who is asked what, at which price."""

    items: int = 2000
    """Different pairs to be judged."""
    overlap: float = 1.0
    """Votes for each item on average: 1.2 asks a fifth of the items twice."""
    minutes: float = 1.0
    """Working time of one judgement."""
    wage: float = 20.0
    """Pay for an hour of work, in your currency."""
    price: float | None = None
    """Pay for one judgement, instead of an hourly wage."""
    fee: float = 0.2
    """Share that a platform adds to the pay."""
    gold: float = 0.05
    """Share of further judgements on items with a known answer."""
    repeats: float = 0.03
    """Share of further judgements asked of the same annotator again, sides exchanged."""
    adjudication: float = 0.0
    """Share of further judgements that settle disagreement."""
    annotators: int = 5
    """People at work at the same time."""
    hours_per_day: float = 4.0
    """Hours a day that each of them judges."""
    agreement: float = 0.7
    """How often two annotators are expected to agree."""

    def __post_init__(self) -> None:
        rules = {
            "items": (self.items >= 1, "at least 1"),
            "overlap": (self.overlap >= 1, "at least 1"),
            "minutes": (self.minutes > 0, "above 0"),
            "wage": (self.wage >= 0, "not negative"),
            "price": (self.price is None or self.price >= 0, "not negative"),
            "fee": (self.fee >= 0, "not negative"),
            "gold": (self.gold >= 0, "not negative"),
            "repeats": (self.repeats >= 0, "not negative"),
            "adjudication": (self.adjudication >= 0, "not negative"),
            "annotators": (self.annotators >= 1, "at least 1"),
            "hours_per_day": (0 < self.hours_per_day <= 24, "above 0 and at most 24"),
            "agreement": (0.5 < self.agreement <= 1, "above 0.5 (two coins) and at most 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}", where="trimtab feedback cost", fix=f"make it {rule}"
                )

    @property
    def judgements(self) -> int:
        """Number of judgements that are paid."""
        return math.ceil(self.items * self.overlap * (1 + self.gold + self.repeats + self.adjudication) - 1e-9)

    @property
    def price_per_judgement(self) -> float:
        """Price of one judgement, with the platform's share."""
        pay = self.minutes / 60 * self.wage if self.price is None else self.price
        return pay * (1 + self.fee)

    @property
    def cost(self) -> float:
        """Price of all judgements."""
        return self.judgements * self.price_per_judgement

    @property
    def hours(self) -> float:
        """Hours of work of all annotators together."""
        return self.judgements * self.minutes / 60

    @property
    def days(self) -> float:
        """Days until the last judgement, if all annotators work `hours_per_day`."""
        return self.hours / (self.annotators * self.hours_per_day)

    @property
    def vote_accuracy(self) -> float:
        """Probability p that one vote is right."""
        return vote_accuracy(self.agreement)

    @property
    def label_accuracy(self) -> float:
        """Probability q that an item's label is right."""
        return label_accuracy(self.vote_accuracy, self.overlap)

    @property
    def effective_items(self) -> float:
        """How many items with right labels these are worth to a reward model."""
        return self.items * (2 * self.label_accuracy - 1) ** 2


def vote_accuracy(agreement: float) -> float:
    """Accuracy p of a vote at an agreement a in [0.5, 1]: (1 + sqrt(2a - 1)) / 2, the inverse of a = p² + (1 - p)²."""
    return (1 + math.sqrt(2 * agreement - 1)) / 2


def label_accuracy(vote_accuracy: float, overlap: float) -> float:
    """Probability that the majority of `overlap` independent votes is right; for a fraction, the mean over items."""

    def whole(n: int) -> float:
        right = np.arange(n + 1)
        chance = scipy.stats.binom.pmf(right, n, vote_accuracy)
        return float(chance @ np.where(2 * right > n, 1.0, np.where(2 * right == n, 0.5, 0.0)))

    low = math.floor(overlap)
    return whole(low) + (overlap - low) * (whole(low + 1) - whole(low) if overlap > low else 0.0)


def items_for_win_rate(half_width: float, *, win_rate: float = 0.5, confidence: float = 0.95) -> int:
    """Independent judgements for a win rate within ± `half_width`: z² w (1 - w) / h², 385 for ±0.05 at w = 0.5."""
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    return math.ceil(z**2 * win_rate * (1 - win_rate) / half_width**2 - 1e-9)


def items_for_agreement(
    half_width: float, *, agreement: float, votes_per_item: int = 2, confidence: float = 0.95
) -> int:
    """Items with `votes_per_item` votes each for a raw agreement within ± `half_width`: z² Var(P_i) / h².

    P_i is the share of agreeing pairs among an item's votes; its variance follows from independent, equally good votes.
    """
    if votes_per_item < 2:
        raise ConfigError(
            f"{votes_per_item} vote for an item", where="trimtab feedback cost", fix="agreement needs two votes or more"
        )
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    n = votes_per_item
    right = np.arange(n + 1)
    chance = scipy.stats.binom.pmf(right, n, vote_accuracy(agreement))
    share = (right * (right - 1) + (n - right) * (n - right - 1)) / (n * (n - 1))
    variance = float(chance @ share**2 - (chance @ share) ** 2)
    return max(2, math.ceil(z**2 * variance / half_width**2 - 1e-9))


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """acc(n) = limit - scale · n^-exponent, the accuracy of a reward model trained on n items."""

    limit: float
    scale: float
    exponent: float
    points: tuple[tuple[float, float], ...]
    """The (items, accuracy) points that it was fitted to."""

    def accuracy(self, n: float) -> float:
        """The accuracy at n items."""
        return float(self.limit - self.scale * n**-self.exponent)


def fit_learning_curve(points: Sequence[tuple[float, float]], *, highest: float) -> LearningCurve:
    """The curve through measured (items, accuracy) points by least squares, exponent in [0.05, 1].

    Its limit is at most `highest` (the accuracy of a vote, if the model is judged on votes), and is `highest` if there
    are only two points or a free fit goes beyond it. Raises ConfigError for fewer points, for accuracies outside
    (0, `highest`), and if accuracy does not rise.
    """
    n = np.array([p[0] for p in points], dtype=np.float64)
    accuracy = np.array([p[1] for p in points], dtype=np.float64)
    if len(set(n)) < 2 or np.any(n < 1) or np.any((accuracy <= 0) | (accuracy >= highest)):
        raise ConfigError(
            f"the pilot {', '.join(f'{a:g}:{b:g}' for a, b in points) or '(nothing)'}",
            where="trimtab feedback cost --pilot",
            fix="give ITEMS:ACCURACY at two or more sizes, such as 500:0.58,1000:0.61,2000:0.64, with accuracies "
            f"below {highest:.3f}, what single votes allow at the --agreement given",
        )

    def solved(exponent: float, limit: float | None) -> tuple[float, float, float]:
        x = n**-exponent
        if limit is None:
            slope, top = np.polyfit(x, accuracy, 1)
            scale = -float(slope)
        else:
            top = limit
            scale = float(((limit - accuracy) * x).sum() / (x * x).sum())
        return float(((accuracy - top + scale * x) ** 2).sum()), float(top), scale

    exponents = np.linspace(0.05, 1, 951)
    for limit in (None, highest) if len(set(n)) > 2 else (highest,):
        exponent = float(exponents[int(np.argmin([solved(float(e), limit)[0] for e in exponents]))])
        _, top, scale = solved(exponent, limit)
        if top <= highest:
            break
    if scale <= 0:
        raise ConfigError(
            "accuracy does not rise with the number of items in the pilot",
            where="trimtab feedback cost --pilot",
            fix="measure larger sizes, or the same over several seeds",
        )
    curve_points = tuple(zip(n.tolist(), accuracy.tolist(), strict=True))
    return LearningCurve(limit=top, scale=scale, exponent=exponent, points=curve_points)


def overlaps_for_the_money(plan: Campaign, overlaps: Sequence[int] = (1, 2, 3, 5, 7)) -> list[dict[str, float]]:
    """What the same spending buys at other overlaps: items, accuracy of a label, effective items."""
    rows = []
    for overlap in overlaps:
        items = plan.items * plan.overlap / overlap
        q = label_accuracy(plan.vote_accuracy, overlap)
        rows.append(
            {"overlap": overlap, "items": items, "label_accuracy": q, "effective_items": items * (2 * q - 1) ** 2}
        )
    return rows


def parse_pilot(text: str) -> list[tuple[float, float]]:
    """Points of "500:0.58,1000:0.61". Raises ConfigError for anything else."""
    try:
        pairs = [part.split(":") for part in text.split(",") if part.strip()]
        return [(float(n), float(accuracy)) for n, accuracy in pairs]
    except ValueError:
        raise ConfigError(
            f"the pilot {text!r}",
            where="trimtab feedback cost --pilot",
            fix="write ITEMS:ACCURACY,ITEMS:ACCURACY, such as 500:0.58,1000:0.61,2000:0.64",
        ) from None
