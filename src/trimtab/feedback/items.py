"""Items: what people judge. An item never changes once it is added, and the same question is one item."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from trimtab.core.errors import DataError
from trimtab.core.types import JsonDict, Prompt, from_dict, to_dict
from trimtab.feedback import tables as t
from trimtab.feedback.answers import MAX_WRITING
from trimtab.feedback.project import AssignmentPolicy, Kind
from trimtab.feedback.store import (
    AuditEntry,
    Store,
    append_audit,
    append_audits,
    checked_values,
    digest,
    is_paused,
    row_digest,
)

Purpose = Literal["task", "gold", "quiz"]
NUM_REPLIES: Mapping[Kind, tuple[int, int]] = {
    "pairs": (2, 2),
    "ranking": (2, 9),
    "rating": (1, 1),
    "steps": (1, 200),
    "demonstration": (0, 0),
    "edit": (1, 1),
}
"""Fewest and most replies of an item of each kind; the "replies" of a steps item are its steps."""
CHUNK = 500
"""Rows that are added in one transaction."""


@dataclass(frozen=True, kw_only=True)
class NewReply:
    """A reply and its source: model, checkpoint, sampling parameters, seed, or a person. The source is never shown."""

    text: str
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """An item to add, such as a prompt with two replies for the kind "pairs"."""

    kind: Kind
    prompt: Prompt
    replies: tuple[NewReply, ...]
    purpose: Purpose = "task"
    gold: Mapping[str, Any] = field(default_factory=dict)
    """The expected answer of a gold or quiz item, such as {"choice": "A"}."""
    slice: str = ""
    """Name of a part of the data that is reported by itself."""
    sensitive: bool = False
    """Whether people may opt out of it."""
    author: str = ""
    """Who wrote the prompt; empty if that is not known."""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Scores of the replies for each reward model, such as {"reward-model": [0.3, -1.2]}."""
    given: float = 0.0
    """The item's score under the policy "given"."""

    def refuse(self, where: str) -> None:
        """Raises DataError for an item that cannot be asked."""
        fewest, most = NUM_REPLIES[self.kind]
        if not fewest <= len(self.replies) <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise DataError(
                f"{len(self.replies)} replies where {self.kind} needs {wanted}",
                where=where,
                fix="give that many, or set [task] kind to what the file holds",
            )
        for value in (
            *(m.content for m in self.prompt.messages), *(r.text for r in self.replies), self.prompt.id,
            self.prompt.facts, *(r.source for r in self.replies), self.gold, self.slice, self.author,
        ):  # fmt: skip
            checked_values(value, where=where)
        if self.kind == "edit" and (longest := max(len(r.text) for r in self.replies)) > MAX_WRITING:
            fix = f"give replies of at most {MAX_WRITING} letters, as many as an edited one may have"
            raise DataError(f"a reply of {longest} letters to edit", where=where, fix=fix)
        if any(not r.text.strip() for r in self.replies):
            raise DataError("an empty reply", where=where, fix="remove the row, or the reply")
        if self.kind in ("pairs", "ranking") and len({r.text for r in self.replies}) < len(self.replies):
            raise DataError("the same reply twice", where=where, fix="remove one of them; nobody can choose")
        if self.purpose != "task" and not self.gold:
            raise DataError(f"a {self.purpose} item without an expected answer", where=where, fix="add a column 'gold'")
        for name, scores in self.scores.items():
            check_scores(name, scores, len(self.replies), where=where)
        if not math.isfinite(self.given):
            raise DataError(f"the score {self.given!r}", where=where, fix="give a finite number")


def check_scores(name: str, scores: Any, num_replies: int, *, where: str) -> None:
    """Raises DataError unless the scores are one finite number for each reply."""
    known = isinstance(scores, list | tuple) and all(
        isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores
    )
    if not known or len(scores) != num_replies:
        raise DataError(
            f"{name!r} gives the scores {scores!r} for {num_replies} replies",
            where=where,
            fix='give one finite score for each reply, such as {"reward-model": [0.3, -1.2]}',
        )


def add_items(store: Store, new: Iterable[tuple[str, NewItem]], *, actor: int | None = None) -> dict[str, int]:
    """Adds items; returns how many were read, added, and left out because the store has them already.

    Each item comes with its origin, for messages. The first item that cannot be asked raises DataError that says so,
    before anything of its chunk is added.
    """
    counts = {"items": 0, "added": 0, "dropped_known_item": 0}
    pending: list[NewItem] = []
    for where, item in new:
        item.refuse(where)
        counts["items"] += 1
        pending.append(item)
        if len(pending) == CHUNK:
            _add(store, pending, counts, actor)
            pending = []
    _add(store, pending, counts, actor)
    return counts


def _add(store: Store, pending: list[NewItem], counts: dict[str, int], actor: int | None) -> None:
    now = store.now()
    rows: dict[str, JsonDict] = {}
    items: dict[str, NewItem] = {}
    for item in pending:
        row = item_row(item, now)
        rows.setdefault(row["sha256"], row)
        items.setdefault(row["sha256"], item)
    with store.write() as connection:
        known = connection.execute(sa.select(t.items.c.sha256).where(t.items.c.sha256.in_(rows))).scalars().all()
        for sha256 in known:
            del rows[sha256]
        counts["dropped_known_item"] += len(pending) - len(rows)
        counts["added"] += len(rows)
        if not rows:
            return
        connection.execute(t.items.insert(), list(rows.values()))
        added = connection.execute(sa.select(t.items).where(t.items.c.sha256.in_(rows)).order_by(t.items.c.id)).all()
        append_audits(
            connection, [AuditEntry(now, actor, "item", row.id, {"sha256": row_digest(row)}) for row in added]
        )
        is_open = not is_paused(connection)
        queued = [
            _queue_row(row.id, items[row.sha256], store, is_open=is_open) for row in added if row.purpose == "task"
        ]
        if queued:
            connection.execute(t.queue.insert(), queued)


def _queue_row(item_id: int, item: NewItem, store: Store, *, is_open: bool) -> JsonDict:
    settings = store.project.settings.assignment
    return {
        "item_id": item_id,
        "cap": settings.overlap,
        "open": is_open,
        "scores": {name: list(scores) for name, scores in item.scores.items()},
        "author": item.author,
        "given": item.given,
        "score": policy_score(settings.policy, item.scores, item.given),
    }


def item_row(item: NewItem, at: float) -> JsonDict:
    """The item as a row of the table."""
    replies = [{"text": r.text, "sha256": reply_hash(r.text), "source": dict(r.source)} for r in item.replies]
    prompt = to_dict(item.prompt)
    return {
        "sha256": _identity(item),
        "kind": item.kind,
        "purpose": item.purpose,
        "prompt_id": item.prompt.id,
        "prompt": prompt,
        "replies": replies,
        "gold": dict(item.gold),
        "slice": item.slice,
        "sensitive": item.sensitive,
        "created_at": at,
    }


def _identity(item: NewItem) -> str:
    """The hash of what is asked: two rows that ask the same are one item.

    Only the messages of the prompt count, since rows often have an id each. Replies that are compared count as a set:
    calling another of them A does not make another question.
    """
    texts = [r.text for r in item.replies]
    gold = dict(item.gold)
    if item.kind in ("pairs", "ranking"):
        if gold.get("choice") in ("A", "B"):
            gold["choice"] = reply_hash(texts["AB".index(gold["choice"])])
        if "ranking" in gold:
            gold["ranking"] = [sorted(reply_hash(texts[place]) for place in tier) for tier in gold["ranking"]]
        texts = sorted(texts)
    return digest([item.kind, item.purpose, [[m.role, m.content] for m in item.prompt.messages], texts, gold])


def reply_hash(text: str) -> str:
    """Sixteen hex digits that name a reply."""
    return digest(text)[:16]


def prompt_of(row: Row[Any]) -> Prompt:
    """The prompt of an item's row."""
    return from_dict(Prompt, row.prompt)


def set_scores(store: Store, scores: Mapping[str, Mapping[str, Sequence[float]]], *, actor: int | None = None) -> int:
    """Stores reward-model scores by the items' hashes; returns how many items had new ones.

    The policy uses them at once. Scores of other models that an item has already stay.
    """
    checked_values(scores, where="the scores")
    num = 0
    policy = store.project.settings.assignment.policy
    with store.write() as connection:
        asked = sa.select(t.items, t.queue.c.given, t.queue.c.scores).join(t.queue)
        hashes = list(scores)
        parts = (hashes[start : start + CHUNK] for start in range(0, len(hashes), CHUNK))  # a statement names so many
        for row in chain.from_iterable(connection.execute(asked.where(t.items.c.sha256.in_(p))).all() for p in parts):
            for name, values in scores[row.sha256].items():
                check_scores(name, values, len(row.replies), where=f"item {row.sha256}")
            new = {**row.scores, **scores[row.sha256]}
            value = policy_score(policy, new, row.given)
            connection.execute(t.queue.update().where(t.queue.c.item_id == row.id).values(scores=new, score=value))
            num += 1
        append_audit(connection, store.now(), actor, "scores", "", {"items": num, "sha256": digest(scores)})
    return num


def apply_settings(store: Store) -> None:
    """Applies the overlap and the policy of the project file to the queue. Changes are logged."""
    settings = store.project.settings.assignment
    with store.write() as connection:
        changed = connection.execute(
            t.queue.update().where(t.queue.c.cap != settings.overlap).values(cap=settings.overlap)
        ).rowcount
        for row in connection.execute(sa.select(t.queue)).all():
            value = policy_score(settings.policy, row.scores, row.given)
            if value != row.score:
                connection.execute(t.queue.update().where(t.queue.c.item_id == row.item_id).values(score=value))
                changed += 1
        if changed:
            detail = {"overlap": settings.overlap, "policy": settings.policy, "items": changed}
            append_audit(connection, store.now(), None, "assignment", "", detail)


# --- which items a policy asks for ---


def policy_score(policy: AssignmentPolicy, scores: Mapping[str, Sequence[float]], given: float) -> float:
    """How much a policy wants an item: the score of the pair of its replies that the policy wants most.

    Let d_m be the difference of two replies under reward model m, and s the logistic function. Then uncertainty is
    1 - 2 |s(mean d) - 1/2|, disagreement is 4 times the variance of s(d_m), and bald is the entropy (in bits) of the
    mean of s(d_m) minus the mean of their entropies (Houlsby et al., arXiv:1112.5745, eq. 2). All lie in [0, 1], and
    are 0 without scores.
    """
    if policy == "given":
        return given
    if policy == "random" or not scores:
        return 0.0
    pairs = combinations(range(len(next(iter(scores.values())))), 2)
    differences = ([values[i] - values[j] for values in scores.values()] for j, i in pairs)
    return max([0.0, *(_pair_score(policy, of_pair) for of_pair in differences)])


def _pair_score(policy: AssignmentPolicy, differences: Sequence[float]) -> float:
    chances = [_logistic(d) for d in differences]
    mean = sum(chances) / len(chances)
    if policy == "uncertainty":
        return 1 - 2 * abs(_logistic(sum(differences) / len(differences)) - 0.5)
    if policy == "disagreement":
        return 4 * sum((p - mean) ** 2 for p in chances) / len(chances)
    return max(0.0, _entropy(mean) - sum(map(_entropy, chances)) / len(chances))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def search_items(connection: Connection, *, limit: int, offset: int = 0) -> list[Row[Any]]:
    """Items with the state of their queue, in the order in which they were added."""
    rows = sa.select(t.items, t.queue.c.cap, t.queue.c.taken, t.queue.c.open).outerjoin(t.queue).order_by(t.items.c.id)
    return list(connection.execute(rows.limit(limit).offset(offset)))
