"""The cards of the reward models that a run trains on, and the replies that they say nothing about.

The reward stage writes a card beside its model (`trimtab card MODEL DATA --out MODEL` writes one for any). A run keeps
the hash of each card, says what is wrong with a model in the words of its card, and counts the replies that are longer
than any on which the model was judged: there the figures of the card do not hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.files import read_json
from trimtab.core.metrics import Metrics, mean_of
from trimtab.core.terminal import warn
from trimtab.core.types import Rollout
from trimtab.evals.text import words
from trimtab.reports.card_sentences import cautions
from trimtab.rewards.combined import judges
from trimtab.rewards.model import ModelReward
from trimtab.runs.models import CARD_FILE, model_digest
from trimtab.runs.run import Run
from trimtab.stages.online.settings import OnlineSettings

MOST_BEYOND = 0.5
"""A run says so once if a larger share of a step's replies is longer than any that the card judged."""


@dataclass(frozen=True)
class CarriedCard:
    """The card of one of the rewards."""

    key: str
    """The reward's key path, such as "rewards.0"."""
    sha256: str
    """The hash of the file."""
    values: Mapping[str, Any]

    @property
    def most_words(self) -> float | None:
        """Words of the longest reply on which the model was judged; None if the card does not say."""
        bins = self.values.get("by_length") or []
        return max((one["high"] for one in bins if one.get("high") is not None), default=None)


class CardWatch:
    """Reads the cards of a run's reward models, and holds its replies against them."""

    def __init__(self, settings: OnlineSettings, run: Run) -> None:
        """Records the hash of each card, and says on stderr what it warns of."""
        self.cards = find_cards(settings)
        run.note_cards({card.key: card.sha256 for card in self.cards})
        for card in self.cards:
            for sentence in cautions(card.values):
                warn(f"the card of {card.key} says: {sentence}")
        known = [card.most_words for card in self.cards if card.most_words is not None]
        self._most_words = min(known, default=None)
        self._said = False

    def __call__(self, number: int, rollouts: Sequence[Rollout]) -> Metrics:
        """`reward/beyond_card_fraction`: the share of replies with more words than any that every card judged. Empty
        without a card."""
        if self._most_words is None:
            return {}
        beyond = mean_of([len(words(rollout.response)) > self._most_words for rollout in rollouts])
        if beyond.value > MOST_BEYOND and not self._said:
            self._said = True
            warn(
                f"{beyond.value:.0%} of the replies of step {number + 1} have more than {self._most_words:g} "
                "words; no longer reply is on the card of the reward model, which says nothing about them"
            )
        return {"reward/beyond_card_fraction": beyond}


def find_cards(settings: OnlineSettings) -> list[CarriedCard]:
    """The cards of all reward models in directories, in or beside them. A card is the model's if it holds the digest of
    the model; one of another model is left out, as is a file that is no card."""
    found = []
    for key, reward in judges(settings).items():
        if not isinstance(reward, ModelReward) or not Path(reward.path).expanduser().is_dir():
            continue
        model = Path(reward.path).expanduser()
        for file in (model / CARD_FILE, model.parent / CARD_FILE):
            if not file.is_file():
                continue
            values = read_json(file, fix="write it again with trimtab card, or remove it")
            if values.get("model_sha256") == model_digest(model):
                found.append(CarriedCard(key, hashlib.sha256(file.read_bytes()).hexdigest(), values))
                break
    return found
