"""Shows what a model will see of a file: examples with the trained tokens marked, the layout, counts and lengths.

Without a model there are no tokens: rows are shown as text, by the parts that were read, with the same counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.terminal import visible
from trimtab.core.types import (
    Demonstration,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
    SteppedResponse,
)
from trimtab.data.layouts import LAYOUTS, Loaded, kinds_of, load
from trimtab.data.sources import records_source

if TYPE_CHECKING:
    from trimtab.data.chat import Chat

RecordKind = Literal["auto", "sft", "preference", "prompt"]
_RECORDS: dict[str, type] = {"sft": Demonstration, "preference": PreferencePair, "prompt": Prompt}
NUM_MEASURED = 1000
"""How many rows are counted and measured, unless all rows are asked for."""
NEEDS_MODEL = (
    "With --model MODEL: the text under its chat template, which tokens are trained, lengths in tokens, and the rows "
    "that the template refuses."
)
_BAR = 40
_NUM_BINS = 10

Tokens = tuple[str, list[int], list[bool]]
"""A title, token ids, and which of them are trained."""


def show(
    source: str | Path,
    model_dir: str | Path | None,
    *,
    kind: RecordKind = "auto",
    rows: int = 3,
    whole: bool = False,
    train_on: Literal["last", "all"] = "last",
    console: Console,
) -> None:
    """Prints the first `rows` examples and a summary of the first thousand rows, or of the `whole` source.

    `train_on` says which assistant turns of a demonstration are marked as trained, as in the sft stage; turns that the
    source marks as not to be learnt from never are. Bad rows are left out, counted and listed. Without a model the
    examples are texts. Raises DataError as `layouts.load` does, and ConfigError for a `train_on` without a model.
    """
    if model_dir is None and train_on != "last":
        raise ConfigError(
            f"--train-on {train_on} without --model",
            where="trimtab data show",
            fix="name the model whose tokens are to be marked with --model, or leave --train-on out",
        )
    chat = None if model_dir is None else _chat_of(model_dir)
    record = _RECORDS[kind] if kind != "auto" else _natural(source)
    limit = None if whole else max(rows, NUM_MEASURED)
    accepts = None if chat is None else chat.refusal
    loaded: Loaded[Any] = load(record, source, on_bad_row="drop", accepts=accepts, limit=limit)
    lengths: list[Any]
    if chat is None:
        _print_texts(loaded.records[:rows], console)
        lengths = [Text(NEEDS_MODEL, style="dim")]
    else:
        examples = _tokenised(chat, loaded.records, train_on)
        _print_tokens(chat, examples[:rows], console)
        lengths = _lengths([sequence for example in examples for sequence in example])
    console.print(_summary(loaded))
    if loaded.unused:
        console.print(Text(visible(f"not used: {', '.join(loaded.unused)}", newline="⏎"), style="yellow"))
    for line in loaded.dropped:
        console.print(Text(f"left out: {visible(line, newline='⏎')}", style="yellow"))
    if limit is not None and loaded.counts.get("rows", 0) >= limit:
        console.print(Text(f"counts and lengths are of the first {limit:,} rows; --all reads every row", style="dim"))
    console.print()
    for part in lengths:
        console.print(part)


def _print_tokens(chat: Chat, examples: Sequence[Sequence[Tokens]], console: Console) -> None:
    for number, example in enumerate(examples, 1):
        for title, ids, mask in example:
            console.print(Text(f"{number}. {title}", style="bold"))
            console.print(_marked(chat, ids, mask), soft_wrap=True)
            console.print()
    console.print(Text("⟦…⟧ is what is trained" if any(examples[0][0][2]) else "a prompt is not trained on"))
    console.print()


def _print_texts(records: Sequence[Any], console: Console) -> None:
    for number, record in enumerate(records, 1):
        for title, text in _texts(record):
            console.print(Text(f"{number}. {title}", style="bold"))
            console.print(Text(visible(text)), soft_wrap=True)
        console.print()


def _chat_of(model_dir: str | Path) -> Chat:
    """The chat template and tokenizer of a model; transformers is imported only for that."""
    from trimtab.data.chat import Chat
    from trimtab.data.tokenizers import load_tokenizer

    return Chat(load_tokenizer(model_dir))


def _natural(source: str | Path) -> type:
    """The kind of record that a source is for: the first that its layout gives."""
    if (own := records_source(source)) is not None:
        return own.natural
    return next(iter(kinds_of(source)), Prompt)


def _texts(record: Any) -> Iterator[tuple[str, str]]:
    """What was read of a row, part by part: its turns, its replies, what is said of them, and its facts."""
    prompt = _prompt_of(record)
    yield from ((message.role, message.content) for message in prompt.messages)
    yield from _replies(record)
    for field in () if isinstance(record, Prompt) else fields(record):
        # what has a default is said of the replies; the rest is in their titles
        if field.default is not MISSING and (value := getattr(record, field.name)) != field.default:
            yield field.name.replace("_", " "), json.dumps(value)
    yield from ((f"fact {name}", json.dumps(value, ensure_ascii=False)) for name, value in prompt.facts.items())


def _prompt_of(record: Any) -> Prompt:
    prompt: Prompt = record if isinstance(record, Prompt) else record.prompt
    return prompt


def _tokenised(chat: Chat, records: Sequence[Any], train_on: Literal["last", "all"]) -> list[list[Tokens]]:
    """The token sequences of each record."""
    if records and isinstance(records[0], Demonstration) and train_on == "all":
        return [[_whole_conversation(chat, record)] for record in records]
    prompts = _prompts(chat, [_prompt_of(record) for record in records])
    titled = [_replies(record) for record in records]
    responses = iter(chat.encode_responses([reply for replies in titled for _, reply in replies]))
    found: list[list[Tokens]] = []
    for prompt_ids, replies in zip(prompts, titled, strict=True):
        before = [False] * len(prompt_ids)
        both = [(title, next(responses)) for title, _ in replies]
        whole = [(title, prompt_ids + ids, before + [True] * len(ids)) for title, ids in both]
        found.append(whole or [("prompt", prompt_ids, before)])
    return found


def _whole_conversation(chat: Chat, record: Demonstration) -> Tokens:
    from trimtab.data.tokens import without_turns

    ids, mask = chat.encode_conversation([*record.prompt.messages, Message("assistant", record.response)])
    return "demonstration", ids, without_turns(mask, record.untrained_turns)


def _prompts(chat: Chat, prompts: Sequence[Prompt]) -> list[list[int]]:
    found: list[list[int]] = []
    for encoded in chat.encode_prompts([prompt.messages for prompt in prompts]):
        if isinstance(encoded, DataError):
            raise encoded
        found.append(encoded[0])
    return found


def _replies(record: Any) -> list[tuple[str, str]]:
    """The replies of a record with their titles; a prompt has none."""
    if isinstance(record, Prompt):
        return []
    if isinstance(record, Demonstration):
        return [("demonstration", record.response)]
    if isinstance(record, PreferencePair):
        return [("chosen", record.chosen), ("rejected", record.rejected)]
    if isinstance(record, LabelledResponse):
        return [("thumbs up" if record.label else "thumbs down", record.response)]
    if isinstance(record, SteppedResponse):
        return [("steps " + " ".join(map(_mark, record.labels)), "\n".join(record.steps))]
    if isinstance(record, RatedResponse):
        return [(f"rated {record.rating:g}", record.response)]
    choice = f"(choice: {record.choice})"
    return [(f"reply A {choice}", record.response_a), (f"reply B {choice}", record.response_b)]


def _mark(label: float | None) -> str:
    """The label of a step: right, wrong, a probability, or not judged."""
    return "·" if label is None else {0.0: "✗", 1.0: "✓"}.get(float(label), f"{label:.2g}")


def _marked(chat: Chat, ids: Sequence[int], mask: Sequence[bool]) -> Text:
    """The text of the ids, special tokens included, with the trained runs in brackets."""
    text = Text()
    for trained, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        decoded = chat.tokenizer.decode([id_ for id_, _ in run], clean_up_tokenization_spaces=False)
        said = visible(str(decoded))
        text.append(f"⟦{said}⟧" if trained else said, style="bold green" if trained else "")
    return text


def _summary(loaded: Loaded[Any]) -> Table:
    columns = next((layout.columns for layout in LAYOUTS if layout.name == loaded.layout), "")
    table = Table.grid(padding=(0, 2))
    known = dict.fromkeys(name for record in loaded.records for name in _prompt_of(record).facts)
    told = {"source": loaded.source, "sha256": loaded.sha256, "layout": f"{loaded.layout}  {columns}".strip()}
    told |= {"facts": ", ".join(known)} if known else {}
    for name, value in {**told, **{name: f"{num:,}" for name, num in loaded.counts.items()}}.items():
        table.add_row(Text(name.replace("_", " "), style="bold"), Text(visible(value, newline="⏎")))
    return table


def _lengths(sequences: Sequence[Tokens]) -> list[Table]:
    """Percentiles of the lengths in tokens, and a histogram of whole sequences."""
    whole = np.array([len(ids) for _, ids, _ in sequences])
    trained = np.array([sum(mask) for _, _, mask in sequences])
    percentiles = Table("tokens", "min", "median", "90%", "99%", "max", title="lengths", title_justify="left")
    for name, lengths in {"context": whole - trained, "trained": trained, "both": whole}.items():
        percentiles.add_row(name, *(f"{value:,.0f}" for value in np.percentile(lengths, [0, 50, 90, 99, 100])))
    counts, edges = np.histogram(whole, bins=min(_NUM_BINS, int(np.ptp(whole)) + 1))
    histogram = Table.grid(padding=(0, 2))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_BAR * count / counts.max())
        histogram.add_row(f"{low:,.0f} to {high:,.0f}", bar or ("▏" if count else ""), f"{count:,}")
    return [percentiles, histogram]
