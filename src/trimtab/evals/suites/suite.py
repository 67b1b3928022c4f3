"""The descriptor of a suite: what is read, what a model is asked, how its answers are scored, and what is reported.

A suite is a file with functions `read` and `score` and, at its end,

    SUITE = Suite(paper="arXiv:…", files=("set/rows.jsonl.gz",), hub=("hub:org/set?split=test",), read=read,
                  score=score, metrics=(SuiteMetric("accuracy", "share of right answers"),))

and a line in the registry's table that gives it a name. The first line of the file is its line of help. Scoring is a
pure function of an item and its answers, so the answers of null models can be scored too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab.core import registry, seeds
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.hub import same_model
from trimtab.core.types import Message, prompt_id
from trimtab.data.files import Located
from trimtab.data.sources import is_hub, read_rows

ItemScores = Mapping[str, Sequence[float]]
"""The values that one item adds to each metric, such as `{"accuracy": [1.0]}`. A metric may get several values, or
none from an item that says nothing about it; its figure is the mean of all values."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked, for example `Question(turns=("Is 7 prime?",), options=("Yes", "No"))`."""

    turns: tuple[str, ...]
    """User turns. Each is asked after the reply to the one before; with options the likeliest option is the reply."""
    options: tuple[str, ...] = ()
    """Replies whose log-probabilities are wanted, the same for every turn. Without options a reply is generated."""
    num_samples: int = 1
    """Generated replies; more than one only for a single turn."""

    def __post_init__(self) -> None:
        assert self.turns, "a question without a turn"
        assert self.num_samples == 1 or (len(self.turns) == 1 and not self.options), "samples of several turns"


@dataclass(frozen=True, kw_only=True)
class SuiteAnswer:
    """What a model answered to a question."""

    replies: tuple[str, ...] = ()
    """The generated replies: one for each turn, or the samples of a single turn."""
    num_truncated: int = 0
    """Generated replies that ran into the limit of tokens."""
    logprobs: tuple[tuple[float, ...], ...] = ()
    """For each turn the log-probability of each option, summed over its tokens without the end token."""
    num_tokens: tuple[int, ...] = ()
    """The tokens of each option."""


@dataclass(frozen=True, kw_only=True)
class SuiteItem:
    """One item: usually one question, several if a score compares answers."""

    id: str
    questions: tuple[Question, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the scoring needs, for example {"answer": "72"}."""
    cluster: str = ""
    """Items of one cluster are not independent: `prompt_id` of the first turn, unless the suite gives another."""

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", prompt_id([Message("user", self.questions[0].turns[0])]))


@dataclass(frozen=True)
class SuiteMetric:
    """A figure that a suite reports: the mean of the values under its name."""

    name: str
    about: str
    """What it is, in the words of a table."""
    better: Literal["higher", "lower", "neither"] = "higher"
    """Which way is better; "neither" for a figure that describes."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite, as the command, the runner and the pages read it."""

    paper: str
    """Where it was published."""
    files: tuple[str, ...]
    """Its files below the folder of data, packed or not; a "*" stands for any name."""
    hub: tuple[str, ...]
    """The same as hub data sets."""
    read: Callable[[Sequence[Located]], list[SuiteItem]]
    """The items of the rows, each with its place. Raises DataError for a row that it cannot read."""
    score: Callable[[SuiteItem, Sequence[SuiteAnswer]], ItemScores]
    """The values of one item, from its answers in the order of its questions."""
    metrics: tuple[SuiteMetric, ...]
    """What is reported; the first is the suite's figure for the capability tax. Values under further names, such as
    "accuracy/honest", are slices and are reported too."""
    max_new_tokens: int = 512
    """The limit of a generated reply, if the command gives none."""
    temperature: float = 0.0
    """Of generated replies; 0 takes the likeliest token. A suite that asks for options leaves it at 0."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures has to know; printed and kept with them."""


@dataclass(frozen=True, kw_only=True)
class SuiteData:
    """The items of a suite, and where they came from."""

    items: list[SuiteItem]
    sources: dict[str, str]
    """SHA-256 of each source that was read."""
    num_available: int
    """Items before the limit."""


def load_suite(name: str) -> Suite:
    """The suite with this name. Raises ConfigError with the nearest known name if there is none."""
    known = registry.modules("suite")
    if name not in known:
        raise registry.unknown_name("suite", name, known, where="the command line")
    suite: Suite = registry.descriptor("suite", name)
    return suite


def load_items(suite: Suite, data: str | None, *, limit: int | None = None, seed: int = 0) -> SuiteData:
    """The items of a suite from a folder (see `Suite.files`), from any source that `read_rows` reads, or without `data`
    from the hub. With `limit`, so many are drawn at random by the seed, in their order.

    Raises DataError if the data are not there, saying what else may be given.
    """
    rows: list[Located] = []
    sources: dict[str, str] = {}
    for source in _sources(suite, data):
        try:
            found = read_rows(source)
        except DataError as error:
            if data is not None:
                raise
            raise DataError(
                error.problem,
                where=str(source),
                fix=f"give the data with --data: a folder that holds {', '.join(suite.files)}, one file of these "
                "rows, or a hub data set; without a network the hub is out of reach unless it has been read before",
            ) from error
        if found.bad:
            first = found.bad[0]
            raise DataError(first.problem, where=first.where, fix=first.fix)
        # the place of a hub row names no config, by which suites tell its slices
        hub_rows = ((f"{source}, row {number}", row) for number, (_, row) in enumerate(found.rows, 1))
        rows += hub_rows if is_hub(source) else found.rows
        sources[str(source)] = found.sha256
    items = suite.read(rows)
    if not items:
        raise DataError("the data hold no item of this suite", where=", ".join(sources), fix="give its own data")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise DataError(
            f"two items are called {twice!r}", where=", ".join(sources), fix="give each row an id of its own"
        )
    num = len(items)
    if limit is not None and limit < num:
        drawn = seeds.generator(seed, "suite items").choice(num, size=limit, replace=False)
        items = [items[i] for i in sorted(drawn.tolist())]
    return SuiteData(items=items, sources=sources, num_available=num)


def _sources(suite: Suite, data: str | None) -> list[str | Path]:
    if data is None:
        return list(suite.hub)
    folder = Path(data)
    if not folder.is_dir():
        return [data]
    found: dict[str, str | Path] = {}  # packed or not; of both, the packed one
    for pattern in suite.files:
        name = pattern.removesuffix(".gz")
        for path in sorted([*folder.glob(name), *folder.glob(f"{name}.gz")]):
            found[str(path).removesuffix(".gz")] = path
    if not found:
        raise DataError(
            f"the folder holds no {' and no '.join(suite.files)}",
            where=data,
            fix="give the folder that holds them, one file of such rows, or a hub data set (without --data: "
            f"{', '.join(suite.hub)})",
        )
    return list(found.values())


def text_of(row: Located, *names: str) -> str:
    """The text under the first of the names that a row has. Raises DataError if there is none, or it is blank."""
    where, values = row
    for name in names:
        value = values.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise DataError(
        f"no text under {' or '.join(map(repr, names))}; the row has {', '.join(sorted(values))}",
        where=where,
        fix="give rows as the suite's own data have them",
    )


def texts_of(row: Located, name: str) -> list[str]:
    """The texts of a list in a row, without blanks around them. Raises DataError if it is none, or one is blank."""
    where, values = row
    value = values.get(name)
    texts = [one.strip() for one in value if isinstance(one, str)] if isinstance(value, list) else []
    if not texts or not all(texts) or len(texts) < len(value or ()):
        raise DataError(
            f"{name!r} is no list of texts: {str(value)[:80]}",
            where=where,
            fix="give rows as the suite's own data have them",
        )
    return texts


def check_limit(limit: int | None) -> None:
    """Raises ConfigError for a limit of no item."""
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit}", where="--limit", fix="give at least 1, or leave it out")


def refuse_itself(model: str, baseline: str | None) -> None:
    """Raises ConfigError for a baseline that is the model itself."""
    if baseline is not None and same_model(model, baseline):
        raise ConfigError(f"{model} against itself", where="the command line", fix="name another baseline, or none")
