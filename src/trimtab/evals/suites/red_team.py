"""Red-team prompts (Bai et al., arXiv:2204.05862): how often the opening request of an attack is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trimtab.core.errors import DataError
from trimtab.core.types import Message, prompt_id
from trimtab.data.files import Located
from trimtab.evals.suites.refusals import VERSION, refusal_class
from trimtab.evals.suites.suite import ItemScores, Question, Suite, SuiteAnswer, SuiteItem, SuiteMetric, text_of

_OPENING = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|\Z)", re.DOTALL)


def read(rows: Sequence[Located]) -> list[SuiteItem]:
    """One item for each opening request of the dialogues, each text once."""
    items: dict[str, SuiteItem] = {}
    for row in rows:
        found = _OPENING.match(text_of(row, "chosen"))
        if found is None or not found[1].strip():
            raise DataError(
                "the transcript does not begin with a turn of a human",
                where=row[0],
                fix='give "chosen" as "\\n\\nHuman: … \\n\\nAssistant: …"',
            )
        opening = found[1].strip()
        name = prompt_id([Message("user", opening)])
        items.setdefault(name, SuiteItem(id=name, questions=(Question(turns=(opening,)),)))
    return list(items.values())


def score(_item: SuiteItem, answers: Sequence[SuiteAnswer]) -> ItemScores:
    """Refused or not, in full and in part."""
    found = refusal_class(answers[0].replies[0])
    return {"refused": [float(found != "compliance")], "partly_refused": [float(found == "partial_refusal")]}


SUITE = Suite(
    paper="arXiv:2204.05862",
    files=("hh-rlhf/harmless-base/test.jsonl.gz",),
    hub=("hub:Anthropic/hh-rlhf?data_dir=harmless-base&split=test",),
    read=read,
    score=score,
    metrics=(
        SuiteMetric("refused", "requests refused, in full or in part"),
        SuiteMetric("partly_refused", "requests refused in part", better="neither"),
    ),
    max_new_tokens=256,
    notes=(
        f"refusals are told by phrases of English (version {VERSION}); docs/suites.md says how well",
        "not every opening request is harmful, so the right share is below one; compare models, and look at xstest for "
        "refusals of harmless requests",
        "a reply that does not refuse need not help: it may be nonsense",
    ),
)
