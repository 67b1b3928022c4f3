"""Worlds: small synthetic tasks whose true reward is a program."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, Prompt

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Prompts drawn in a row without a new one before a split counts as used up.
_PATIENCE = 5_000


@dataclass(frozen=True)
class Gold:
    """The true reward of one reply, with the named parts it is made of; all in [0, 1].

    For example `Gold(1.0, {"correct": 1.0, "format": 1.0})`.
    """

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """A grammar of prompts and of replies of mixed quality, and the program that scores a reply.

    A new world says how to draw a prompt, how to write a reply and what a reply is worth; splits, sets and documents
    follow. Everything is a function of the world's seed and the seed of the call, on every machine.
    """

    seed: int = 0
    """The world's own seed: another one gives other draws from the same grammar."""

    name: ClassVar[str]
    biases: ClassVar[Mapping[str, float]]
    """The default biases of the world's annotators, in units of gold for each unit of a feature."""
    questions: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    """What annotators can be asked besides which reply has more gold, each question with its default biases."""

    @abstractmethod
    def draw_prompt(self, rng: Random) -> Prompt:
        """One prompt of the grammar; its facts hold all that `gold` needs."""

    @abstractmethod
    def write_reply(self, prompt: Prompt, rng: Random) -> str:
        """One reply as a person hired for the task might write it, good or bad."""

    @abstractmethod
    def gold(self, prompt: Prompt, response: str) -> Gold:
        """The true reward of the reply, from `prompt.facts` and the text alone."""

    def answer(self, prompt: Prompt, response: str, question: str) -> float:
        """How good the reply is by one of the world's questions, in [0, 1]; more is better."""
        raise NotImplementedError

    @abstractmethod
    def features(self, response: str) -> dict[str, float]:
        """Amounts an annotator may be biased by. `length` is in tens of words, the others count phrases."""

    def write_document(self, prompt: Prompt, rng: Random) -> str:
        """One text to pretrain on, without chat markup."""
        return f"{prompt.text}\n\n{self.write_reply(prompt, rng)}"

    def corpus(self) -> list[str]:
        """Texts in which the answers to the prompts can be looked up. Raises DataError for a world without any."""
        raise DataError(
            f"the world {self.name} has no texts to look things up in",
            where=f"world {self.name}",
            fix="search a file, or the world catalogue",
        )

    def prompts(self, split: Split, num: int, *, seed: int = 0) -> list[Prompt]:
        """`num` prompts of the split with distinct ids. Raises DataError if the split has fewer."""
        return self._draw(split, num, self._rng("prompts", split, seed))

    def demonstrations(self, split: Split, num: int, *, seed: int = 0) -> list[Demonstration]:
        """`num` prompts of the split, each with one reply of mixed quality. Raises DataError as `prompts` does."""
        rng = self._rng("demonstrations", split, seed)
        prompts = self._draw(split, num, rng)
        return [Demonstration(prompt=prompt, response=self.write_reply(prompt, rng)) for prompt in prompts]

    def documents(self, num: int, *, split: Split = "train", seed: int = 0) -> list[str]:
        """Plain text to pretrain on."""
        rng = self._rng("documents", split, seed)
        prompts = self._draw(split, num, rng)
        return [self.write_document(prompt, rng) for prompt in prompts]

    def replies(self, prompt: Prompt, num: int, *, seed: int = 0) -> list[str]:
        """`num` replies of mixed quality to one prompt; some may be equal."""
        rng = self._rng("replies", prompt.id, seed)
        return [self.write_reply(prompt, rng) for _ in range(num)]

    def _rng(self, purpose: str, what: str, seed: int) -> Random:
        return Random(f"{self.name}/{self.seed}/{purpose}/{what}/{seed}")

    def _draw(self, split: Split, num: int, rng: Random) -> list[Prompt]:
        if split not in SPLITS:
            raise DataError(
                f"no split is called {split!r}", where=f"world {self.name}", fix=f"use one of {', '.join(SPLITS)}"
            )
        drawn: dict[str, Prompt] = {}
        misses = 0
        while len(drawn) < num:
            prompt = self.draw_prompt(rng)
            if prompt.id in drawn or split_of(prompt.id) != split:
                misses += 1
                if misses > _PATIENCE:
                    raise DataError(
                        f"{num} distinct prompts were asked for, and no new one came after {len(drawn)}",
                        where=f"world {self.name}, split {split}",
                        fix=f"ask for at most {len(drawn)} prompts",
                    )
            else:
                misses = 0
                drawn[prompt.id] = prompt
        return list(drawn.values())


def split_of(prompt_id: str) -> Split:
    """The split of a prompt, by a hash of its id: 80% train, 10% validation, 10% test."""
    tenth = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"
