"""Projects and people for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.core import config
from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.data.layouts import load
from trimtab.feedback import items, people
from trimtab.feedback.answers import Answer
from trimtab.feedback.assign import Lease, next_lease
from trimtab.feedback.people import Person
from trimtab.feedback.project import Kind
from trimtab.feedback.store import Store, open_store
from trimtab.feedback.voting import Receipt, vote

PASSWORD = "a long enough phrase"


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


def make_project(directory: Path, values: dict[str, Any] | None = None) -> Path:
    path = directory / "project.toml"
    path.write_text(config.to_toml({"name": "Test", **(values or {})}), encoding="utf-8")
    return path


def make_store(directory: Path, values: dict[str, Any] | None = None) -> Store:
    store = open_store(make_project(directory, values))
    store.clock = Clock()
    store.durable = False  # tests need not survive a power cut
    return store


def prompt(i: int) -> Prompt:
    return Prompt(messages=(Message("user", f"question {i}"),))


def item(i: int, *, kind: Kind = "pairs", num: int = 2, **more: Any) -> items.NewItem:
    replies = tuple(
        items.NewReply(text=f"reply {i}.{k}", source={"model": f"model-{k}", "seed": i}) for k in range(num)
    )
    return items.NewItem(kind=kind, prompt=prompt(i), replies=replies, **more)


def add(store: Store, count: int, *, first: int = 0, **more: Any) -> None:
    items.add_items(store, [(f"row {i}", item(i, **more)) for i in range(first, first + count)])


def person(store: Store, name: str, role: people.PersonRole = "annotator") -> Person:
    with store.write() as connection:
        return people.add_person(connection, store.now(), name, role)


def lease(store: Store, someone: Person) -> Lease | None:
    with store.write() as connection:
        return next_lease(store, connection, people.by_id(connection, someone.id))


def answer_next(store: Store, someone: Person, answer: Answer | None = None) -> Receipt | None:
    given = lease(store, someone)
    if given is None:
        return None
    return vote(store, someone, given.token, answer or Answer(choice="A", strength=1))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answered(store: Store, *answers: Answer) -> None:
    """Each answer by another person, on the one item."""
    for i, answer in enumerate(answers):
        answer_next(store, person(store, f"p{i}"), answer)


def pairs_of(store: Store, split: str = "all") -> list[PreferencePair]:
    return load(PreferencePair, f"feedback:{store.project.path}?split={split}").records


A, B = Answer(choice="A", strength=1), Answer(choice="B", strength=1)
TIE, BAD = Answer(choice="tie"), Answer(choice="both_bad")
