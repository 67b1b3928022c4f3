"""What the guard has seen and done, as a checkpoint keeps it: a resumed run decides as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trimtab.evals.checkpoint_choice import MeasuredCheckpoint
from trimtab.evals.reply_signals import ReplySet


@dataclass
class GuardState:
    """The measured checkpoints, and where on its ladder of actions the guard stands."""

    series: list[MeasuredCheckpoint] = field(default_factory=list)
    """Every checkpoint that the measure was asked about, in the order of steps."""
    start: ReplySet | None = None
    """The replies before the first step, which signals compare with."""
    truncated: float = 0.0
    """The share of those replies that were cut off."""
    kl: tuple[int, float] = (0, 0.0)
    """The step of the last check and the mean KL in it, in nats."""
    fired: list[str] = field(default_factory=list)
    """The signals that had fired when the measure was last asked; they ask for nothing again."""
    num_checks: int = 0
    """The number of checks so far, with the measure or without."""
    spent: float = 0.0
    """How much of `GuardSettings.alpha` the tests so far have used up."""
    num_actions: int = 0
    """The entries of `GuardSettings.actions` that are used up."""
    measured_at_action: int = 0
    """The length of `series` when the last action was taken."""
    lower_coefs: list[float] = field(default_factory=list)
    """The KL coefficients before each rise that was not taken back; none where no coefficient can be raised."""
    stopped: str = ""
    """Why the run was ended, "" if it was not."""

    def plain(self) -> dict[str, Any]:
        """The state as JSON values; not a number is written as NaN, as Python reads it."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GuardState:
        """The state that `plain` gave."""
        series = [MeasuredCheckpoint(**row | {"values": tuple(row["values"])}) for row in values["series"]]
        start = values["start"] and ReplySet(**{name: tuple(texts) for name, texts in values["start"].items()})
        step, kl = values["kl"]
        return cls(**{**values, "series": series, "start": start, "kl": (step, kl)})
