"""IFEval (Zhou et al., arXiv:2311.07911): does a reply follow instructions that a program can check?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.core.errors import DataError
from trimtab.data.files import Located
from trimtab.data.mistakes import shown
from trimtab.evals.suites.ifeval_checks import CHECKS
from trimtab.evals.suites.languages import LANGUAGES
from trimtab.evals.suites.suite import ItemScores, Question, Suite, SuiteAnswer, SuiteItem, SuiteMetric, text_of

_LISTS = ("keywords", "forbidden_words")


def read(rows: Sequence[Located]) -> list[SuiteItem]:
    """One item for each prompt with its instructions and their arguments."""
    items = []
    for row in rows:
        where, values = row
        names, given = values.get("instruction_id_list"), values.get("kwargs")
        if not isinstance(names, list) or not isinstance(given, list) or not names or len(names) != len(given):
            raise DataError(
                "instruction_id_list and kwargs are no lists of one length",
                where=where,
                fix="give rows as google/IFEval has them",
            )
        if not all(isinstance(one, dict | None) for one in given):
            raise DataError(
                f"kwargs is {shown(given)}; it holds a table for each instruction",
                where=where,
                fix="give rows as google/IFEval has them",
            )
        if unknown := [name for name in names if not isinstance(name, str) or name not in CHECKS]:
            raise DataError(
                f"no check for the instruction {unknown[0]!r}",
                where=where,
                fix=f"known are {', '.join(sorted(CHECKS))}",
            )
        arguments = [{name: value for name, value in (one or {}).items() if value is not None} for one in given]
        item = SuiteItem(
            id=str(values.get("key", where)),
            questions=(Question(turns=(text_of(row, "prompt"),)),),
            facts={"instructions": list(zip(names, arguments, strict=True))},
        )
        for one in arguments:
            if wrong := [key for key in _LISTS if key in one and not _are_texts(one[key])]:
                raise DataError(
                    f"{wrong[0]} is {shown(one[wrong[0]])}, and no list of texts",
                    where=where,
                    fix='write ["one", "two"]: of a single text each letter would be looked for',
                )
            if (language := str(one.get("language", "en"))) not in LANGUAGES:
                raise DataError(
                    f"the language {language!r} cannot be told",
                    where=where,
                    fix=f"leave the row out; known are {', '.join(sorted(LANGUAGES))}",
                )
        try:
            followed(item, "a")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"the arguments of an instruction are not those that its check takes: {type(error).__name__}: {error}",
                where=where,
                fix="give the arguments as google/IFEval has them",
            ) from error
        items.append(item)
    return items


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def followed(item: SuiteItem, reply: str) -> list[bool]:
    """For each instruction whether the reply follows it; an empty reply follows none."""
    instructions: Sequence[tuple[str, Mapping[str, Any]]] = item.facts["instructions"]
    return [bool(reply.strip()) and CHECKS[name](reply, arguments) for name, arguments in instructions]


def loosened(reply: str) -> list[str]:
    """The eight replies of the loose criterion: without the first line, the last line or both, each with its asterisks
    and without."""
    lines = reply.split("\n")
    cut = [reply, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def score(item: SuiteItem, answers: Sequence[SuiteAnswer]) -> ItemScores:
    """Strict and loose, by prompt (all instructions are followed) and by instruction (each one counts). Loose takes an
    instruction as followed if one of the loosened replies follows it."""
    (reply,) = answers[0].replies
    strict = followed(item, reply)
    loose = [any(one) for one in zip(*(followed(item, text) for text in loosened(reply)), strict=True)]
    slices: dict[str, list[float]] = {}
    for (name, _), kept in zip(item.facts["instructions"], strict, strict=True):
        slices.setdefault(f"instruction_strict/{name.partition(':')[0]}", []).append(float(kept))
    return {
        "prompt_strict": [float(all(strict))],
        "prompt_loose": [float(all(loose))],
        "instruction_strict": [float(one) for one in strict],
        "instruction_loose": [float(one) for one in loose],
        **slices,
    }


SUITE = Suite(
    paper="arXiv:2311.07911",
    files=("ifeval/input_data.jsonl.gz",),
    hub=("hub:google/IFEval?split=train",),
    read=read,
    score=score,
    metrics=(
        SuiteMetric("prompt_strict", "replies that follow all their instructions"),
        SuiteMetric("prompt_loose", "the same, with the loose criterion"),
        SuiteMetric("instruction_strict", "instructions followed"),
        SuiteMetric("instruction_loose", "the same, with the loose criterion"),
    ),
    max_new_tokens=1280,
    notes=(
        "sentences are counted and languages told by rules of this package, where the published checker uses NLTK's "
        "Punkt model and langdetect",
    ),
)
