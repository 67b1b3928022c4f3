"""The votes of a project as verdicts on the models whose replies were compared."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict, Prompt, from_dict, rows_hash
from trimtab.evals.verdict_files import VerdictRows
from trimtab.evals.verdicts import PairVerdict, Side, prompt_name, verdict_row
from trimtab.feedback.store import open_store
from trimtab.feedback.votes import CountedVote, cast_votes
from trimtab.votes.table import WORTH, ranked_pairs


def project_verdicts(project: str | Path) -> VerdictRows:
    """A verdict for each vote that counts over two replies, and for each two replies of a ranking; two bad replies are
    a tie. Each annotator is a judge. Of two models, the one whose name comes first is called the model, and the other
    its baseline.

    Raises DataError if an item does not say which models wrote its replies, and ConfigError if the project has no
    store.
    """
    found: list[PairVerdict] = []
    num_missing = 0
    with closing(open_store(project, must_exist=True)) as store, store.read() as connection:
        for cast in cast_votes(connection):
            own = _verdicts_of(cast, where=f"{project}, vote {cast.id}")
            num_missing += not own
            found += own
    return VerdictRows(
        source=str(project),
        sha256=rows_hash(map(verdict_row, found)),
        verdicts=tuple(found),
        num_missing=num_missing,
    )


def _verdicts_of(cast: CountedVote, *, where: str) -> list[PairVerdict]:
    if cast.kind == "ranking":
        compared = list(ranked_pairs(cast.answer.ranking))
    elif cast.kind == "pairs" and cast.answer.choice in WORTH:
        compared = [(0, 1, cast.answer.choice)]
    else:
        return []
    prompt = prompt_name(from_dict(Prompt, cast.prompt))
    made = []
    for a, b, choice in compared:
        verdict = PairVerdict(
            prompt=prompt,
            model=_model_of(cast.replies[a], a, where),
            baseline=_model_of(cast.replies[b], b, where),
            verdict=WORTH[choice],
            shown_first=_shown_first(cast, a, b),
            judge=cast.annotator,
            where=where,
        ).with_replies(cast.replies[a]["text"], cast.replies[b]["text"])
        made.append(verdict.turned() if verdict.baseline < verdict.model else verdict)
    return made


def _model_of(reply: JsonDict, place: int, where: str) -> str:
    model: Any = reply["source"].get("model")
    if not isinstance(model, str) or not model:
        raise DataError(
            f"reply {place} of the item does not say which model wrote it",
            where=where,
            fix="import replies with their models (the columns model_a and model_b, or `model` of each reply); votes "
            "over replies of unknown models give labels, and no win rate",
        )
    return model


def _shown_first(cast: CountedVote, a: int, b: int) -> Side | None:
    """Whether the reply at place a was shown before that at place b: to the left, or above."""
    if cast.kind == "pairs" and cast.shown_left in ("A", "B"):
        return "model" if cast.shown_left == "A" else "baseline"
    if a in cast.shown_order and b in cast.shown_order:
        return "model" if cast.shown_order.index(a) < cast.shown_order.index(b) else "baseline"
    return None
