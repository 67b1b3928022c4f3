"""Chat templates: the default one, and the date in those that write one."""

from __future__ import annotations

import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.errors import DataError

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
"""Of the tokenizers that trimtab trains, in the order of their ids; `<|end|>` is their eos token."""

_TURNS = (
    "{%- for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + END + '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
DEFAULT_TEMPLATE = _TURNS.replace("END", "'<|end|>'")
"""For tokenizers with `SPECIAL_TOKENS`; `default_template` is the same for others."""

TODAY = datetime.date(2024, 7, 26)
"""What a template that asks for the date is told, on every day: the default of the templates of Llama 3."""

_DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "YymdBbAaHIMSpjeFDTcxX"))
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{d}', '{TODAY.strftime(d)}')" for d in _DIRECTIVES)
    + " -}}{%- endmacro -%}"
)
"""Defines strftime_now for a template, with `TODAY` for the date. A template takes no function from outside, but
its own macro stands before what it has."""


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a tokenizer without one: `DEFAULT_TEMPLATE` with its own end token, and bos if it adds one.

    Role markers that are no tokens of it are written as plain text. Raises DataError where there is no end token.
    """
    if "<|end|>" not in tokenizer.get_vocab() and tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has neither a chat template nor an eos token, so a reply could never end",
            where=tokenizer.name_or_path or "the tokenizer",
            fix="set its eos_token (tokenizer_config.json), or use another model",
        )
    turns = DEFAULT_TEMPLATE if "<|end|>" in tokenizer.get_vocab() else _TURNS.replace("END", "eos_token")
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + turns if adds_bos else turns


def dated(template: Any) -> str | None:
    """The template with the date of `TODAY` if it asks for one; None if it can stay as it is."""
    asks = isinstance(template, str) and "strftime_now" in template
    return _DATE_MACRO + template if asks else None
