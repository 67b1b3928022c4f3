"""What a run has to know of the stage it is a run of. The stage says it, environment.json keeps it, pages read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What a stage writes, how it may grow, and what a reader of its page looks at first."""

    about: str = ""
    """What the stage did, in a sentence for its page."""
    writes: tuple[str, ...] = ()
    """Files that it writes into its run directory, besides its model and its records; later stages may read them."""
    grows: tuple[str, ...] = ()
    """Settings that say how long it trains. They may grow, also after the run has finished."""
    charts: tuple[tuple[str, ...], ...] = (
        ("loss/train", "loss/validation"),
        ("optimizer/learning_rate",),
        ("time/tokens_per_second",),
    )
    """The metrics that its page shows first, those of one chart together."""

    @property
    def recorded(self) -> dict[str, Any]:
        """As environment.json has them."""
        return {"about": self.about, "writes": list(self.writes), "charts": [list(names) for names in self.charts]}
