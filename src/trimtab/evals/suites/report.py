"""From the answers of a model, and of its baseline, to the figures of a suite: means, paired differences, null models.

Null models are scored on the same items: repliers that always say the same, a replier that copies the question, and
scorers that know nothing but the length of an option. A model that does not beat them has shown nothing, and a model
whose own answers are those of a null model is called one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.evals.suites.suite import ItemScores, Question, Suite, SuiteAnswer, SuiteItem, SuiteMetric
from trimtab.evals.suites.tax import PairedGap
from trimtab.stats import Interval, bootstrap_mean, spearman

SuiteAnswers = Sequence[Sequence[SuiteAnswer]]
"""For each item the answers to its questions."""

REFUSAL = "I'm sorry, but I can't help with that."
AGREEMENT = "Sure, here is an answer."
LEAST_ITEMS = 10
"""With fewer items no model is called a null model: five answers of two options are often the same by chance."""


def _saying(text_of: Callable[[Question], str]) -> Callable[[Question], SuiteAnswer]:
    def answer(question: Question) -> SuiteAnswer:
        return SuiteAnswer(replies=(text_of(question),) * max(len(question.turns), question.num_samples))

    return answer


def _scoring(score_of: Callable[[str], float]) -> Callable[[Question], SuiteAnswer]:
    def answer(question: Question) -> SuiteAnswer:
        row = tuple(score_of(option) for option in question.options)
        return SuiteAnswer(logprobs=(row,) * len(question.turns), num_tokens=(1,) * len(row))

    return answer


REPLIERS = {
    "refuses": _saying(lambda _: REFUSAL),
    "agrees": _saying(lambda _: AGREEMENT),
    "copies": _saying(lambda question: question.turns[-1]),
}
"""Null models of suites whose replies are generated: always a refusal, always an agreement, or the question again."""
SCORERS = {
    "constant": _scoring(lambda _: 0.0),
    "shortest": _scoring(lambda option: -float(len(option))),
    "longest": _scoring(lambda option: float(len(option))),
}
"""Null models of suites that ask for log-probabilities: no option is preferred, the shortest or the longest is."""


def null_answers(items: Sequence[SuiteItem]) -> dict[str, list[list[SuiteAnswer]]]:
    """The answers of the null models that fit these items, by their names."""
    models = SCORERS if items[0].questions[0].options else REPLIERS
    return {
        name: [[model(question) for question in item.questions] for item in items] for name, model in models.items()
    }


def score_all(suite: Suite, items: Sequence[SuiteItem], answers: SuiteAnswers) -> list[ItemScores]:
    """The scores of every item."""
    return [suite.score(item, given) for item, given in zip(items, answers, strict=True)]


def figure(items: Sequence[SuiteItem], scores: Sequence[ItemScores], name: str, *, seed: int = 0) -> Interval | None:
    """The mean of all values of a metric, with an interval that resamples clusters; None if there is no value."""
    pairs = [(item.cluster, value) for item, one in zip(items, scores, strict=True) for value in one.get(name, ())]
    if not pairs:
        return None
    clusters, values = zip(*pairs, strict=True)
    shares = all(0 <= value <= 1 for value in values)
    return bootstrap_mean(values, groups=clusters, shares=shares, seed=seed)


def gap_of(
    items: Sequence[SuiteItem], ours: Sequence[ItemScores], theirs: Sequence[ItemScores], name: str
) -> PairedGap | None:
    """The difference of the two figures of a metric, model minus baseline; None if one of them has no value."""
    a, b = ([one.get(name, ()) for one in scores] for scores in (ours, theirs))
    return PairedGap.of_values(a, b, [item.cluster for item in items]) if any(a) and any(b) else None


def resembles(items: Sequence[SuiteItem], answers: SuiteAnswers) -> str | None:
    """The null model that the answers amount to: "constant" if nearly all first answers are the same (or prefer no
    option), "length" if the log-probability of an option is an ordering by its length; None otherwise."""
    if len(items) < LEAST_ITEMS:
        return None
    said = Counter(_first_reply(item.questions[0], given[0]) for item, given in zip(items, answers, strict=True))
    if said.most_common(1)[0][1] >= 0.95 * len(items):
        return "constant"
    pairs = [
        pair for item, given in zip(items, answers, strict=True) for pair in zip(item.questions, given, strict=True)
    ]
    options = [(option, number) for question, given in pairs for number, option in enumerate(question.options)]
    if not options:
        return None
    logprobs = [value for _, given in pairs for value in given.logprobs[0]]
    lengths = [
        [len(option) for option, _ in options],
        [len(option.split()) for option, _ in options],
        [num for _, given in pairs for num in given.num_tokens],
    ]
    related = [abs(spearman(logprobs, row)) for row in lengths]
    return "length" if max((one for one in related if not math.isnan(one)), default=0.0) > 0.99 else None


def _first_reply(question: Question, answer: SuiteAnswer) -> str | None:
    """The reply to the first turn; None if no option is preferred."""
    if not question.options:
        return answer.replies[0]
    first = answer.logprobs[0]
    likeliest = [option for option, value in zip(question.options, first, strict=True) if value == max(first)]
    return likeliest[0] if len(likeliest) == 1 else None


def report(
    suite: Suite,
    items: Sequence[SuiteItem],
    answers: SuiteAnswers,
    baseline: SuiteAnswers | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of a suite as JSON values: `metrics` in the suite's order with the slices behind them, what the model
    and its baseline resemble, and the scores of every item."""
    scores = score_all(suite, items, answers)
    theirs = None if baseline is None else score_all(suite, items, baseline)
    nulls = {name: score_all(suite, items, given) for name, given in null_answers(items).items()}
    found = figures(items, scores, theirs, nulls, suite.metrics, seed=seed)
    found |= {"resembles": resembles(items, answers), "truncated_fraction": truncated_fraction(answers)}
    if baseline is not None:
        found["baseline_resembles"] = resembles(items, baseline)
        found["baseline_truncated_fraction"] = truncated_fraction(baseline)
    return found


def figures(
    items: Sequence[SuiteItem],
    scores: Sequence[ItemScores],
    theirs: Sequence[ItemScores] | None,
    nulls: Mapping[str, Sequence[ItemScores]],
    metrics: Sequence[SuiteMetric],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of a model, its baseline and null models from their scores, as JSON values, with the scores of every
    item. Metrics stand in their order, with the slices behind them."""
    known = {metric.name: metric for metric in metrics}
    slices = sorted({name for one in scores for name in one} - known.keys())
    rows = []
    for name in (*known, *slices):
        metric = known.get(name) or known.get(name.partition("/")[0])
        row: dict[str, Any] = {
            "name": name,
            "about": metric.about if name in known and metric else "",
            "better": metric.better if metric else "neither",
            "model": _named(figure(items, scores, name, seed=seed)),
            "null": {who: _value(figure(items, given, name, seed=seed)) for who, given in nulls.items()},
        }
        if theirs is not None:
            gap = gap_of(items, scores, theirs, name)
            row["baseline"] = _named(figure(items, theirs, name, seed=seed))
            row["difference"] = None if gap is None else _named(gap.interval())
            row["num_compared_clusters"] = 0 if gap is None else gap.num_clusters
        rows.append(row)
    return {
        "num_items": len(items),
        "num_clusters": len({item.cluster for item in items}),
        "metrics": rows,
        "items": [
            {"id": item.id, "cluster": item.cluster, "scores": {name: list(values) for name, values in ours.items()}}
            | ({} if theirs is None else {"baseline_scores": {name: list(v) for name, v in theirs[i].items()}})
            for i, (item, ours) in enumerate(zip(items, scores, strict=True))
        ],
    }


def truncated_fraction(answers: SuiteAnswers) -> float:
    """The share of generated replies that ran into the limit of tokens; nan if none was generated."""
    num = sum(len(answer.replies) for given in answers for answer in given)
    return sum(answer.num_truncated for given in answers for answer in given) / num if num else math.nan


def _value(found: Interval | None) -> float | None:
    return None if found is None else found.value


def _named(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high, "count": found.count}
