"""Rows with one reply in steps, in the forms that files use: stepwise (TRL), PRM800K and Math-Shepherd.

A label is the probability that a step is right. Files of people's labels have three of them, -1, 0 and +1. What a step
of 0 (neutral: neither right nor wrong) counts as is said behind the file's name: `FILE?neutral=right`, `wrong`, or
`skip`, by which nothing is learnt from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.types import JsonDict, Message, Prompt, SteppedResponse
from trimtab.data.columns import thumb
from trimtab.data.mistakes import Mistake, filled, shown, wrong_type
from trimtab.data.prompts import field_of, make_prompt, prompt_in, refuse_beside_reply, with_columns

NEUTRAL: Mapping[str, float | None] = {"right": 1.0, "wrong": 0.0, "skip": None}
"""The labels that a neutral step may get, by the value of the option `neutral`."""
STEP_TAG = "ки"
"""Ends a step in the files of Math-Shepherd; their column `label` has + or - in its place."""
_FIRST_STEP = "Step 1:"
_SAY_NEUTRAL = (
    "say what a neutral step counts as: FILE?neutral=right (as PRM800K's authors do), FILE?neutral=wrong, or "
    "FILE?neutral=skip to learn nothing from it"
)


def to_stepped_response(row: JsonDict) -> SteppedResponse:
    """A reply in steps, each with a label: true and false in any spelling, a probability, or null for a step that is
    not judged. With the option `neutral`, -1, 0 and 1."""
    steps = field_of(row, "completions", "steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        wrong_type("completions", steps, "a list of texts")
    labels = _labels(field_of(row, "labels"), row.get("neutral"))
    if not steps or not all(step.strip() for step in steps):
        raise Mistake("empty_response", "there is no step, or an empty one", "write every step, or remove the row")
    if len(steps) != len(labels):
        raise Mistake(
            "wrong_number_of_labels", f"{len(steps)} steps with {len(labels)} labels", "give each step one label"
        )
    refuse_beside_reply(row)
    return _stepped(prompt_in(row), steps, labels)


def _stepped(prompt: Prompt, steps: list[str], labels: list[float | None]) -> SteppedResponse:
    if all(label is None for label in labels):
        raise Mistake("no_label", f"none of {len(labels)} steps is judged", "remove the row: it says nothing")
    return SteppedResponse(prompt=prompt, steps=tuple(steps), labels=tuple(labels))


def _labels(values: Any, neutral: Any) -> list[float | None]:
    if not isinstance(values, list):
        wrong_type("labels", values, "a list of true and false")
    return [None if value is None else _label(value, values, neutral) for value in values]


def _label(value: Any, values: Any, neutral: Any) -> float | None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if neutral is not None:
        return _of_three(number if number is not None else thumb(value), values, neutral)
    if number == -1:
        raise Mistake(
            "unknown_label", f"labels is {shown(values)}: where -1 is wrong, 0 may be neutral", _SAY_NEUTRAL,
            droppable=False,
        )  # fmt: skip
    if number is not None and 0 <= number <= 1:
        return float(number)
    verdict = thumb(value)
    if verdict is None:
        wrong_type("labels", values, "a list of true and false, or of probabilities")
    return float(verdict)


def _of_three(value: float | bool | None, values: Any, neutral: Any) -> float | None:
    """The label of -1, 0, 1, true or false."""
    counts_as = _neutral(neutral)
    if isinstance(value, bool) or value in (-1, 1):
        return float(value > 0)
    if value != 0:
        raise Mistake(
            "unknown_label",
            f"labels is {shown(values)}, and with neutral={neutral} a label is -1, 0 or 1",
            "write these, or leave the option out for probabilities",
        )
    return counts_as


def _neutral(value: Any) -> float | None:
    if value not in NEUTRAL:
        raise Mistake(
            "unknown_label", f"neutral is {shown(value)}", f"it is one of {', '.join(NEUTRAL)}", droppable=False
        )
    return NEUTRAL[value]


# ---- PRM800K --------------------------------------------------------------------------------------------------------

_TESTS_LABELERS = ("is_quality_control_question", "is_initial_screening_question")
READ_OF_PRM800K = frozenset(
    {"problem", "ground_truth_answer", "steps", "completions", "text", "rating", "flagged", "human_completion",
     "chosen_completion"}
)  # fmt: skip
"""Fields of its question and label that are read."""


def is_prm800k(sample: Mapping[str, Any]) -> bool:
    """Whether these values are those of a row of PRM800K."""
    question, label = sample.get("prompt"), sample.get("label")
    return isinstance(question, dict) and "problem" in question and isinstance(label, dict) and "steps" in label


def to_prm800k(row: JsonDict) -> list[SteppedResponse]:
    """The replies of a row of PRM800K (Lightman et al., arXiv:2305.20050): the one whose steps were chosen, and for
    each step that was not chosen the steps before it with that one.

    Every step is labelled in one of these replies; in the others it is not judged, so that it counts once. Neutral
    steps count as right, as its authors have them, unless the option `neutral` says otherwise. A rating of null, a
    flagged step and one that the labeler wrote are not judged. A question that tests the labelers is a bad row.
    """
    if tests := [name for name in _TESTS_LABELERS if row.get(name)]:
        raise Mistake(
            "tests_labelers",
            f"{tests[0]} is true: the question tests the labelers, and is not to be trained on",
            'leave such rows out with on_bad_row = "drop"',
        )
    prompt = prm800k_prompt(row)
    neutral = row.get("neutral") or "right"
    steps: list[str] = []
    labels: list[float | None] = []
    found: list[SteppedResponse] = []
    marked = _field("label", row.get("label"), "steps", list)
    for number, step in enumerate(marked):
        place = f"label.steps[{number}]"
        completions = _field(place, step, "completions", list) if step.get("completions") else []
        read = [_completion(f"{place}.completions[{i}]", one, neutral) for i, one in enumerate(completions)]
        chosen = step.get("chosen_completion")
        if chosen is not None and (not isinstance(chosen, int) or not 0 <= chosen < len(read)):
            wrong_type(f"{place}.chosen_completion", chosen, f"a number below {len(read)}")
        for i, (text, label) in enumerate(read):
            if i != chosen and label is not None:
                found.append(_stepped(prompt, [*steps, text], [*[None] * len(steps), label]))
        if chosen is not None:
            text, label = read[chosen]
        elif filled(step.get("human_completion")):
            text, label = _field(f"{place}.human_completion", step["human_completion"], "text", str), None
        else:
            break
        steps.append(text)
        labels.append(label)
    if any(label is not None for label in labels):
        found.append(_stepped(prompt, steps, labels))
    if not found:
        raise Mistake("no_label", "no step is judged", "remove the row: it says nothing")
    return found


def prm800k_prompt(row: JsonDict) -> Prompt:
    """The problem of a row of PRM800K, with its answer as the fact `answer`."""
    question = field_of(row, "prompt")
    text = _field("question", question, "problem", str)
    answer = question.get("ground_truth_answer")
    facts: JsonDict = {} if answer is None else {"answer": answer}
    return make_prompt(with_columns((Message("user", text),), row), {"id": row.get("id")}, facts)


def _completion(place: str, completion: Any, neutral: Any) -> tuple[str, float | None]:
    text = _field(place, completion, "text", str)
    if not text.strip():
        raise Mistake("empty_response", f"{place} is an empty step", "write every step, or remove the row")
    rating = completion.get("rating")
    if rating is None or completion.get("flagged"):
        return text, None
    if isinstance(rating, bool) or rating not in (-1, 0, 1):
        raise Mistake("unknown_label", f"{place}.rating is {shown(rating)}", "write -1, 0, 1 or null")
    return text, _of_three(rating, rating, neutral)


def _field(place: str, value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        wrong_type(place, value, f"an object with {name} ({kind.__name__})")
    return value[name]


# ---- Math-Shepherd --------------------------------------------------------------------------------------------------


def is_math_shepherd(sample: Mapping[str, Any]) -> bool:
    """Whether these values are those of a row of Math-Shepherd."""
    text, label = sample.get("prompt"), sample.get("label")
    return isinstance(text, str) and STEP_TAG in text and isinstance(label, str)


def to_math_shepherd(row: JsonDict) -> SteppedResponse:
    """A reply of Math-Shepherd (Wang et al., arXiv:2312.08935): question and steps are one text in which each step ends
    with a tag, and the column `label` is that text with + or - in place of each tag."""
    question, parts = _tagged(field_of(row, "prompt"))
    marked = field_of(row, "label")
    labels: list[float | None] = []
    left = marked if isinstance(marked, str) else wrong_type("label", marked, "text")
    for part in parts:
        mark = left[len(part) : len(part) + 1]
        if not left.startswith(part) or mark not in ("+", "-"):
            raise Mistake(
                "wrong_number_of_labels",
                f"label differs from the text at {shown(part.strip())}, behind which + or - is needed",
                "let label be the text with + or - in place of each tag, or remove the row",
            )
        labels.append(float(mark == "+"))
        left = left[len(part) + 1 :]
    if left.strip():
        raise Mistake("wrong_number_of_labels", f"{shown(left)} follows the last label", "remove the row")
    steps = [parts[0][len(question) :].strip(), *map(str.strip, parts[1:])]
    if not all(steps):
        raise Mistake("empty_response", "a step is empty", "write every step, or remove the row")
    return _stepped(math_shepherd_prompt(row), steps, labels)


def math_shepherd_prompt(row: JsonDict) -> Prompt:
    """The question of a row of Math-Shepherd."""
    question, _ = _tagged(field_of(row, "prompt"))
    return make_prompt(with_columns((Message("user", question.strip()),), row), row)


def _tagged(text: Any) -> tuple[str, list[str]]:
    """The question, and the parts of the text that end with a tag; the first begins with the question."""
    if not isinstance(text, str) or STEP_TAG not in text:
        raise Mistake("no_steps", f"no step ends with {STEP_TAG!r}", "mark each step's end, or remove the row")
    *parts, rest = text.split(STEP_TAG)
    if rest.strip():
        raise Mistake("no_steps", f"{shown(rest.strip())} has no tag behind it", "mark each step's end")
    question, first, _ = parts[0].rpartition(_FIRST_STEP)
    if not first:
        raise Mistake("no_steps", f"nothing says where the steps begin: there is no {_FIRST_STEP!r}", "remove the row")
    return question, parts
