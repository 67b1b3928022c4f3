"""An answer: what one person says about one item, checked against what was asked, and mapped from screen to replies.

The screen shows replies in an order of its own. Everything stored is about the replies themselves. Where each was shown
is stored beside it, so that statistics on preferences never depend on the screen and position bias can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict
from trimtab.feedback.project import Kind, Task
from trimtab.feedback.store import checked_text

MAX_WRITING = 50_000
"""Letters of a rationale or a written reply."""
WORDS = ("rationale", "reason", "text")
"""Parts of an answer in a person's own words. They are stored beside the vote, since they are deleted when asked."""
TAXONOMY = ("guideline gap", "annotator error", "ambiguous prompt", "matter of taste", "bad data")
"""Why annotators disagreed, as an adjudicator sees it."""
SKIP_REASONS = ("not my language", "outside my knowledge", "upsetting", "broken item", "other")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one person says about one item, such as Answer(choice="A", strength=2).

    Places are those of the item's replies, never those of the screen.
    """

    choice: str
    """A, B, tie, both_bad, cannot_judge or skip; "done" for kinds without sides."""
    strength: int | None = None
    """How much better the chosen reply is, from 1."""
    ranking: tuple[tuple[int, ...], ...] = ()
    """Places from best to worst; those in one tuple are tied: ((2,), (0, 1)) prefers place 2."""
    rating: int | None = None
    """The rating, from 1."""
    steps: tuple[int | None, ...] = ()
    """-1, 0 or 1 for each step; None after the first error."""
    flags: tuple[str, ...] = ()
    criteria: Mapping[str, str] = field(default_factory=dict)
    """A, B or tie for each criterion that was answered."""
    reason: str = ""
    """Why it was skipped or flagged; for an adjudication, its reason."""
    taxonomy: str = ""
    rationale: str = ""
    text: str = ""
    """The demonstration or the edited reply."""
    seconds: float | None = None
    """Time spent while the page was in view."""

    def stored(self) -> JsonDict:
        """The part that is stored in the column `answer`; `restored` reads it."""
        values: JsonDict = {
            "ranking": [list(tier) for tier in self.ranking],
            "rating": self.rating,
            "steps": list(self.steps),
            "flags": list(self.flags),
            "criteria": dict(self.criteria),
            "taxonomy": self.taxonomy,
        }
        return {name: value for name, value in values.items() if value not in (None, "", [], {})}


def restored(row: Mapping[Any, Any]) -> Answer:
    """The answer in a row of votes. Its words are those of `writings` if the row was joined with them, else empty."""
    answer = row["answer"]
    words = {name: row.get(name) or "" for name in WORDS}
    return Answer(
        choice=row["choice"],
        strength=row["strength"],
        ranking=tuple(tuple(tier) for tier in answer.get("ranking", ())),
        rating=answer.get("rating"),
        steps=tuple(answer.get("steps", ())),
        flags=tuple(answer.get("flags", ())),
        criteria=answer.get("criteria", {}),
        taxonomy=answer.get("taxonomy", ""),
        seconds=row["seconds"],
        **words,
    )


def check(answer: Answer, *, kind: Kind, num_replies: int, task: Task) -> Answer:
    """The answer, if it fits what was asked. Raises DataError that says what is wrong or missing."""
    for name in WORDS:
        value = getattr(answer, name)
        checked_text(value, where=name)
        if len(value) > MAX_WRITING:
            _refuse(f"{name} has {len(value)} letters", f"use at most {MAX_WRITING}")
    if answer.seconds is not None and not (math.isfinite(answer.seconds) and answer.seconds >= 0):
        _refuse(f"seconds = {answer.seconds}", "give a number that is not negative")
    if unknown := set(answer.flags) - set(task.flags) - {"flagged"}:
        _refuse(f"no flag is called {', '.join(sorted(unknown))}", f"use {', '.join(task.flags) or 'none'}")
    if answer.choice == "skip":
        return Answer(choice="skip", reason=answer.reason[:200], flags=answer.flags, seconds=answer.seconds)
    if answer.choice == "cannot_judge":
        if not task.cannot_judge:
            _refuse("cannot judge is not offered", "choose an answer, or skip")
        return replace(answer, strength=None, ranking=(), rating=None, steps=(), text="", criteria={})
    if task.rationale == "required" and not answer.rationale.strip() and kind not in ("demonstration", "edit"):
        _refuse("the reason in words is missing", "say in a few words why")
    checks = {"pairs": _pair, "ranking": _ranking, "rating": _rating, "steps": _steps}
    checks.get(kind, _written)(answer, num_replies, task)
    return answer


def _pair(answer: Answer, _: int, task: Task) -> None:
    if answer.choice in ("A", "B"):
        strongest = task.scale // 2
        if answer.strength is None or not 1 <= answer.strength <= strongest:
            _refuse(f"strength = {answer.strength!r}", f"use 1 to {strongest}")
    elif answer.choice == "tie":
        if not task.ties and task.scale % 2 == 0:
            _refuse("equally good is not offered", "choose a side")
    elif answer.choice == "both_bad":
        if not task.both_bad:
            _refuse("both bad is not offered", "choose a side")
    else:
        _refuse(f"the choice {answer.choice!r}", "use A, B, tie, both_bad, cannot_judge or skip")
    if answer.choice not in ("A", "B") and answer.strength is not None:
        _refuse(f"strength = {answer.strength} without a side", "leave it out")
    wrong = {k: v for k, v in answer.criteria.items() if k not in task.criteria or v not in ("A", "B", "tie")}
    if wrong:
        _refuse(f"criteria {wrong!r}", f"answer {', '.join(task.criteria) or 'none'} with A, B or tie")


def _done(answer: Answer) -> None:
    if answer.choice != "done":
        _refuse(f"the choice {answer.choice!r}", "use done, cannot_judge or skip")


def _ranking(answer: Answer, num: int, task: Task) -> None:
    _done(answer)
    if sorted(place for tier in answer.ranking for place in tier) != list(range(num)) or () in answer.ranking:
        _refuse(f"the ranking {answer.ranking!r} of {num} replies", "rank every reply once")
    if not task.ties and any(len(tier) > 1 for tier in answer.ranking):
        _refuse("tied replies, which are not offered", "give each its own place")


def _rating(answer: Answer, _: int, task: Task) -> None:
    _done(answer)
    if answer.rating is None or not 1 <= answer.rating <= task.rating_scale:
        _refuse(f"rating = {answer.rating!r}", f"use 1 to {task.rating_scale}")


def _steps(answer: Answer, num: int, _: Task) -> None:
    _done(answer)
    if len(answer.steps) != num or any(step not in (-1, 0, 1, None) for step in answer.steps):
        _refuse(f"the marks {list(answer.steps)!r} of {num} steps", "mark each step -1, 0 or 1")
    if None in answer.steps:
        first = answer.steps.index(None)
        if any(step is not None for step in answer.steps[first:]) or -1 not in answer.steps[:first]:
            _refuse("a step is not marked", "mark every step, or all up to the first wrong one")


def _written(answer: Answer, _: int, task: Task) -> None:
    _done(answer)
    if not answer.text.strip():
        _refuse("the reply is empty", "write it, or skip")


def _refuse(problem: str, fix: str) -> NoReturn:
    raise DataError(problem, where="the answer", fix=fix)


# --- from the screen ---


def from_position(position: int, scale: int, left: str) -> tuple[str, int | None]:
    """Choice and strength of an answer on the scale from far left (1) to far right (`scale`); `left` is A or B."""
    if not 1 <= position <= scale:
        _refuse(f"the answer {position}", f"use 1 to {scale}")
    middle = (scale + 1) / 2
    if position == middle:
        return "tie", None
    right = "B" if left == "A" else "A"
    return (left if position < middle else right), math.ceil(abs(position - middle))


def to_position(choice: str, strength: int | None, scale: int, left: str) -> int | None:
    """The inverse of `from_position`; None for answers that are not on the scale."""
    return next((p for p in range(1, scale + 1) if from_position(p, scale, left) == (choice, strength)), None)


def from_form(form: Mapping[str, Sequence[str]], *, kind: Kind, order: Sequence[int], task: Task) -> Answer:
    """The answer in a form as the page sends it, with all values of each name.

    Raises DataError for a form that cannot be read; `check` then tells whether the answer fits the question.
    """

    def one(name: str) -> str:
        return form[name][-1].replace("\r\n", "\n") if form.get(name) else ""

    def number(name: str) -> int | None:
        text = one(name)
        if not text:
            return None
        if not text.isascii() or not text.isdigit() or len(text) > 4:
            _refuse(f"{name} = {text!r}", "use a whole number")
        return int(text)

    seconds = one("seconds")
    try:
        spent = float(seconds) if seconds else None
    except ValueError:
        _refuse(f"seconds = {seconds!r}", "give a number")
    flags = tuple(dict.fromkeys(form.get("flag", ())))
    common: dict[str, Any] = {"flags": flags, "reason": one("reason"), "seconds": spent}
    common["rationale"] = one("rationale").strip()
    choice = one("choice")
    if choice in ("skip", "cannot_judge"):
        return Answer(choice=choice, **common)
    if kind == "pairs":
        left = "AB"[order[0]]
        if one("position") in ("tie", "both_bad"):  # where all answers are one group, of which one is chosen
            choice = one("position")
        if choice in ("tie", "both_bad"):
            picked: tuple[str, int | None] = (choice, None)
        elif (position := number("position")) is None:
            _refuse("no answer was chosen", "choose one")
        else:
            picked = from_position(position, task.scale, left)
        right = "B" if left == "A" else "A"
        sides = {"left": left, "right": right, "same": "tie"}
        criteria = {
            name: sides[one(f"criterion_{i}")] for i, name in enumerate(task.criteria) if one(f"criterion_{i}") in sides
        }
        return Answer(choice=picked[0], strength=picked[1], criteria=criteria, **common)
    if kind == "ranking":
        ranks = [number(f"rank_{i}") for i in range(len(order))]
        if None in ranks:
            _refuse("a reply has no rank", "rank every reply")
        tiers: dict[int, list[int]] = {}
        for place, rank in zip(order, ranks, strict=True):
            tiers.setdefault(rank or 0, []).append(place)
        return Answer(choice="done", ranking=tuple(tuple(sorted(tiers[r])) for r in sorted(tiers)), **common)
    if kind == "rating":
        return Answer(choice="done", rating=number("rating"), **common)
    if kind == "steps":
        marks = {"wrong": -1, "neutral": 0, "right": 1, "": None}
        given = [one(f"step_{i}") for i in range(len(order))]
        if not set(given) <= marks.keys():
            _refuse(f"the marks {given!r}", "use right, neutral or wrong")
        return Answer(choice="done", steps=tuple(marks[m] for m in given), **common)
    return Answer(choice="done", text=as_in_a_form(one("text")), **common)


def as_in_a_form(text: str) -> str:
    """A text as a form gives it back: with one kind of line break, and without blanks around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def agrees(answer: Answer, gold: Mapping[str, Any]) -> bool:
    """Whether an answer agrees with the expected one.

    It does if it makes the same choice, ranks no pair the other way round, gives a rating within one point (the same
    for thumbs), or marks the same first wrong step, depending on what is expected.
    """
    if "choice" in gold:
        return bool(answer.choice == gold["choice"])
    if answer.choice != "done":
        return False
    if "ranking" in gold:
        rank = {place: i for i, tier in enumerate(answer.ranking) for place in tier}
        tiers = gold["ranking"]
        return all(
            rank.get(a, 0) <= rank.get(b, 0)
            for i, better in enumerate(tiers)
            for worse in tiers[i + 1 :]
            for a in better
            for b in worse
        )
    if "rating" in gold:
        allowed = 0 if gold.get("points", 2) <= 2 else 1
        return answer.rating is not None and abs(answer.rating - int(gold["rating"])) <= allowed
    first_wrong = [next((i for i, s in enumerate(steps) if s == -1), -1) for steps in (answer.steps, gold["steps"])]
    return bool(first_wrong[0] == first_wrong[1])


_GOLD = {
    "pairs": '{"choice": "A"}',
    "ranking": '{"ranking": [[2], [0, 1]]} (places from best to worst, counted from 0)',
    "rating": '{"rating": 2}',
    "steps": '{"steps": [1, 1, -1, null]} (1 right, 0 neutral, -1 wrong)',
}
"""The form of the expected answer of each kind. It may add "why", a reason for people who take the quiz."""


def checked_gold(gold: Mapping[str, Any], *, num_replies: int, task: Task) -> JsonDict:
    """The expected answer of a gold or quiz item, if a person could give it. Raises DataError that shows its form."""
    where = "the expected answer"
    if task.kind not in _GOLD:
        raise DataError(
            f"an expected answer to {task.kind!r}", where=where, fix="ask what people write without --gold and --quiz"
        )
    fix = f'write gold as {_GOLD[task.kind]}, with "why" if you like'
    known = {name: value for name, value in gold.items() if name not in ("why", "points")}
    try:
        answer = Answer(
            choice=known.get("choice", "done"),
            strength=1 if known.get("choice") in ("A", "B") else None,
            ranking=tuple(tuple(tier) for tier in known.get("ranking", ())),
            rating=known.get("rating"),
            steps=tuple(known.get("steps", ())),
        )
        check(answer, kind=task.kind, num_replies=num_replies, task=replace(task, rationale="off"))
    except (TypeError, DataError) as error:
        problem = error.problem if isinstance(error, DataError) else "not of the right form"
        raise DataError(f"gold is {dict(gold)!r}: {problem}", where=where, fix=fix) from None
    wanted = task.kind if answer.choice == "done" else "choice"
    if known.keys() - {"choice", wanted} or answer.choice == "skip":
        raise DataError(f"gold is {dict(gold)!r}", where=where, fix=fix)
    return {**gold, "points": task.rating_scale} if wanted == "rating" else dict(gold)
