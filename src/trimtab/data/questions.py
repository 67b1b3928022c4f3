"""Questions of several turns, as MT-Bench has them: what a person says turn after turn, without the replies between.

    {"question_id": 81, "category": "writing", "turns": ["Compose a travel blog post.", "Rewrite it."]}

Arena-Hard before version 2 has the same layout with {"content": "…"} for a turn. The prompt of such a row is its first
turn; the column itself is one of its facts, from which the further turns are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.types import JsonDict, Prompt
from trimtab.data.mistakes import Mistake, wrong_type
from trimtab.data.prompts import field_of, prompt_in


def has_turns(sample: Mapping[str, Any]) -> bool:
    """Whether a row holds the texts of turns, and no roles."""
    turns = sample.get("turns")
    return isinstance(turns, list) and all(
        isinstance(turn, str) or (isinstance(turn, dict) and "content" in turn and "role" not in turn) for turn in turns
    )


def texts_of_turns(turns: Any) -> tuple[str, ...]:
    """The texts of turns, given as texts or as objects with the text under "content". Raises Mistake."""
    given = turns if isinstance(turns, list | tuple) else []
    texts = [turn.get("content") if isinstance(turn, dict) else turn for turn in given]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        wrong_type("turns", turns, "a list of texts")
    return tuple(map(str, texts))


def to_first_turn(row: JsonDict) -> Prompt:
    """The first turn as a prompt. Raises Mistake."""
    first = texts_of_turns(field_of(row, "turns"))[0]
    return prompt_in({**row, "prompt": [{"role": "user", "content": first}]})


def further_turns(prompt: Prompt) -> tuple[str, ...]:
    """What the user says after the replies to the prompt and to each turn before; nothing for a prompt of one turn."""
    try:
        first, *others = texts_of_turns(prompt.facts.get("turns"))
    except Mistake:
        return ()  # a fact of another meaning
    return tuple(others) if first == prompt.text else ()
