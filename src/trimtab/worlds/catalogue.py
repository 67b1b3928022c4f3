"""The catalogue: prices that a model cannot know but can look up, and sums of them, for which it has a calculator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import ClassVar

from trimtab.core import registry
from trimtab.core.types import Message, Prompt
from trimtab.worlds.arithmetic import QuestionWorld

COLOURS = ("black", "blue", "brown", "golden", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
THINGS = ("bag", "bowl", "chair", "clock", "coat", "cup", "desk", "lamp", "ring", "scarf", "shelf", "vase")
LEVELS = (1, 2, 3)
"""1: the price of one thing; 2: of several of the same thing; 3: of two things together."""
HELP = "Look up with Action: search[thing], work out with Action: calculate[sum], end with #### and the answer."


@registry.register("world", "catalogue")
@dataclass(frozen=True, kw_only=True)
class Catalogue(QuestionWorld):
    """Questions about a list of prices. Gold is 1 for the exact answer in the right form and 0 for anything else.

    The price list is in no prompt: `corpus` holds it, for the tool `search` of the environment `react`.
    """

    levels: tuple[int, ...] = LEVELS
    """The levels that are drawn, each with the same probability."""

    name: ClassVar[str] = "catalogue"

    def price(self, thing: str) -> int:
        """The price of a thing, from 11 to 99."""
        return _price(self.seed, thing)

    def corpus(self) -> list[str]:
        return [_entry(f"{c} {t}", self.price(f"{c} {t}")) for c in COLOURS for t in THINGS]

    def draw_prompt(self, rng: Random) -> Prompt:
        level = rng.choice(self.levels)
        first, second = (f"{rng.choice(COLOURS)} {rng.choice(THINGS)}" for _ in range(2))
        num = rng.randint(2, 99)
        things = [first, second] if level == 3 else [first]
        question = {1: f"Price of 1 x {first}?", 2: f"Price of {num} x {first}?", 3: f"Price of {first} + {second}?"}
        prices = [self.price(thing) for thing in things]
        answer = {1: prices[0], 2: num * prices[0], 3: sum(prices)}[level]
        facts = {"level": level, "things": things, "num": num if level == 2 else 1, "answer": answer}
        return Prompt(messages=(Message("user", f"{question[level]} {HELP}"),), facts=facts)

    def write_reply(self, prompt: Prompt, rng: Random) -> str:
        """Half of the replies look everything up and calculate, with the answers that the tools would give; the others
        guess at once, or look up and then guess."""
        way = rng.choice(("tools", "tools", "guess", "half"))
        if way == "tools":
            return self._with_tools(prompt)
        lookups = self._lookups(prompt) if way == "half" else []
        return "\n".join([*lookups, f"#### {rng.randint(11, 99)}"])

    def write_document(self, prompt: Prompt, rng: Random) -> str:
        """An example of the right use of the tools; half of the documents leave out the instructions for it."""
        question = prompt.text if rng.random() < 0.5 else prompt.text.removesuffix(HELP).strip()
        return f"{question}\n\n{self._with_tools(prompt)}"

    def _lookups(self, prompt: Prompt) -> list[str]:
        things = prompt.facts["things"]
        return [x for t in things for x in (f"Action: search[{t}]", f"Observation: {_entry(t, self.price(t))}")]

    def _with_tools(self, prompt: Prompt) -> str:
        facts, lines = prompt.facts, self._lookups(prompt)
        prices = [str(self.price(thing)) for thing in facts["things"]]
        if facts["level"] > 1:
            total = f"{prices[0]} * {facts['num']}" if facts["level"] == 2 else " + ".join(prices)
            lines += [f"Action: calculate[{total}]", f"Observation: {facts['answer']}"]
        return "\n".join([*lines, f"#### {facts['answer']}"])


@cache
def _price(seed: int, thing: str) -> int:
    return Random(f"catalogue/{seed}/price/{thing}").randint(11, 99)


def _entry(thing: str, price: int) -> str:
    return f"The {thing} costs {price}."
