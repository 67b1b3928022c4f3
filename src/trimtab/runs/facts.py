"""What a run has to know of its stage. The stage states it, environment.json keeps it, and pages read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What a stage writes, how it may become longer, and what a reader of its page looks at first."""

    about: str = ""
    """What the stage did, in a sentence for its page."""
    writes: tuple[str, ...] = ()
    """What it writes into its run directory besides its model. Later stages may read the files as "@name/FILE", and
    `--fresh` removes them all."""
    grows: tuple[str, ...] = ()
    """Settings that say how long the stage trains. They may grow, even after the run has finished."""
    charts: tuple[tuple[str, ...], ...] = (
        ("loss/train", "loss/validation"),
        ("optimizer/learning_rate",),
        ("time/tokens_per_second",),
    )
    """The metrics that its page shows first; each tuple holds the metrics of one chart."""

    @property
    def recorded(self) -> dict[str, Any]:
        """The facts as environment.json keeps them."""
        return {"about": self.about, "writes": list(self.writes), "charts": [list(names) for names in self.charts]}
