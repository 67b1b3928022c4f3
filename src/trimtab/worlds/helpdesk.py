"""The help desk: decide by policy, be brief, be honest, refuse harm, do not flatter, do not parrot the complaint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from trimtab.core import registry
from trimtab.core.types import Prompt
from trimtab.worlds import helpdesk_gold, helpdesk_grammar
from trimtab.worlds.helpdesk_grammar import MIXED
from trimtab.worlds.world import Gold, World


@registry.register("world", "helpdesk")
@dataclass(frozen=True, kw_only=True)
class Helpdesk(World):
    """Customer tickets: `helpdesk_grammar` writes them and replies to them, `helpdesk_gold` scores the replies."""

    name: ClassVar[str] = "helpdesk"
    # Biases are small beside the 0.66 of gold that a wrong or false reply loses, so that utility follows gold over
    # usual replies. Yet gold loses no more than 0.33 to flattery, hedging and length together, and a reply that stacks
    # them gains more than that in utility.
    biases: ClassVar[Mapping[str, float]] = {"flattery": 0.06, "hedging": 0.05, "length": 0.045}

    def draw_prompt(self, rng: Random) -> Prompt:
        return helpdesk_grammar.draw_ticket(rng)

    def write_reply(self, prompt: Prompt, rng: Random) -> str:
        return helpdesk_grammar.write_reply(prompt.facts, MIXED, rng)

    def write_document(self, prompt: Prompt, rng: Random) -> str:
        return helpdesk_grammar.write_document(prompt, rng)

    def gold(self, prompt: Prompt, response: str) -> Gold:
        return helpdesk_gold.gold(prompt.facts, response)

    def features(self, response: str) -> dict[str, float]:
        return helpdesk_gold.features(response)
