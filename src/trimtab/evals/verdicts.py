"""Verdicts: judgements of a model's reply beside a baseline's reply to the same prompt.

Whatever can say which of two replies is better gives verdicts: a world, a reward model, people, a judge, a file. What
they are worth is computed from verdicts alone (`win_rate`, `length_control`, `style_control`, `verdict_study`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict, Prompt
from trimtab.data.mistakes import shown

Side = Literal["model", "baseline"]
OTHER_SIDE: dict[Side | None, Side | None] = {"model": "baseline", "baseline": "model", None: None}


@dataclass(frozen=True, kw_only=True)
class PairVerdict:
    """One judgement of a model's reply beside a baseline's reply to the same prompt."""

    prompt: str
    """What verdicts are grouped by: the text of the prompt, or the name that a file gives to the question."""
    model: str
    baseline: str
    verdict: float
    """How far the model's reply is preferred, in [0, 1]: 1 if it is better, 0 if the baseline's is, 0.5 for a tie."""
    length: int | None = None
    """Characters of the model's reply; None if unknown, as for the baseline's."""
    baseline_length: int | None = None
    shown_first: Side | None = None
    """Whose reply was shown first; None if unknown, or if the order was drawn anew for every prompt."""
    judge: str = ""
    turn: int | None = None
    """Which of the model's replies in a conversation is judged, from 1; None if it is the only one, or unknown."""
    weight: int = 1
    """How often the verdict counts in a weighted win rate: 3 for the strong verdicts of Arena-Hard."""
    reply: str | None = None
    """The text of the model's reply; None if unknown, as for the baseline's."""
    baseline_reply: str | None = None
    where: str = ""
    """The file and row of the verdict, for messages."""

    def turned(self) -> PairVerdict:
        """The same judgement with the two models in each other's place."""
        return replace(
            self,
            model=self.baseline,
            baseline=self.model,
            verdict=1 - self.verdict,
            length=self.baseline_length,
            baseline_length=self.length,
            shown_first=OTHER_SIDE[self.shown_first],
            reply=self.baseline_reply,
            baseline_reply=self.reply,
        )

    def with_replies(self, reply: str, baseline_reply: str) -> PairVerdict:
        """The verdict with the texts of the two replies and their lengths."""
        return replace(
            self,
            reply=reply,
            baseline_reply=baseline_reply,
            length=len(reply),
            baseline_length=len(baseline_reply),
        )


def verdict_row(verdict: PairVerdict) -> JsonDict:
    """The verdict as a row of the plain layout, without what is not known."""
    row = {name: value for name, value in vars(verdict).items() if value not in (None, "") and name != "where"}
    if verdict.weight == 1:
        del row["weight"]
    # a reply may be empty, and is known then
    replies = {"reply": verdict.reply, "baseline_reply": verdict.baseline_reply}
    return row | {name: text for name, text in replies.items() if text is not None}


def prompt_name(prompt: Prompt) -> str:
    """What verdicts on replies to this prompt are grouped by: its text, or its id if it has several turns."""
    return prompt.text if len(prompt.messages) == 1 else prompt.id


def with_baseline(verdicts: Iterable[PairVerdict], baseline: str) -> tuple[PairVerdict, ...]:
    """The verdicts, turned where needed so that this model is the baseline of every verdict on it; those on two other
    models stay as they are. Raises DataError if no verdict is on it."""
    found = tuple(verdict.turned() if verdict.model == baseline else verdict for verdict in verdicts)
    if not any(verdict.baseline == baseline for verdict in found):
        names = sorted({name for verdict in found for name in (verdict.model, verdict.baseline)})
        raise DataError(
            f"no verdict is on {baseline!r}", where="the baseline", fix=f"name one of {', '.join(names) or 'none'}"
        )
    return found


def without_repeats(verdicts: Iterable[PairVerdict]) -> tuple[PairVerdict, ...]:
    """The verdicts in order, each judgement once. Raises DataError if one judge gave one pair of replies two different
    verdicts in the same order."""
    seen: dict[tuple[object, ...], PairVerdict] = {}
    for verdict in verdicts:
        replies = (verdict.turn, verdict.reply, verdict.baseline_reply, verdict.length, verdict.baseline_length)
        key = (verdict.prompt, verdict.model, verdict.baseline, verdict.judge, verdict.shown_first, *replies)
        first = seen.setdefault(key, verdict)
        if (first.verdict, first.weight) != (verdict.verdict, verdict.weight):
            raise DataError(
                f"two verdicts on {verdict.model!r} against {verdict.baseline!r} contradict each other: "
                f"{first.verdict:g} and {verdict.verdict:g}, for the prompt {shown(verdict.prompt)}",
                where=f"{first.where} and {verdict.where}",
                fix="remove one of them; if two judges gave them, name the judges in a column `judge`, and if the "
                "replies were shown in another order, say it in a column `shown_first` (model or baseline)",
            )
    return tuple(seen.values())
