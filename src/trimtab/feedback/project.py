"""A project: what is asked of whom, as one typed file. A wrong file is refused with every mistake in one message."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from trimtab.core import config
from trimtab.core.errors import ConfigError

Kind = Literal["pairs", "ranking", "rating", "steps", "demonstration", "edit"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AssignmentPolicy = Literal["random", "uncertainty", "disagreement", "bald", "given"]
Event = Literal["vote", "item_done", "adjudicated", "person_joined", "person_state", "guideline"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked."""

    kind: Kind = "pairs"
    """pairs, ranking (K replies with ties), rating (thumbs or Likert), steps, demonstration or edit (of a reply)."""
    question: str = ""
    """The question above the replies; empty takes the usual one of the kind."""
    scale: Literal[2, 4, 5, 6, 7, 8] = 2
    """Number of answers for a pair, from far left to far right (keys 1 to 8); the middle of an odd scale is the tie."""
    ties: bool = True
    """Offer "equally good" on an even scale, and ties in rankings."""
    both_bad: bool = True
    """Offer "both bad", which is a different answer from a tie."""
    cannot_judge: bool = True
    """Offer "cannot judge", which is no preference at all."""
    rating_scale: Literal[2, 3, 4, 5, 6, 7] = 2
    """Points of a rating: 2 is thumb down and up, 7 is Likert."""
    flags: tuple[str, ...] = ()
    """Remarks that can be ticked, such as "wrong language" or "harmful"."""
    criteria: tuple[str, ...] = ()
    """Aspects that are asked of a pair besides the overall question; each is answered left, same or right."""
    rationale: Literal["off", "optional", "required"] = "optional"
    """Whether to ask for the reason in words."""
    auto_advance: bool = True
    """One key answers and shows the next task; otherwise Enter confirms. Undo takes back either."""
    guideline: str = "guideline.md"
    """Markdown file beside the project; its first version is stored when the project is opened."""
    content_warning: str = ""
    """Shown before the first task; items marked sensitive can then be opted out of."""
    break_minutes: int = 45
    """Suggest a break after this long without one; 0 never does."""

    def __post_init__(self) -> None:
        if len(set(self.flags)) < len(self.flags) or len(set(self.criteria)) < len(self.criteria):
            raise ValueError("the same name twice in flags or criteria")
        if any(not name.strip() or len(name) > 60 for name in (*self.flags, *self.criteria)):
            raise ValueError("an empty name, or one of more than 60 letters, in flags or criteria")
        if self.break_minutes < 0:
            raise ValueError(f"break_minutes = {self.break_minutes}; use 0 for never")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who gets which item next."""

    overlap: int = 1
    """People who answer each item: a hard cap, however many ask at once. It can be changed at any time; a
    server takes it up when it starts."""
    lease_minutes: float = 30.0
    """An item that was given out and not answered is given to somebody else after this many minutes."""
    policy: AssignmentPolicy = "random"
    """How items outside the random arm are chosen: at random, by what the reward models do not know (uncertainty,
    disagreement, bald), or by a given score."""
    random_arm: float = 0.2
    """Share of items chosen at random under any policy: unbiased estimates and comparisons of arms need it."""
    temperature: float = 0.1
    """Softness of the policy: it chooses an item with probability proportional to exp(score / temperature)."""
    finish_started: bool = True
    """Complete the votes of items already begun before beginning others."""
    gold_rate: float = 0.0
    """Share of tasks that are hidden gold items, which look like any other."""
    reask_rate: float = 0.0
    """Share of tasks that repeat a person's earlier item with the sides swapped, to measure self-consistency."""
    max_per_day: int = 0
    """Answers a person may give in 24 hours; 0 sets no limit."""
    own_prompts: bool = True
    """Whether the author of a prompt may judge replies to it."""
    seed: int = 0
    """Seed of the order of items and sides."""

    def __post_init__(self) -> None:
        if self.overlap < 1:
            raise ValueError(f"overlap = {self.overlap}; at least one person answers")
        for name in ("random_arm", "gold_rate", "reask_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}; a share lies in [0, 1]")
        if self.gold_rate + self.reask_rate > 0.5:
            raise ValueError("gold_rate and reask_rate together exceed a half of all tasks")
        if self.temperature <= 0 or self.lease_minutes <= 0:
            raise ValueError("temperature and lease_minutes must be above 0")


@dataclass(frozen=True, kw_only=True)
class Qualification:
    """A quiz before the first task, on items imported with --quiz."""

    questions: int = 0
    """Questions asked of each person; 0 asks none."""
    pass_mark: float = 0.8
    """Share that must agree with the expected answers."""

    def __post_init__(self) -> None:
        if self.questions < 0 or not 0 < self.pass_mark <= 1:
            raise ValueError("questions must not be negative and pass_mark lies in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How votes become training data."""

    rule: Literal["share", "majority", "dawid_skene", "one_coin", "mace"] = "share"
    """share: soft labels from the votes; majority: hard ones; the others weigh annotators by how reliable they are."""
    ties: Literal["half", "drop"] = "half"
    """Whether a tie is half a vote for each side or is left out."""
    both_bad: Literal["tie", "drop"] = "drop"
    """Whether "both bad" counts as a tie or is left out."""
    min_votes: int = 1
    """Items with fewer votes are left out and counted, but not from comparisons and demonstrations, which are single
    answers."""
    min_agreement: float = 0.5
    """Pairs whose preferred side has a smaller share are left out and counted."""
    margins: tuple[float, ...] = ()
    """Margin for each strength from weakest to strongest; empty writes no margins."""
    positive_from: float = 0.5
    """A reply is labelled true if its mean rating, scaled to [0, 1], is above this."""
    held_out_prompts: float = 0.1
    """Share of prompts that are in "?split=held_out" and never in "?split=train"."""
    held_out_annotators: float = 0.0
    """Share of people whose votes are never in "?split=train", only in "?split=held_out": does the model predict people
    it never met?"""

    def __post_init__(self) -> None:
        for name in ("min_agreement", "positive_from", "held_out_prompts", "held_out_annotators"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}; a share lies in [0, 1]")
        if self.min_votes < 1:
            raise ValueError(f"min_votes = {self.min_votes}; a label needs a vote")
        if list(self.margins) != sorted(self.margins) or any(m < 0 for m in self.margins):
            raise ValueError("margins must not be negative, and rise with the strength")


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """An address that is told what happens."""

    url: str
    """Where a JSON body is posted."""
    secret_env: str
    """Environment variable that holds the key of the signature in X-Trimtab-Signature."""
    events: tuple[Event, ...] = ("item_done", "adjudicated")
    """The events that it is told of."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the webhook address {self.url!r} does not begin with http:// or https://")


@dataclass(frozen=True, kw_only=True)
class Server:
    """The web server."""

    host: str = "127.0.0.1"
    """Address to listen on: this machine only, unless said otherwise."""
    port: int = 8765
    """Port to listen on."""
    names: tuple[str, ...] = ()
    """Host names it is reached by besides localhost; requests for others are refused."""
    https: bool = False
    """Whether people reach it by https, through a proxy that ends TLS: cookies are then marked secure."""
    session_hours: float = 168.0
    """A session ends this long after signing in."""
    idle_hours: float = 12.0
    """A session ends after this long without a request."""
    requests_per_minute: int = 240
    """Requests of one session; more are answered with 429."""
    sign_ins_per_minute: int = 10
    """Attempts to sign in or join from one address."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port = {self.port}; ports are 1 to 65535, 0 takes a free one")
        if min(self.session_hours, self.idle_hours, self.requests_per_minute, self.sign_ins_per_minute) <= 0:
            raise ValueError("hours and limits must be above 0")


_EXPECTED: tuple[Kind, ...] = ("pairs", "ranking", "rating", "steps")
"""Kinds to which an answer can be expected."""
_ONLY_FOR: Mapping[tuple[str, str], tuple[Kind, ...]] = {
    ("task", "scale"): ("pairs",),
    ("task", "criteria"): ("pairs",),
    ("task", "rating_scale"): ("rating",),
    ("assignment", "gold_rate"): _EXPECTED,
    ("assignment", "reask_rate"): ("pairs",),
    ("qualification", "questions"): _EXPECTED,
    ("labels", "rule"): ("pairs", "ranking"),
    ("labels", "margins"): ("pairs",),
    ("labels", "positive_from"): ("rating",),
}
"""Settings that do something for some kinds only: for the others they are refused."""


@dataclass(frozen=True, kw_only=True)
class ProjectSettings:
    """Settings of a feedback project."""

    name: str = "Feedback"
    """Title of every page."""
    store: str = "feedback.sqlite"
    """SQLite file beside the project, a postgresql:// URL, or "env:NAME" to read the URL from the environment."""
    data: tuple[str, ...] = ()
    """Sources imported when the store is first made; `trimtab feedback import` adds more."""
    task: Task = field(default_factory=Task)
    """What is asked."""
    assignment: Assignment = field(default_factory=Assignment)
    """Who gets which item next."""
    qualification: Qualification = field(default_factory=Qualification)
    """The quiz before the first task."""
    labels: LabelSettings = field(default_factory=LabelSettings)
    """How votes become training data."""
    server: Server = field(default_factory=Server)
    """The web server."""
    webhooks: tuple[Webhook, ...] = ()
    """Addresses that are told what happens."""

    def __post_init__(self) -> None:
        kind = self.task.kind
        for (table, name), kinds in _ONLY_FOR.items():
            part = getattr(self, table)
            if kind not in kinds and getattr(part, name) != getattr(type(part)(), name):
                raise ValueError(f"{table}.{name} is for {' and '.join(kinds)}, and does nothing where kind = {kind!r}")
        if kind in ("demonstration", "edit") and self.task.rationale == "required":
            raise ValueError(f"task.rationale: no reason is asked for where kind = {kind!r}")
        if self.labels.margins and len(self.labels.margins) != self.task.scale // 2:
            num = self.task.scale // 2
            raise ValueError(f"labels.margins has {len(self.labels.margins)} for the {num} strengths of this scale")
        keys: dict[str, str] = {}
        for hook in self.webhooks:
            if keys.setdefault(hook.url, hook.secret_env) != hook.secret_env:
                both = f"{keys[hook.url]} and {hook.secret_env}"
                raise ValueError(f"the webhook address {hook.url} has the keys {both}; an address has one")


@dataclass(frozen=True)
class Project:
    """A project file and what it says."""

    path: Path
    settings: ProjectSettings

    @property
    def directory(self) -> Path:
        """The directory of the file, where its relative paths begin."""
        return self.path.parent

    @property
    def store_url(self) -> str:
        """The URL of the database for SQLAlchemy. Raises ConfigError for an environment variable that is not set."""
        text = secret(self.settings.store, where=f"{self.path}, store")
        if text.startswith(("postgresql://", "postgres://")):
            return "postgresql+psycopg://" + text.partition("://")[2]
        if "://" in text:
            raise ConfigError(
                f"the store {text.partition('://')[0]}://… is of no known type",
                where=f"{self.path}, store",
                fix="name a file such as feedback.sqlite, or a postgresql:// URL",
            )
        return f"sqlite:///{(self.directory / text).resolve()}"

    @property
    def guideline_path(self) -> Path:
        """The guideline file, which need not be there."""
        return self.directory / self.settings.task.guideline

    @property
    def sha256(self) -> str:
        """SHA-256 of the settings that decide what is collected and derived, without addresses and secrets."""
        values = dataclasses.asdict(self.settings)
        kept = {k: v for k, v in values.items() if k not in ("store", "server", "webhooks", "data")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def guideline_text(self) -> str:
        """The guideline file, or one line if there is none. Raises ConfigError if the project names a file that is not
        there."""
        path = self.guideline_path
        if path.is_file():
            return read_guideline(path)
        if self.settings.task.guideline != Task.guideline:
            where = f"{self.path}, task.guideline"
            raise ConfigError(f"there is no file {str(path)!r}", where=where, fix="write it, or correct the name")
        return "Answer as you would for yourself."


def read_guideline(path: Path) -> str:
    """The text of a guideline file. Raises ConfigError if it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = f"the guideline cannot be read: {error.strerror}"
        raise ConfigError(problem, where=str(path), fix="name a file of Markdown") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the guideline is not UTF-8 text: {error.reason}", where=str(path), fix="save it as UTF-8"
        ) from None


def load_project(path: str | Path) -> Project:
    """The project of a TOML file. Raises ConfigError that lists every mistake."""
    path = Path(path)
    return Project(path, config.resolve(ProjectSettings, config.load_run_file(path), where=str(path)))


def secret(text: str, *, where: str) -> str:
    """The text, or for "env:NAME" the value of that environment variable, which never enters a message.

    Raises ConfigError if the variable is not set.
    """
    if not text.startswith("env:"):
        return text
    name = text.removeprefix("env:")
    value = os.environ.get(name)
    if not value:
        raise ConfigError(
            f"the environment variable {name!r} is not set", where=where, fix=f"export {name}=… before the command"
        )
    return value
