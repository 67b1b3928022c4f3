"""A helper process for judgements that a hostile text can make endless: it answers in time or is replaced.

Started as `python -I -c "…; main()"`. Reads requests as JSON lines, writes answers as JSON lines.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answers requests until the input ends."""
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        # The limit is processor time, so that a busy machine judges like an idle one. Nothing handles the signal: it
        # ends this process, even deep in a library.
        signal.setitimer(signal.ITIMER_PROF, 0 if kind == "load" else seconds)
        try:
            answer: dict[str, Any] = {"value": JUDGES[kind](*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def matches(pattern: str, how: str, text: str) -> bool:
    """Whether the pattern is found in the text, or is all of it."""
    compiled = re.compile(pattern, re.DOTALL)
    return bool(compiled.fullmatch(text) if how == "full" else compiled.search(text))


def same_maths(right: str, given: str) -> bool:
    """Whether two answers in LaTeX or plain notation are the same. Raises ValueError if the right one is unreadable."""
    parse, verify = _maths()
    expected = parse(f"${right}$", parsing_timeout=None)
    if not expected:
        raise ValueError(f"the right answer {right!r} cannot be read as mathematics")
    return bool(verify(expected, parse(f"${given}$", parsing_timeout=None), timeout_seconds=None))


def fits_schema(schema: str, text: str) -> bool:
    """Whether the text is JSON that fits the schema."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return bool(_validator(schema).is_valid(value))


def check_schema(schema: str) -> None:
    """Raises an error that says what is wrong with the schema itself."""
    import jsonschema

    parsed = json.loads(schema)
    jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator).check_schema(parsed)


@functools.cache
def _maths() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import logging

    import math_verify

    logging.disable(logging.WARNING)  # it warns that the caller has to limit the time
    return math_verify.parse, math_verify.verify


@functools.cache
def _validator(schema: str) -> Any:
    import jsonschema
    import referencing

    parsed = json.loads(schema)
    validator = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
    return validator(parsed, registry=referencing.Registry())  # one that fetches nothing


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def load(kind: str) -> None:
    """Loads the libraries that a judgement needs, so that loading does not count as its time."""
    if kind == "same_maths":
        same_maths("1", "1")
    elif kind in ("fits_schema", "check_schema"):
        _validator("true")


JUDGES: dict[str, Callable[..., Any]] = {
    "matches": matches,
    "same_maths": same_maths,
    "fits_schema": fits_schema,
    "check_schema": check_schema,
    "load": load,
}
