"""Chat templates: the default one, the date in those that write one, and which of them only write contents."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import DataError

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
"""The special tokens of the tokenizers that trimtab trains, in the order of their ids; `<|end|>` is the eos token."""

_TURNS = (
    "{%- for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + END + '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
DEFAULT_TEMPLATE = _TURNS.replace("END", "'<|end|>'")
"""The template for tokenizers with `SPECIAL_TOKENS`; `default_template` gives the same for other tokenizers."""

TODAY = datetime.date(2024, 7, 26)
"""The date that a template gets when it asks for today's, on every day: the default of the templates of Llama 3."""

DATE: dict[str, Any] = {"date_string": TODAY.strftime("%d %b %Y")}
"""What a template is given that writes today's date unless it gets one; `template_of` replaces the function that others
call. A run must not change at midnight."""

_DIRECTIVES = (
    *(f"%-{letter}" for letter in "dmyHIMSjUWekl"),
    *(f"%{c}" for c in "aAbBcCdDeFgGhHIjklmMpPrRSTuUVwWxXyYzZ"),
)
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{d}', '{TODAY.strftime(d)}')" for d in _DIRECTIVES)
    + " -}}{%- endmacro -%}"
)
"""A macro that defines strftime_now in a template, with `TODAY` as the date. A template takes no function from outside,
but a macro of its own comes before the function that it has."""


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a tokenizer without one: `DEFAULT_TEMPLATE` with its own end token, and bos if it adds one.

    Role markers that are not tokens of the tokenizer are written as plain text. Raises DataError if there is no end
    token.
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


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template for conversations without tools, in which today's date is `TODAY`.

    A tokenizer may have several templates by name. Raises DataError if none of them is the default.
    """
    found: Any = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise DataError(
                f"the tokenizer has chat templates named {', '.join(map(repr, found))}, and none named 'default'",
                where=tokenizer.name_or_path or "the tokenizer",
                fix="name the one to use 'default', or give the tokenizer a single template",
            )
        found = found["default"]
    template = _without_cut(str(found))
    return _DATE_MACRO + template if "strftime_now" in template else template


# ---- templates that end where a reward model is read ---------------------------------------------------------------

# The empty strings keep white space of the template that a tag beside it would remove.
_WHOLE, _CUT = "{% set whole_conversation %}{{ '' }}", "{{ '' }}{% endset %}{{ whole_conversation"


def ending_with(tokenizer: PreTrainedTokenizerBase, tail: str, end: str) -> Any:
    """The tokenizer's template, or its templates by name, so that a conversation that ends with a reply ends with
    `end` instead of `tail`. The text of everything before that stays. `template_of` gives the template without this.

    A reward model reads a score at the end token of a reply. Most templates write a line break behind it, at which
    other programs would read another score.
    """
    found: Any = tokenizer.chat_template
    template = _without_cut(str(found["default"] if isinstance(found, dict) else found))
    said, last = json.dumps(tail), json.dumps(end)
    ends = f" if add_generation_prompt or not whole_conversation.endswith({said}) else whole_conversation"
    cut = f"{_WHOLE}{template.removesuffix(chr(10))}{_CUT}{ends}.removesuffix({said}) + {last} }}}}"
    return found | {"default": cut} if isinstance(found, dict) else cut


def _without_cut(template: str) -> str:
    return template[len(_WHOLE) : template.rindex(_CUT)] if template.startswith(_WHOLE) else template


# ---- templates that do not look at contents ----------------------------------------------------------------------

_PLAIN_LOOP = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length"})
"""The attributes of a loop that give no access to a message."""


def only_writes_contents(template: str) -> bool:
    """Whether a template writes each content as it is or stripped, and the roles alone decide what stands around the
    contents. True only if the template can be seen to do nothing else with a message.

    The parsed template decides: every use of `messages` must end in a role, in a number of turns, or in a place where
    the content itself is written.
    """
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError:
        return False  # it has tags that are not known here
    parents = {child: node for node in _nodes(tree) for child in node.iter_child_nodes()}
    known = {"messages"}
    while more := {name for node in _nodes(tree) for name in _turns_of(node, known)} - known:
        known |= more
    for name in tree.find_all(nodes.Name):
        if name.name == "loop" and getattr(parents[name], "attr", None) not in _PLAIN_LOOP:
            return False
        if name.name in known and name.ctx != "load" and not isinstance(parents[name], nodes.For):
            return False
        if name.name in known and name.ctx == "load" and not _is_harmless(name, parents):
            return False
    return True


def _nodes(tree: nodes.Node) -> Iterator[nodes.Node]:
    yield tree
    for child in tree.iter_child_nodes():
        yield from _nodes(child)


def _turns_of(node: nodes.Node, known: set[str]) -> set[str]:
    """The name that a loop over messages gives to each message; empty for any other node."""
    if not isinstance(node, nodes.For) or not isinstance(node.target, nodes.Name):
        return set()
    seen = {name.name for name in [node.iter, *node.iter.find_all(nodes.Name)] if isinstance(name, nodes.Name)}
    return {node.target.name} if seen & known else set()


def _is_harmless(node: nodes.Node, parents: dict[nodes.Node, nodes.Node]) -> bool:
    """Whether messages, or one message, are only looped over, counted, asked for a role, or written as content."""
    parent = parents[node]
    while isinstance(parent, nodes.Getitem) and parent.node is node and _chooses_messages(parent.arg):
        node, parent = parent, parents[parent]
    if isinstance(parent, nodes.For):
        return parent.iter is node and isinstance(parent.target, nodes.Name)
    if isinstance(parent, nodes.Filter):
        return parent.name in ("length", "count") and parent.node is node
    key = _key(parent) if isinstance(parent, nodes.Getitem | nodes.Getattr) and parent.node is node else None
    if key == "content":
        return _is_written(parent, parents)
    return key is not None and not hasattr(dict, key)  # the role, or a key that no message has here


def _chooses_messages(arg: nodes.Node) -> bool:
    """Whether a subscript is a constant index or a slice with constant bounds."""
    parts = [arg.start, arg.stop, arg.step] if isinstance(arg, nodes.Slice) else [arg]
    inner = [part.node if isinstance(part, nodes.Neg) else part for part in parts if part is not None]
    return all(isinstance(part, nodes.Const) and isinstance(part.value, int) for part in inner)


def _key(node: nodes.Getitem | nodes.Getattr) -> str | None:
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str) else None


def _is_written(node: nodes.Node, parents: dict[nodes.Node, nodes.Node]) -> bool:
    """Whether a content goes straight into the text, in a place that only the roles have chosen."""
    outer = parents[node]
    if isinstance(outer, nodes.Filter) and outer.name == "trim" and not (outer.args or outer.kwargs):
        node = outer  # trim of the content alone: text before an empty content keeps its blanks
    while not isinstance(node, nodes.Output):
        node = parents[node]
        if not isinstance(node, nodes.Add | nodes.Concat | nodes.Output):
            return False
    while not isinstance(node, nodes.Template):
        node = parents[node]
        if not isinstance(node, nodes.For | nodes.If | nodes.Template):
            return False  # a macro or a block may do something with what is written in it
    return True
