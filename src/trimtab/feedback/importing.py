"""Imports items from files, samples and worlds with the readers of training: one for each row, pair or group."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import sqlalchemy as sa

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict, Message, Prompt
from trimtab.data.compared import to_comparison
from trimtab.data.layouts import OnBadRow
from trimtab.data.mistakes import Mistake, shown
from trimtab.data.ranked import REPLY_LISTS, TEXT_OF_REPLY
from trimtab.data.recognise import is_unstated
from trimtab.data.rows import (
    to_conversation_prompt,
    to_demonstration,
    to_explicit_pair,
    to_implicit_pair,
)
from trimtab.data.sources import is_hub, read_rows, records_source, stream_rows
from trimtab.feedback import tables as t
from trimtab.feedback.answers import checked_gold
from trimtab.feedback.imported_votes import GivenVote, add_votes, vote_of_row, with_choice
from trimtab.feedback.items import NUM_REPLIES, NewItem, NewReply, Purpose, add_items, check_scores, reply_hash
from trimtab.feedback.project import Kind, Task
from trimtab.feedback.restoring import restore
from trimtab.feedback.source_rows import (
    RowNames,
    answered,
    is_sample,
    names_in,
    questions_of,
    records_of,
    refuse_unknown_names,
    renamed,
    with_plain_names,
)
from trimtab.feedback.store import Store
from trimtab.worlds.source import is_world, read_world

_SOURCE_COLUMNS = ("model", "checkpoint", "sampling", "seed", "finish_reason")
_MOST_MISTAKES = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the rows of a source are read."""

    purpose: Purpose = "task"
    """What the items are for: tasks, hidden gold, or the quiz."""
    slice: str = ""
    """The slice of every row that names none."""
    with_votes: bool = False
    """Take the choices of a comparisons file as votes of the annotators it names."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The file's column for each name: {"prompt": "instruction+input"} joins two columns with an empty line."""
    limit: int | None = None
    """Read only the first rows."""
    on_bad_row: str = "stop"
    """stop refuses a file with a bad row; drop leaves such rows out and counts them."""

    def refuse(self, what: str, *, where: str, fix: str) -> None:
        """Raises DataError for options that say how rows are read, of a source that has none."""
        given = {
            "--gold or --quiz": self.purpose != "task",
            "--slice": bool(self.slice),
            "--with-votes": self.with_votes,
            "--columns": bool(self.columns),
            "--limit": self.limit is not None,
        }
        if named := [name for name, is_given in given.items() if is_given]:
            raise DataError(f"{', '.join(named)} for {what}", where=where, fix=fix)


def import_source(
    store: Store, source: str, options: Options | None = None, *, actor: int | None = None
) -> dict[str, int]:
    """Adds what a source holds; returns counts of rows, items and what was left out.

    A source is a file or hub data set in any layout of `trimtab.data.layouts`, rollouts of `trimtab generate`, rows
    with `prompt` and `responses`, a dump, or a world. Everything is read and checked before anything is added. Raises
    DataError with the first mistakes.
    """
    options = options or Options()
    task = store.project.settings.task
    if options.with_votes and (task.kind != "pairs" or options.purpose != "task"):
        raise DataError(
            f"votes of a file for {task.kind if task.kind != 'pairs' else options.purpose!r} items",
            where=source,
            fix="a file's choices are votes between two replies: import them into a project of kind 'pairs', without "
            "--gold or --quiz; or leave --with-votes away",
        )
    refuse_unknown_names(options.columns, where=source)
    if is_world(source):
        options.refuse("a world", where=source, fix="ask a world's prompts as tasks; world:NAME?num=200 says how many")
        return add_items(store, _from_world(source, task.kind), actor=actor)
    if records_source(source) is not None:
        return _add_records(store, source, options, actor)
    found = read_rows(source, limit=options.limit)
    if found.rows and found.rows[0][1].get("record") == "dump":
        if found.bad:
            raise DataError(found.bad[0].problem, where=found.bad[0].where, fix="copy or export the dump again")
        options.refuse("a dump", where=source, fix="a dump says itself what its items are: restore it without them")
        return restore(store, [row for _, row in found.rows], actor=actor)
    read = _Read(task, options, mistakes=[(bad.where, bad.problem, bad.fix) for bad in found.bad])
    given = []
    for where, row in found.rows:
        with read.noting_mistakes(where):
            given.append((where, renamed(row, options.columns)))
    names = names_in([row for _, row in given], where=source)
    if names.needs_records:
        return _add_records(store, source, options, actor)
    for where, row in given:
        with read.noting_mistakes(where):
            read.add_row(where, row, names)
    read.add_groups_of_samples()
    num_rows = len(found.rows) + len(found.bad)
    if read.mistakes and (options.on_bad_row == "stop" or not read.items):
        raise _all_mistakes(read.mistakes, num_rows)
    counts = {"rows": num_rows, "dropped_bad_row": len(read.mistakes)}
    if read.same_replies:
        counts["dropped_same_reply"] = read.same_replies
    counts |= add_items(store, read.items, actor=actor)
    if options.with_votes:
        counts |= add_votes(store, read.votes) | {"not_judged": read.not_judged}
    return counts


@dataclass
class _Read:
    """What the rows of a source hold, before any of it is added."""

    task: Task
    options: Options
    mistakes: list[tuple[str, str, str]]
    """Where each is, the problem and what to do."""
    items: list[tuple[str, NewItem]] = field(default_factory=list)
    """Each with the place of its row."""
    votes: list[GivenVote] = field(default_factory=list)
    not_judged: int = 0
    same_replies: int = 0
    _samples: dict[tuple[Message, ...], list[tuple[str, JsonDict, Prompt, NewReply]]] = field(default_factory=dict)

    @contextmanager
    def noting_mistakes(self, where: str) -> Iterator[None]:
        """A mistake inside this block is kept with its place."""
        try:
            yield
        except (DataError, Mistake) as error:
            self.mistakes.append((where, error.problem, error.fix))

    def add_row(self, where: str, row: JsonDict, names: RowNames) -> None:
        """Takes one row. A sample waits for the others of its prompt."""
        row = names.named(row)
        if self.options.with_votes or self.options.purpose != "task":
            row = with_choice(row, names.sides)
        if is_sample(row, self.task.kind):
            demonstration = answered(with_plain_names(row))
            refuse_second_questions(row, demonstration.prompt, [demonstration.response])
            reply = NewReply(text=demonstration.response, source=_source(row))
            group = self._samples.setdefault(demonstration.prompt.messages, [])
            group.append((where, row, demonstration.prompt, reply))
            return
        asked = list(items_of_row(row, self.task, self.options))
        for item in asked:
            item.refuse(where)
        if self.options.with_votes:
            given = vote_of_row(row, asked, self.task)
            self.votes += [given] if given is not None else []
            self.not_judged += given is None
        self.items += [(where, item) for item in asked]

    def add_groups_of_samples(self) -> None:
        """Makes the items of each prompt's samples."""
        for group in self._samples.values():
            where, _, prompt, _ = group[0]
            replies = _first_of_equal([reply for _, _, _, reply in group])
            self.same_replies += len(group) - len(replies)
            with self.noting_mistakes(where):
                row = _row_of_samples([row for _, row, _, _ in group])
                for item in _of_replies(prompt, replies, row, self.task, self.options):
                    item.refuse(where)
                    self.items.append((where, item))


def _all_mistakes(mistakes: Sequence[tuple[str, str, str]], num_rows: int) -> DataError:
    where, problem, fix = mistakes[0]
    more = "".join(f"\n    {w}: {p}" for w, p, _ in mistakes[1:_MOST_MISTAKES])
    return DataError(
        f"{problem}\n  {len(mistakes)} of {num_rows} rows cannot be used{':' if more else ''}{more}",
        where=where,
        fix=f"{fix}; or leave such rows out with --on-bad-row drop",
    )


def _list_of_replies(row: Mapping[str, Any], kind: Kind) -> list[Any] | None:
    """The replies of a row that has several in one column; None if it has not."""
    if (responses := _json(row, "responses", list)) is not None:
        return cast("list[Any]", responses)
    if kind == "steps" or any(row.get(name) is not None for name in ("completion", "response")):
        return None
    found = next((row[name] for name in REPLY_LISTS if isinstance(row.get(name), list)), None)
    targets = row.get("targets")
    return found if found is not None or not isinstance(targets, dict) else targets.get("choices")


def _add_records(store: Store, source: str, options: Options, actor: int | None) -> dict[str, int]:
    """Adds the items of a source whose rows the readers of training make records of first."""
    fix = "its rows are read as the stages read them; write them with their own columns to say more"
    replace(options, limit=None, slice="").refuse("such a file", where=source, fix=fix)
    task = store.project.settings.task
    on_bad_row = cast("OnBadRow", options.on_bad_row)
    loaded = records_of(source, task.kind, limit=options.limit, on_bad_row=on_bad_row)
    new: list[NewItem] = []
    for prompt, texts in questions_of(loaded.records):
        replies = [NewReply(text=text) for text in texts]
        if task.kind == "steps":
            new.append(_item(prompt, replies, {}, task, options))
        else:  # the better one came first; which of two is A must not reveal that
            replies.sort(key=lambda reply: reply_hash(reply.text))
            new += _of_replies(prompt, replies, {}, task, options)
    counts = {"rows": loaded.counts["rows"], "dropped_bad_row": loaded.num_dropped}
    return counts | add_items(store, ((source, item) for item in new), actor=actor)


def _row_of_samples(rows: Sequence[JsonDict]) -> JsonDict:
    """The row of all samples of a prompt: sensitive if one is. Raises Mistake if they contradict each other."""
    sensitive = [_truth(row, "sensitive") for row in rows]  # each is read, so that each mistake is found
    merged = {**rows[0], "sensitive": any(sensitive)}
    for name in ("slice", "priority", "author"):
        given = [row[name] for row in rows if row.get(name) not in (None, "")]
        other = next((value for value in given if value != given[0]), None)
        if other is not None:
            raise Mistake(
                "contradiction",
                f"the samples of one prompt have the {name} {given[0]!r} and {other!r}",
                "give all samples of a prompt the same, or leave it out",
            )
        merged[name] = given[0] if given else None
    return merged


def _first_of_equal(replies: Sequence[NewReply]) -> list[NewReply]:
    """Each text once, with the source of the first reply that has it."""
    found: dict[str, NewReply] = {}
    for reply in replies:
        found.setdefault(reply.text, reply)
    return list(found.values())


def refuse_second_questions(row: JsonDict, prompt: Prompt, replies: Sequence[str]) -> None:
    """Raises Mistake for a column with a question or options that neither the prompt nor a reply states: nobody who
    judges the replies would see it."""
    said = [*(message.content for message in prompt.messages), *replies]
    for name, value in row.items():
        if name != "prompt" and is_unstated(name, value, said):
            raise Mistake(
                "unused_question",
                f"{name} holds {shown(value)}, which is no part of the prompt, and would not be shown",
                f"put it into the prompt with --columns prompt=prompt+{name}, or leave it out with FILE?ignore={name}",
            )


def items_of_row(row: JsonDict, task: Task, options: Options) -> Iterator[NewItem]:
    """The items of one row, in any layout that holds all replies in one row. Raises Mistake and DataError."""
    row = with_plain_names(row)
    items = list(_items_of_row(row, task, options))
    replies = [reply.text for item in items for reply in item.replies]
    for prompt in {item.prompt.id: item.prompt for item in items}.values():
        refuse_second_questions(row, prompt, replies)
    return iter(items)


def _items_of_row(row: JsonDict, task: Task, options: Options) -> Iterator[NewItem]:
    kind = task.kind
    responses = _list_of_replies(row, kind)
    if row.get("response_a") is not None:
        comparison = to_comparison({**row, "choice": row["choice"] if row.get("choice") in ("A", "B") else "tie"})
        replies = [
            NewReply(text=text, source=_source(row) | _model(row, f"model_{side}"))
            for side, text in (("a", comparison.response_a), ("b", comparison.response_b))
        ]
        yield from _of_replies(comparison.prompt, replies, _with_gold(row, row.get("choice"), options), task, options)
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        pair = to_explicit_pair(row) if row.get("prompt") is not None else to_implicit_pair(row)
        # Which of the two is A must not reveal which was chosen, so their hashes decide.
        texts = sorted((pair.chosen, pair.rejected), key=reply_hash)
        row = _with_gold(row, "A" if texts[0] == pair.chosen else "B", options)
        replies = [NewReply(text=text, source=_source(row)) for text in texts]
        yield from _of_replies(pair.prompt, replies, row, task, options)
    elif responses is not None:
        prompt = _prompt(row)
        replies = [_reply(value, row) for value in responses]
        yield from _of_replies(prompt, replies, row, task, options)
    elif kind == "steps":
        steps = row.get("completions") or row.get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise Mistake("missing_field", "no steps", "give a list of texts in 'steps'")
        yield _item(_prompt(row), [NewReply(text=s, source=_source(row)) for s in steps], row, task, options)
    elif kind == "demonstration":
        yield _item(_prompt(row), [], row, task, options)
    else:
        demonstration = answered(row)
        reply = NewReply(text=demonstration.response, source=_source(row))
        yield from _of_replies(demonstration.prompt, [reply], row, task, options)


def _with_gold(row: JsonDict, choice: Any, options: Options) -> JsonDict:
    """The row. If a gold or quiz item names no expected answer, its choice becomes the expected answer."""
    if options.purpose == "task" or row.get("gold") not in (None, "") or not choice:
        return row
    return {**row, "gold": {"choice": choice}}


def _of_replies(
    prompt: Prompt, replies: Sequence[NewReply], row: JsonDict, task: Task, options: Options
) -> Iterator[NewItem]:
    """The items of some replies, by the kind that the project asks: every two, a ranking of all, or one for each."""
    fewest, most = NUM_REPLIES[task.kind]
    parts: list[tuple[int, ...]]
    if task.kind == "demonstration":
        parts = [()]
    elif task.kind == "pairs" and len(replies) > 2:
        parts = list(combinations(range(len(replies)), 2))
    elif most == 1:
        parts = [(i,) for i in range(len(replies))]
    elif len(replies) < fewest:
        raise Mistake("too_few_replies", f"{len(replies)} different replies", f"give at least {fewest} of each prompt")
    else:
        parts = [tuple(range(len(replies)))]
    if len(parts) > 1 and row.get("gold"):
        raise Mistake(
            "wrong_gold",
            f"one expected answer for the {len(parts)} items of {len(replies)} replies",
            "give each item a row of its own",
        )
    scores = _json(row, "scores", dict) or {}
    for name, values in scores.items():
        check_scores(name, values, len(replies), where="scores")
    for part in parts:
        of_part = {name: [values[i] for i in part] for name, values in scores.items()}
        yield _item(prompt, [replies[i] for i in part], {**row, "scores": of_part}, task, options)


def _item(prompt: Prompt, replies: Sequence[NewReply], row: Mapping[str, Any], task: Task, options: Options) -> NewItem:
    gold = _json(row, "gold", dict)
    return NewItem(
        kind=task.kind,
        prompt=prompt,
        replies=tuple(replies),
        purpose=options.purpose,
        gold=checked_gold(gold, num_replies=len(replies), task=task) if gold else {},
        slice=str(row.get("slice") or options.slice),
        sensitive=_truth(row, "sensitive"),
        author=str(row.get("author") or ""),
        scores=_json(row, "scores", dict) or {},
        given=_number(row, "priority"),
    )


def _json(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of a column, which may be JSON text as in CSV; None for an empty cell. Raises Mistake for another."""
    value = row.get(name)
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value) if value.strip() else None
    if value is None or isinstance(value, kind):
        return value
    examples = {
        "gold": 'an object such as {"choice": "A"}',
        "scores": 'an object such as {"reward-model": [0.3, -1.2]}',
        "responses": "a list of replies",
    }
    raise Mistake("wrong_type", f"{name!r} is {row[name]!r}", f"give {examples[name]}")


def _truth(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    text = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if text not in known:
        raise Mistake("wrong_type", f"{name!r} is {value!r}", "write true or false")
    return known[text]


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    try:
        number = 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Mistake("wrong_type", f"{name!r} is {value!r}", "give a finite number")
    return number


def _prompt(row: JsonDict) -> Prompt:
    """The prompt of a row that has no reply beside it."""
    if isinstance(row.get("messages"), list):
        return to_conversation_prompt(row)
    return to_demonstration({**row, "completion": "-"}).prompt


def _reply(value: Any, row: JsonDict) -> NewReply:
    if isinstance(value, str):
        return NewReply(text=value, source=_source(row))
    if isinstance(value, dict):
        for name in ("text", *TEXT_OF_REPLY):
            if isinstance(value.get(name), str):
                return NewReply(text=value[name], source=_source(row) | {k: v for k, v in value.items() if k != name})
    raise Mistake("wrong_type", f"a reply is {value!r}", 'give texts, or objects such as {"text": …, "model": …}')


def _source(row: Mapping[str, Any]) -> JsonDict:
    return {name: row[name] for name in _SOURCE_COLUMNS if row.get(name) is not None}


def _model(row: Mapping[str, Any], name: str) -> JsonDict:
    return {"model": row[name]} if row.get(name) is not None else {}


def _from_world(source: str, kind: Kind) -> Iterator[tuple[str, NewItem]]:
    """Items of a world: its prompts, with replies from its grammar."""
    prompts = cast("list[Prompt]", read_world(source, demonstrations=False))
    name, _, query = source.removeprefix("world:").partition("?")
    seed = int(dict(parse_qsl(query)).get("seed", "0"))
    world = worlds.load(name)
    made_by = {"model": f"world:{name}", "seed": seed}
    fewest, most = NUM_REPLIES[kind]
    for i, prompt in enumerate(prompts):
        texts = list(dict.fromkeys(world.replies(prompt, 16, seed=seed)))
        if kind == "steps":
            texts = [f"{part.strip()}." for part in texts[0].split(".") if part.strip()]
        replies = tuple(NewReply(text=text, source=made_by) for text in texts[: 4 if kind == "ranking" else most])
        if len(replies) >= fewest:
            yield f"{source}, prompt {i + 1}", NewItem(kind=kind, prompt=prompt, replies=replies)


# --- the project's own data ---


def _beside(directory: Path, source: str) -> str:
    """The source with its paths relative to the project's directory; a world or a data set of the hub as it is."""
    files, mark, options = source.partition("?")
    if (directory / source).exists():
        return str(directory / source)
    if is_world(source) or (is_hub(source) and not (directory / files).exists()):
        return source
    return ",".join(str(directory / file.strip()) for file in files.split(",")) + mark + options


def seed_items(store: Store) -> dict[str, int]:
    """Imports what the store does not have yet of the project's own `data`; returns counts of what was done.

    A source is noted with the hash of its content only after its last item was added. The next start therefore
    completes an import that was cut short, and a file that has grown adds what is new.
    """
    total: dict[str, int] = {}
    for source in store.project.settings.data:
        named = _beside(store.project.directory, source)
        done = "whole" if is_world(source) or is_hub(named) else stream_rows(named).sha256
        name = f"data:{source}"
        with store.read() as connection:
            known = connection.execute(sa.select(t.facts.c.value).where(t.facts.c.name == name)).scalar()
        if known == done:
            continue
        for counted, num in import_source(store, named).items():
            total[counted] = total.get(counted, 0) + num
        with store.write() as connection:
            connection.execute(t.facts.delete().where(t.facts.c.name == name))
            connection.execute(t.facts.insert().values(name=name, value=done))
    return total
