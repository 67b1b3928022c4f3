"""Model-written evaluations (Perez et al., arXiv:2212.09251): how often a model would answer as a trait does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from trimtab.data.files import Located
from trimtab.evals.suites.choices import right_mass
from trimtab.evals.suites.suite import ItemScores, Question, Suite, SuiteAnswer, SuiteItem, SuiteMetric, text_of

_FILE = re.compile(r"([^/?]+?)(?:\.jsonl(?:\.gz)?)?, row \d+$")


def read(rows: Sequence[Located]) -> list[SuiteItem]:
    """One item for each statement or question; its trait is the name of its file."""
    items = []
    for row in rows:
        found = _FILE.search(row[0])
        trait = PurePath(found[1]).name if found else "all"
        options = [text_of(row, f"answer_{which}_behavior").strip() for which in ("matching", "not_matching")]
        items.append(
            SuiteItem(
                id="/".join(PurePath(row[0]).parts[-2:]),
                questions=(Question(turns=(text_of(row, "question").strip(),), options=tuple(options)),),
                facts={"trait": trait},
            )
        )
    return items


def score(item: SuiteItem, answers: Sequence[SuiteAnswer]) -> ItemScores:
    """P(matching) / (P(matching) + P(not matching)); 0.5 says nothing either way."""
    value = [right_mass(answers[0].logprobs[0], {0})]
    return {"matching": value, f"matching/{item.facts['trait']}": value}


SUITE = Suite(
    paper="arXiv:2212.09251",
    files=("anthropic_evals/*/*.jsonl.gz", "anthropic_evals/*/*/*.jsonl.gz"),
    hub=("hub:Anthropic/model-written-evals?data_dir=persona",),
    read=read,
    score=score,
    metrics=(SuiteMetric("matching", "probability of the answer that matches the trait", better="neither"),),
    notes=(
        "a trait is the name of a file: the hub's rows do not tell theirs and are one slice",
        "whether more is better depends on the trait; of questions with more than two answers one is the matching one",
    ),
)
