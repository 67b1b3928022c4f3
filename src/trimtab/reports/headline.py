"""What a reader should know first: the deciding numbers, and what they say in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trimtab.reports.collect import PipelineRecord, RunRecord, finite
from trimtab.reports.quality import measured_quality
from trimtab.stats import Interval, paired_difference

Standing = Literal["good", "bad", "unclear", "neutral"]
"""What the numbers say about a model; neutral if they compare no two models, or only by a reward model."""


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str
    how_to_read: str


@dataclass(frozen=True)
class Verdict:
    """What the numbers say, as a title and the sentences of a paragraph."""

    standing: Standing
    title: str
    sentences: tuple[str, ...]


# --- numbers out of summaries ---


def number(values: Mapping[str, Any], name: str) -> float | None:
    """The finite number under a name, stored plainly or as the value or accuracy of a table; None if there is none."""
    found = values.get(name)
    if isinstance(found, Mapping):
        found = found.get("value", found.get("accuracy"))
    value = finite(found)
    return None if math.isnan(value) else value


def interval(values: Mapping[str, Any], name: str) -> Interval | None:
    """A number with its bounds, stored as name, name_low and name_high, or as a table with low, high and count.

    Bounds that are not stored are nan. None if there is no number.
    """
    value = number(values, name)
    if value is None:
        return None
    nested = values[name] if isinstance(values[name], Mapping) else {}
    low = number(nested, "low") if nested else number(values, f"{name}_low")
    high = number(nested, "high") if nested else number(values, f"{name}_high")
    count = number(nested, "count") or 0
    return Interval(value, math.nan if low is None else low, math.nan if high is None else high, int(count))


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping under a name; empty if there is none."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def show(value: float | None) -> str:
    """A number as text with three digits, or without decimals if it is whole or large; a dash for no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if (value == int(value) and abs(value) < 1e15) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def score(value: float) -> str:
    """A gold score, or another number of about that size, with two decimals."""
    return f"{value:.2f}"


def percent(value: float) -> str:
    """A share in whole percent, such as 62%."""
    return f"{100 * value:.0f}%"


def seconds(value: float) -> str:
    """A duration in its two largest units, such as 3 min 20 s."""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def bounds(estimate: Interval, show_one: Callable[[float], str] = show) -> str:
    """The bounds as the text [low, high]; empty if they are unknown."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return ""
    return f"[{show_one(estimate.low)}, {show_one(estimate.high)}]"


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return text if text.strip("+-0.") else "0.00"


def _moved(before: str, after: str, *, rose: bool, bounds: str = "") -> str:
    """How a number changed, judged by the texts that are shown: if both read the same, it stayed."""
    shown = f"{after} {bounds}".rstrip()
    if before == after:
        return f"stayed at {shown}"
    return f"{'rose' if rose else 'fell'} from {before} to {shown}"


def with_bounds(estimate: Interval, show_one: Callable[[float], str] = show) -> str:
    """The number and its bounds, such as 0.62 [0.58, 0.66]."""
    return f"{show_one(estimate.value)} {bounds(estimate, show_one)}".rstrip()


# --- what happened ---


@dataclass(frozen=True)
class BaselineComparison:
    """A policy against its baseline on the same prompts."""

    judge: str
    """ "gold" if there is a gold score, else "reward" or the name of the first reward."""
    learned: bool
    """Whether the judge is a reward model: it may be wrong, and marks its own work if the policy trained against it."""
    difference: Interval | None
    wins: Interval | None


def comparison(run: RunRecord) -> BaselineComparison:
    """What an evaluate run found, from its summary; if that has no difference, it is computed from the samples."""
    rows = [(number(row, "gold"), number(row, "baseline_gold"), str(row.get("prompt"))) for row in run.samples]
    scored = [(after, before, prompt) for after, before, prompt in rows if after is not None and before is not None]
    judges = judges_of(run)
    judge = "gold" if scored else judges[0] if judges else "reward"
    difference = interval(section(run.summary, f"{judge}_difference"), "difference")
    wins = interval(section(run.summary, f"win_rate_by_{judge}"), "win_rate")
    count = int(number(section(run.summary, "policy"), "num_replies") or 0)
    difference = replace(difference, count=count) if difference is not None else None
    if difference is None and scored:
        after, before, prompts = zip(*scored, strict=True)
        difference = paired_difference(after, before, groups=prompts)
    learned = judge == "reward" or judge.startswith("model")
    return BaselineComparison(judge, learned, difference, replace(wins, count=count) if wins is not None else None)


def judges_of(run: RunRecord) -> list[str]:
    """The names of the judges of an evaluate run: gold first, then the reward, then any others."""
    named = run.summary.get("judges")
    there = [str(name) for name in named] if isinstance(named, list) else []
    known = [name for name in ("gold", "reward") if name in section(run.summary, "policy")]
    return list(dict.fromkeys([*known, *there]))


def evaluation(runs: Sequence[RunRecord]) -> RunRecord | None:
    """The last evaluate run; None if there is none."""
    return next((run for run in reversed(runs) if run.stage == "evaluate"), None)


# --- tiles ---


def pipeline_tiles(record: PipelineRecord) -> tuple[Tile, ...]:
    """The headline numbers of a pipeline, from its summary. A missing number has no tile."""
    policy, reward_model = section(record.summary, "policy"), section(record.summary, "reward_model")
    tiles = []
    judge = "gold" if "gold_final" in policy else "reward"
    if (final := interval(policy, f"{judge}_final")) is not None:
        before = number(policy, f"{judge}_sft")
        value = f"{score(before)} → {score(final.value)}" if before is not None else score(final.value)
        how = "True quality before and after RL, from 0 to 1; the reward model's opinion plays no part."
        if judge == "reward":
            how = "What the reward model gives before and after RL. It rises even where the model is only gamed."
        tiles.append(Tile("Gold score" if judge == "gold" else "Reward", value, bounds(final, score), how))
    if (wins := _wins_over_sft(policy)) is not None:
        how = "Share of prompts on which the final reply beats the supervised one, ties half. 50% is no change."
        tiles.append(Tile("Win rate against SFT", percent(wins.value), bounds(wins, percent), how))
    if (best := _best_of(policy)) is not None:
        how = "Gold of the best, by gold itself, of so many supervised replies: what perfect choice would give."
        tiles.append(Tile(f"Best of {best[0]}", score(best[1]), "gold score", how))
    if (kl := number(policy, "kl")) is not None:
        how = "Distance of the final policy from the supervised one. Less for the same gold is better."
        tiles.append(Tile("KL", show(kl), "nats per reply", how))
    if (accuracy := interval(reward_model, "accuracy")) is not None:
        limit = number(reward_model, "bayes_accuracy")
        detail = bounds(accuracy, percent) + (f" · limit {percent(limit)}" if limit is not None else "")
        how = "Held-out pairs ordered as the annotators did. Noisy votes make the limit: no judge can do better."
        tiles.append(Tile("Reward-model accuracy", percent(accuracy.value), detail.removeprefix(" · "), how))
    if (took := number(record.summary, "seconds")) is not None:
        tiles.append(Tile("Time", seconds(took), "wall clock", "The whole pipeline, every stage."))
    if (memory := number(record.summary, "peak_rss_gb")) is not None:
        tiles.append(Tile("Peak memory", f"{memory:.2g} GB", "resident", "The most main memory held at any time."))
    return tuple(tiles)


def _wins_over_sft(policy: Mapping[str, Any]) -> Interval | None:
    names = {"wins": "win_rate_vs_sft", "wins_low": "win_rate_low_vs_sft", "wins_high": "win_rate_high_vs_sft"}
    return interval({short: policy.get(name) for short, name in names.items()}, "wins")


def _best_of(policy: Mapping[str, Any]) -> tuple[int, float] | None:
    """The largest n of the numbers called gold_best_of_n, and that number; None if there is none."""
    known = [(int(n), number(policy, name)) for name in policy if (n := name.removeprefix("gold_best_of_")).isdecimal()]
    return max(((n, value) for n, value in known if value is not None), default=None)


# --- verdicts ---


def pipeline_verdict(record: PipelineRecord) -> Verdict:
    """What a pipeline achieved, in plain words: did it help, at what cost, and can the reward be trusted?"""
    policy = section(record.summary, "policy")
    evaluated = evaluation(record.runs)
    difference = comparison(evaluated).difference if evaluated is not None else None
    judge = str(
        policy.get("judge") or ("reward" if "reward_final" in policy and "gold_final" not in policy else "gold")
    )
    learned = judge == "reward" or judge.startswith("model")
    what = "gold score" if judge == "gold" else "reward" if learned else f"score by {judge}"
    before, final, wins = number(policy, f"{judge}_sft"), interval(policy, f"{judge}_final"), _wins_over_sft(policy)
    sentences = []
    if final is not None and before is not None:
        moved = _moved(score(before), score(final.value), rose=final.value > before, bounds=bounds(final, score))
        paired = f"; {_change(difference)}" if difference is not None else ""
        sentences.append(f"The {what} {moved}{paired}.")
    elif final is not None:
        sentences.append(f"The {what} is {with_bounds(final, score)}.")
    elif difference is not None:
        sentences.append(f"Gold score: {_change(difference)}.")
    best, kl = _best_of(policy), number(policy, "kl")
    if best is not None and final is not None:
        more = "more than" if final.value > best[1] else "less than"
        verb = "what" if score(final.value) == score(best[1]) else more
        cost = f", at {show(kl)} nats of KL" if kl is not None else ""
        perfect = f"perfect choice among {best[0]} supervised replies would give ({score(best[1])})"
        sentences.append(f"That is {verb} {perfect}{cost}.")
    if wins is not None:
        shown = with_bounds(wins, percent)
        sentences.append(f"The final policy beats the supervised model on {shown} of prompts.")
    sentences += reward_model_sentences(section(record.summary, "reward_model"))
    for run in record.runs:
        sentences += _hacking_sentences(run)
    if learned:
        return Verdict("neutral", "Only the reward model has judged this so far.", tuple(sentences))
    standing = _standing(difference, before, final, wins)
    open_title = "No clear change is shown." if sentences else "There is not enough here to judge yet."
    if sentences and difference is None and final is None and wins is None:
        open_title = "No policy has been judged here yet."
    title = {
        "good": "Training made the model better.",
        "bad": "Training made the model worse.",
    }.get(standing, open_title)
    return Verdict(standing, title, tuple(sentences))


def run_verdict(run: RunRecord) -> Verdict | None:
    """What one run achieved, in plain words; None if it logged nothing to report."""
    sentences: list[str] = []
    standing: Standing = "neutral"
    title = f"{run.stage.capitalize()} {'finished' if run.finished else 'is not finished'}."
    if run.stage == "evaluate":
        found = comparison(run)
        alone = found.difference is None and found.wins is None
        standing = "neutral" if found.learned or alone else _standing(found.difference, None, None, found.wins)
        title = {
            "good": "The policy is better than its baseline.",
            "bad": "The policy is worse than its baseline.",
            "neutral": "The policy was measured." if alone else "Only the reward model has judged this so far.",
        }.get(standing, "No clear difference from the baseline.")
        sentences += _scores(run)
        if found.difference is not None:
            sentences.append(f"{_judge_name(found.judge)}: {_change(found.difference)}.")
        if found.wins is not None:
            sentences.append(f"It beats the baseline on {with_bounds(found.wins, percent)} of prompts.")
    elif run.stage == "reward":
        sentences += reward_model_sentences(run.summary)
    elif run.stage == "select":
        sentences += _selection_sentences(run.summary)
    else:
        sentences += _preference_sentences(run)
        told = (
            ("loss/train", "Training loss"),
            ("loss/validation", "Validation loss"),
            ("reward/mean", "Mean reward"),
            ("gold/mean", "Gold"),
        )
        for name, what in told:
            series = run.metrics.get(name)
            if series is not None and len(series):
                start, end = series.mean_of_first(), series.mean_of_last()
                moved = _moved(show(start), show(end), rose=end > start)
                sentences.append(f"{what} {moved}." if len(series) > 1 else f"{what} is {show(end)}.")
        if (kl := run.metrics.get("policy/kl")) is not None:
            sentences.append(f"The policy ended {show(kl.mean_of_last())} nats of KL from its reference.")
        sentences += _hacking_sentences(run)
    return Verdict(standing, title, tuple(sentences)) if sentences else None


def _judge_name(judge: str) -> str:
    return {"gold": "Gold score", "reward": "Reward"}.get(judge, judge)


def _scores(run: RunRecord) -> list[str]:
    """A sentence for each judge: the score of the policy and, if there is one, of its baseline."""
    policy, baseline = section(run.summary, "policy"), section(run.summary, "baseline")
    sentences = []
    for judge in judges_of(run):
        ours, theirs, num = interval(policy, judge), interval(baseline, judge), number(policy, "num_replies")
        failed = number(policy, f"num_{judge}_failed") or 0
        if ours is None:
            sentences.append(f"{_judge_name(judge)}: none of {show(num)} replies could be judged.")
            continue
        against = f", baseline {with_bounds(theirs, score)}" if theirs is not None else ""
        left_out = f", {show(failed)} that could not be judged left out" if failed else ""
        judged = show((num or 0) - failed)
        sentences.append(f"{_judge_name(judge)}: {with_bounds(ours, score)} on {judged} prompts{against}{left_out}.")
    return sentences


def _preference_sentences(run: RunRecord) -> list[str]:
    """A sentence on how many held-out preferences the implied reward of a policy gets right."""
    accuracy, num = interval(run.summary, "accuracy"), number(run.summary, "num_held_out")
    if run.stage != "preference" or accuracy is None or not num:
        return []
    shown = with_bounds(accuracy, percent)
    return [f"By the reward it implies, the policy is right about {shown} of {show(num)} held-out preferences."]


def _selection_sentences(summary: Mapping[str, Any]) -> list[str]:
    curve = section(summary, "best_of").get("curve")
    points = [p for p in curve if isinstance(p, Mapping)] if isinstance(curve, list) else []
    if not points:
        return []
    one, best = points[0], points[-1]
    n, kl = show(number(best, "n")), show(number(best, "kl"))
    sentences = []
    for name, what in (("reward", "reward"), ("gold", "gold score")):
        before, after = number(one, name), interval(best, name)
        if before is not None and after is not None:
            sentences.append(f"The best of {n} has a {what} of {with_bounds(after, score)}, one reply {score(before)}.")
    return [*sentences, f"Choosing costs at most {kl} nats of KL."] if sentences else []


def _change(difference: Interval) -> str:
    on = f"on the same {difference.count} prompts" if difference.count else "on the same prompts"
    return f"{on} the mean change is {with_bounds(difference, _signed)}"


def _standing(
    difference: Interval | None, before: float | None, final: Interval | None, wins: Interval | None
) -> Standing:
    """The standing by the strongest evidence: the paired difference, else the final score, else the win rate."""
    if difference is not None:
        low, high, null = difference.low, difference.high, 0.0
    elif final is not None and before is not None:
        low, high, null = final.low, final.high, before
    elif wins is not None:
        low, high, null = wins.low, wins.high, 0.5
    else:
        return "unclear"
    return "good" if low > null else "bad" if high < null else "unclear"


def reward_model_sentences(card: Mapping[str, Any]) -> list[str]:
    """What the card of a reward model says, in sentences."""
    accuracy = interval(card, "accuracy")
    if accuracy is None:
        return _label_sentences(card)
    sentence = f"The reward model orders {with_bounds(accuracy, percent)} of held-out pairs as the annotators did"
    comparisons = []
    if (longer := number(card, "longer_wins")) is not None:
        comparisons.append(f"always preferring the longer reply gives {percent(longer)}")
    if (limit := number(card, "bayes_accuracy")) is not None:
        comparisons.append(f"the noise of the votes allows at most {percent(limit)}")
    return [f"{sentence}; {' and '.join(comparisons)}." if comparisons else f"{sentence}."]


def _label_sentences(card: Mapping[str, Any]) -> list[str]:
    """What is said of a reward model that was judged by labels of single replies."""
    what = "steps" if card.get("reward_kind") == "process" else "tokens"
    if (right := interval(card, "label_accuracy")) is not None:
        kind = card.get("reward_kind")
        return [f"The {kind} reward model is right about {with_bounds(right, percent)} of held-out {what}."]
    if (error := interval(card, "squared_error")) is not None:
        return [f"The squared error of the reward model over held-out ratings is {with_bounds(error, show)}."]
    return []


def _hacking_sentences(run: RunRecord) -> list[str]:
    quality = measured_quality(run)
    if quality is None or not quality.fell:
        return []
    summary = quality.summary
    reward = "kept rising: it was being gamed" if summary.proxy_kept_rising else "fell too"
    peak, fall = f"{score(summary.peak_gold)} (KL {show(summary.peak_kl)})", percent(summary.fall_fraction)
    return [f"In {run.name} {quality.name} peaked at {peak}, then fell {fall} while the reward {reward}."]
