"""Reads verdicts from files in any of the layouts of `verdict_layouts`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.core.errors import DataError
from trimtab.data.sources import read_rows
from trimtab.evals.answers import Answers
from trimtab.evals.verdict_layouts import FromRow, ReplyScore, layout_of
from trimtab.evals.verdicts import PairVerdict, with_baseline, without_repeats

TIE_DELTA = 0.1
"""Two scores that differ by no more are a tie, as in FastChat."""


@dataclass(frozen=True, kw_only=True)
class VerdictRows:
    """What one source holds, row by row."""

    source: str
    sha256: str
    verdicts: tuple[PairVerdict, ...]
    scores: tuple[ReplyScore, ...] = ()
    """Scores of single replies."""
    num_missing: int = 0
    """See `VerdictFiles`, also for the next."""
    not_read: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VerdictFiles:
    """The verdicts of some sources, and how many of their rows are not among them."""

    verdicts: tuple[PairVerdict, ...]
    sha256: dict[str, str]
    """The hash of each source, by its name as it was given."""
    num_missing: int
    """Judgements without a verdict: the judge gave none that could be read, an annotator gave none, or the vote does
    not count."""
    num_repeated: int
    """Rows that repeat a verdict exactly, prompt, models, order and judge included."""
    scores: tuple[ReplyScore, ...] = ()
    """The scores of single replies, of which verdicts were made too."""
    num_unpaired: int = 0
    """Scores of single replies without a score of the baseline's reply by the same judge."""
    num_unanswered: int = 0
    """Verdicts whose replies are not among the answers that were given; 0 if none were given."""
    not_read: tuple[str, ...] = ()
    """Columns of the rows that say nothing here, or whose names are misspelt."""


def read_verdicts(
    sources: Sequence[str | Path], *, baseline: str | None = None, answers: Answers | None = None
) -> VerdictFiles:
    """All verdicts of the files; see `read_file` and `collect`."""
    return collect([read_file(source, baseline=baseline) for source in sources], baseline=baseline, answers=answers)


def read_file(source: str | Path, *, baseline: str | None = None) -> VerdictRows:
    """The verdicts of a file, each row of it. `baseline` is the model that others were compared with, for a file that
    does not name it (Arena-Hard before version 2). Raises DataError for rows of no layout, without a prompt or a
    model's name, and with a verdict that is none."""
    read = read_rows(source)
    if read.bad:
        raise DataError(
            f"{len(read.bad)} rows cannot be read, and a win rate over the others could be biased; the first: "
            f"{read.bad[0].problem}",
            where=read.bad[0].where,
            fix=read.bad[0].fix,
        )
    found: list[FromRow] = []
    not_read: dict[str, None] = {}
    for where, row in read.rows:
        layout = layout_of(row, where=where)
        found += layout.read(row, where, baseline)
        not_read |= dict.fromkeys(name for name in row if name not in (*layout.columns, *layout.optional))
    return VerdictRows(
        source=read.source,
        sha256=read.sha256,
        verdicts=tuple(one for one in found if isinstance(one, PairVerdict)),
        scores=tuple(one for one in found if isinstance(one, ReplyScore)),
        num_missing=found.count(None),
        not_read=tuple(not_read),
    )


def collect(parts: Sequence[VerdictRows], *, baseline: str | None, answers: Answers | None) -> VerdictFiles:
    """The verdicts of all sources together, each judgement once.

    `baseline` names the model that others are compared with: verdicts on it are turned so that it is the baseline, and
    scores of single replies are compared with its scores. `answers` give verdicts the texts and lengths of their
    replies. Raises DataError for two verdicts, or scores, of one judge that contradict each other, for scores without
    a baseline, and if there is no verdict.
    """
    num_missing = sum(part.num_missing for part in parts)
    scores = [one for part in parts for one in part.scores]
    distinct = _without_repeats(scores)
    compared, num_unpaired = verdicts_of_scores(distinct, baseline)
    found = [*(one for part in parts for one in part.verdicts), *compared]
    if not found:
        raise DataError(
            f"none of the {num_missing + num_unpaired} rows holds a verdict",
            where=", ".join(part.source for part in parts),
            fix="have the replies judged, or name other files",
        )
    kept = without_repeats(found if baseline is None else with_baseline(found, baseline))
    num_unanswered = 0
    if answers is not None:
        kept, num_unanswered = answers.fill(kept)
    return VerdictFiles(
        verdicts=kept,
        sha256={part.source: part.sha256 for part in parts},
        num_missing=num_missing,
        num_repeated=len(found) - len(kept) + len(scores) - len(distinct),
        scores=tuple(distinct),
        num_unpaired=num_unpaired,
        num_unanswered=num_unanswered,
        not_read=tuple(dict.fromkeys(name for part in parts for name in part.not_read)),
    )


def verdicts_of_scores(scores: Sequence[ReplyScore], baseline: str | None) -> tuple[list[PairVerdict], int]:
    """A verdict for each score of a model whose baseline was scored on the same question and turn by the same judge,
    and the number of the others. Scores within `TIE_DELTA` tie. Raises DataError if the baseline is not named, or has
    no scores."""
    if not scores:
        return [], 0
    known = {(one.prompt, one.turn, one.judge): one.score for one in scores if one.model == baseline}
    if not known:
        names = ", ".join(sorted({one.model for one in scores}))
        raise DataError(
            "scores of single replies are no verdicts without a baseline"
            if baseline is None
            else f"the baseline {baseline!r} has no scores",
            where=scores[0].where,
            fix=f"name the model that the others are compared with: --baseline with one of {names}",
        )
    made, num_unpaired = [], 0
    for one in scores:
        theirs = known.get((one.prompt, one.turn, one.judge))
        if one.model == baseline:
            continue
        if theirs is None:
            num_unpaired += 1
            continue
        gap = one.score - theirs
        made.append(
            PairVerdict(
                prompt=one.prompt,
                model=one.model,
                baseline=str(baseline),
                verdict=0.5 if abs(gap) <= TIE_DELTA + 1e-9 else float(gap > 0),
                judge=one.judge,
                turn=one.turn,
                where=one.where,
            )
        )
    return made, num_unpaired


def _without_repeats(scores: Iterable[ReplyScore]) -> list[ReplyScore]:
    """The scores in order, each once. Raises DataError if one judge gave one reply two different scores."""
    seen: dict[tuple[object, ...], ReplyScore] = {}
    for one in scores:
        first = seen.setdefault((one.prompt, one.turn, one.model, one.judge), one)
        if replace(one, where=first.where) != first:
            raise DataError(
                f"two scores of {one.model!r} on {one.prompt} by one judge: {first.score:g} and {one.score:g}",
                where=f"{first.where} and {one.where}",
                fix="remove one of them, or name the judges in the column `judge`",
            )
    return list(seen.values())
