"""GSM8K (Cobbe et al., arXiv:2110.14168): grade-school maths, by the project's own check of exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from trimtab.core import registry
from trimtab.core.errors import DataError
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.data.files import Located
from trimtab.evals.suites.suite import ItemScores, Question, Suite, SuiteAnswer, SuiteItem, SuiteMetric, text_of

ASKED = "\n\nThink step by step. Then write the final answer, a number, on a last line that begins with ####."
FORMS = {"accuracy": ("hashes", "boxed", "last_number"), "accuracy_stated": ("hashes", "boxed")}
"""How the final answer may be written, for each metric."""


def read(rows: Sequence[Located]) -> list[SuiteItem]:
    """One item for each problem with the answer behind its ####. Raises DataError for rows of several files: a figure
    over the training and the test split is one of neither."""
    if len(files := {row[0].rpartition(", row ")[0] for row in rows}) > 1:
        raise DataError("rows of several splits", where=", ".join(sorted(files)), fix="give one of the files by --data")
    items = []
    for row in rows:
        question, (_, hashes, answer) = text_of(row, "question").strip(), text_of(row, "answer").rpartition("####")
        if not hashes or not answer.strip():
            raise DataError(
                "the answer does not end with '#### NUMBER'", where=row[0], fix="give rows as GSM8K has them"
            )
        items.append(
            SuiteItem(id=question, questions=(Question(turns=(question + ASKED,)),), facts={"answer": answer.strip()})
        )
    return items


@lru_cache(maxsize=1)
def _checkers() -> dict[str, Any]:
    """The scorers of the reward `exact_answer`, found by its name: this room loads no torch before that."""
    settings: Any = registry.find("reward", "exact_answer", where="the suite gsm8k")
    return {name: settings(forms=forms).load(token_budget=0) for name, forms in FORMS.items()}


def score(item: SuiteItem, answers: Sequence[SuiteAnswer]) -> ItemScores:
    """1 for the right final answer; stated means behind #### or in a box, not just the last number."""
    (reply,) = answers[0].replies
    prompt = Prompt(messages=(Message("user", item.questions[0].turns[0]),), facts=item.facts)
    rollout = Rollout(prompt=prompt, response=reply, prompt_ids=(), response_ids=(), logprobs=(), finish_reason="stop")
    return {name: [float(checker.score([rollout])[0][0])] for name, checker in _checkers().items()}


SUITE = Suite(
    paper="arXiv:2110.14168",
    files=("gsm8k/t*.jsonl.gz",),
    hub=("hub:openai/gsm8k?config=main&split=test",),
    read=read,
    score=score,
    metrics=(
        SuiteMetric("accuracy", "right final answers: stated, or else the last number"),
        SuiteMetric("accuracy_stated", "right final answers behind #### or in a box"),
    ),
    notes=(
        "asked without examples, so figures are below those of eight-shot prompts",
        "a model trained on GSM8K has seen the rows of train.jsonl.gz",
    ),
)
