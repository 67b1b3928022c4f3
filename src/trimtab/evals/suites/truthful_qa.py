"""TruthfulQA (Lin et al., arXiv:2109.07958): does a model think that true answers are likelier than popular errors?"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.core.errors import DataError
from trimtab.data.files import Located
from trimtab.evals.suites.choices import picked_right, right_mass
from trimtab.evals.suites.suite import (
    ItemScores,
    Question,
    Suite,
    SuiteAnswer,
    SuiteItem,
    SuiteMetric,
    text_of,
    texts_of,
)


def read(rows: Sequence[Located]) -> list[SuiteItem]:
    """One item for each question. Its options are the best answer, the other correct and the incorrect answers, each
    text once; one that is in both lists counts as correct. Raises DataError if that leaves no incorrect one."""
    items = []
    for row in rows:
        question, best = text_of(row, "question").strip(), text_of(row, "best_answer").strip()
        right = list(dict.fromkeys([best, *texts_of(row, "correct_answers")]))
        wrong = [one for one in dict.fromkeys(texts_of(row, "incorrect_answers")) if one not in right]
        if not wrong:
            raise DataError(
                "every incorrect answer is among the correct ones too",
                where=row[0],
                fix="correct the row or leave it out",
            )
        options = (*right, *wrong)
        items.append(
            SuiteItem(
                id=question,
                questions=(Question(turns=(question,), options=options),),
                facts={"num_right": len(right)},
            )
        )
    return items


def score(item: SuiteItem, answers: Sequence[SuiteAnswer]) -> ItemScores:
    """MC1: is the best answer likelier than every incorrect one. MC2: the probability of all correct answers among
    all."""
    (logprobs,) = answers[0].logprobs
    num_right = item.facts["num_right"]
    single = [logprobs[0], *logprobs[num_right:]]
    return {"mc1": [picked_right(single, {0})], "mc2": [right_mass(logprobs, range(num_right))]}


SUITE = Suite(
    paper="arXiv:2109.07958",
    files=("truthful_qa/generation_validation.jsonl.gz",),
    hub=("hub:truthfulqa/truthful_qa?config=generation&split=validation",),
    read=read,
    score=score,
    metrics=(
        SuiteMetric("mc1", "the best answer is likelier than every incorrect one"),
        SuiteMetric("mc2", "probability of the correct answers among all"),
    ),
    notes=(
        "the question is asked under the model's chat template without the six examples of the paper's prompt, and the "
        "options are made from the lists of correct and incorrect answers: published figures cannot be compared",
        "log-probabilities are summed and not divided by length, as published, so short answers are favoured",
    ),
)
