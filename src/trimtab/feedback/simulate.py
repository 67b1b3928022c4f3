"""Simulated annotators of a world vote through the store, with the same leases and rows as people."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import sqlalchemy as sa

from trimtab import worlds
from trimtab.core import seeds
from trimtab.core.errors import DataError
from trimtab.core.types import Prompt
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.assign import next_lease
from trimtab.feedback.items import prompt_of
from trimtab.feedback.people import Person, add_person, by_name
from trimtab.feedback.store import Store
from trimtab.feedback.voting import vote
from trimtab.worlds.annotators import Annotators, calibrate

_CALIBRATION_PAIRS = 500


def simulate(
    store: Store,
    *,
    world_name: str = "helpdesk",
    num_annotators: int = 20,
    agreement: float = 0.7,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Has simulated annotators answer until nothing is left, or `limit` answers; returns counts.

    They answer pairs and rankings. In a ranking, each votes on every pair of replies and orders the replies by how many
    votes they win. Raises DataError for a project of another kind, and for prompts that are of no world.
    """
    if store.project.settings.task.kind not in ("pairs", "ranking"):
        raise DataError(
            f"simulated annotators do not answer {store.project.settings.task.kind!r}",
            where=str(store.project.path),
            fix="use a project of pairs or ranking",
        )
    world = worlds.load(world_name)
    store = replace(store, durable=False)
    with store.read() as connection:
        rows = connection.execute(sa.select(t.items).order_by(t.items.c.id).limit(_CALIBRATION_PAIRS)).all()
    if strange := next((row for row in rows if not row.prompt["facts"]), None):
        raise DataError(
            f"the prompt {prompt_of(strange).text[:60]!r} does not say which replies are right",
            where=str(store.project.path),
            fix=f"simulated annotators vote by a world's true reward: give the project its items, world:{world_name}",
        )
    pairs = [(prompt_of(row), row.replies[0]["text"], row.replies[1]["text"]) for row in rows]
    people = calibrate(world, world.biases, pairs, agreement=agreement)
    crowd = [_person(store, f"simulated {i + 1}") for i in range(num_annotators)]
    num, waiting = 0, list(range(num_annotators))
    while waiting and (limit is None or num < limit):
        i = waiting.pop(0)
        with store.write(durable=False) as connection:
            lease = next_lease(store, connection, crowd[i])
            if lease is None:
                continue
            row = connection.execute(sa.select(t.items).where(t.items.c.id == lease.item_id)).one()
        answer = _answer(people, row, i, seed, store.project.settings.task.scale)
        vote(store, crowd[i], lease.token, answer, measured=True)
        num += 1
        waiting.append(i)
    return {"answers": num, "annotators": num_annotators}


def _person(store: Store, name: str) -> Person:
    with store.write() as connection:
        return by_name(connection, name) or add_person(connection, store.now(), name, "annotator")


def _answer(people: Annotators, row: Any, annotator: int, seed: int, scale: int) -> Answer:
    prompt, texts = prompt_of(row), [reply["text"] for reply in row.replies]
    # A vote takes a second, and a third of a second for each word, times a random factor of 0.5 to 1.5.
    luck = seeds.generator(seed, "seconds", annotator, row.id).uniform(0.5, 1.5)
    seconds = float(luck * (1 + sum(len(text.split()) for text in texts) / 3))
    if row.kind == "ranking":
        wins = [
            sum(
                people.vote(prompt, texts[a], texts[b], annotator=annotator, seed=seed) == "A"
                for b in range(len(texts))
                if b != a
            )
            for a in range(len(texts))
        ]
        order = sorted(range(len(texts)), key=lambda place: -wins[place])
        ranking = tuple(tuple(tier) for _, tier in groupby(order, key=lambda place: wins[place]))
        return Answer(choice="done", ranking=ranking, seconds=seconds)
    choice = people.vote(prompt, texts[0], texts[1], annotator=annotator, seed=seed)
    return Answer(choice=choice, strength=_strength(people, prompt, texts, scale), seconds=seconds)


def _strength(people: Annotators, prompt: Prompt, texts: list[str], scale: int) -> int:
    """The strength of a vote: how sure the crowd is, in even grades from a probability of one half to certainty."""
    grades = max(1, scale // 2)
    p = people.preference_probability(prompt, texts[0], texts[1])
    return min(grades, 1 + int(2 * (max(p, 1 - p) - 0.5) * grades))
