"""The learning rate that a run should have had: the field's usual range for its kind of training and its size of model,
what the run itself shows, and steps where neither is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import EngineError
from trimtab.core.hub import ADAPTER_FILE, base_here, read_json
from trimtab.reports.collect import RunRecord
from trimtab.reports.diagnosis.rule import SettingChange, change_to, ends_at, number_setting, setting, two_digits
from trimtab.reports.headline import show

RATE = "optimizer.learning_rate"
CRITIC_RATE = "critic.optimizer.learning_rate"

USUAL_WEIGHTS = 7e9
"""The size of model for which `USUAL_RATES` are given."""
USUAL_RATES: Mapping[str, tuple[float, float]] = {
    "pretrain": (5e-5, 5e-4),
    "sft": (3e-6, 3e-5),
    "reward": (3e-6, 3e-5),
    "preference": (1e-6, 1e-5),
    "online": (1e-6, 1e-5),
}
"""Rates of AdamW for all weights of such a model, by stage, a decade each. Published, for 6 to 13 billion weights:
pretraining 1.2e-4 (arXiv:2005.14165, table 2.1) and 3e-4 (arXiv:2302.13971, table 2); SFT 2e-5 (arXiv:2307.09288) and
5e-6 (arXiv:2411.15124); reward models 1e-5 (arXiv:2307.09288) and 9e-6 (arXiv:2203.02155); DPO 1e-6 (arXiv:2305.18290);
PPO and GRPO 1e-6 (arXiv:2307.09288, arXiv:2402.03300). A critic is trained like a reward model."""
SIZE_EXPONENT = -1 / 3
"""Smaller models take larger rates: table 2.1 of arXiv:2005.14165 has 6e-4 for 125 million weights and 0.6e-4 for 1,400
times as many, a power of -0.32. Below 125 million this is carried on: the quickstart's models of 0.6 million weights
are trained at 0.5e-3 to 4e-3, at the upper end of what it gives."""
ADAPTER_FACTOR = 10.0
"""A low-rank adapter takes about ten times the rate of the whole weights (LoRA Without Regret, Schulman et al. 2025;
2e-4 at 7 billion weights in arXiv:2305.14314)."""
STEP = 3.0
"""Half a decade: from the middle of a usual range to its end."""
LEAP = 10.0
"""A step where nothing else is known."""
FAR_ABOVE = 3.0
"""How many times the upper end of its usual range a rate may be before it counts as too large by itself."""
USUAL_KL = 1.0
"""Nats per reply by which a run that learns has moved at least: ten times the bound of a policy that stays."""
MAX_HEADER = 2**26
"""Bytes of the header of a weights file. A longer one is that of no model."""


@dataclass(frozen=True)
class RateRange:
    """From which learning rate to which the field trains such a model."""

    low: float
    high: float
    num_weights: float
    adapter: bool
    """Whether the rates are for an adapter on the model."""

    @property
    def middle(self) -> float:
        """The geometric mean of the two ends."""
        return math.sqrt(self.low * self.high)

    @property
    def said(self) -> str:
        """The range as a sentence."""
        what = "an adapter on a model" if self.adapter else "a model"
        return (
            f"Usual for {what} of {show(two_digits(self.num_weights / 1e6))} million weights are rates of "
            f"{show(two_digits(self.low))} to {show(two_digits(self.high))}."
        )


def usual_rates(run: RunRecord, path: str = RATE) -> RateRange | None:
    """The usual range for what the rate at this path trains; None if the size of the model is not known, or the stage
    is none that trains."""
    ends = USUAL_RATES.get("reward" if path == CRITIC_RATE else run.stage)
    num = num_weights(run)
    if ends is None or not num > 0:
        return None
    adapter = isinstance(setting(run, "adapter"), Mapping)
    factor = (num / USUAL_WEIGHTS) ** SIZE_EXPONENT * (ADAPTER_FACTOR if adapter else 1.0)
    return RateRange(ends[0] * factor, ends[1] * factor, num, adapter)


def raised_rate(run: RunRecord, path: str = RATE) -> tuple[SettingChange, ...]:
    """A rate that has taught nothing, raised: to the middle of its usual range if it lies below, else by a step."""
    old, usual = number_setting(run, path), usual_rates(run, path)
    if not old > 0:
        return ()
    if usual is None:
        return _to(run, path, old * LEAP)
    return _to(run, path, max(old * STEP, usual.middle) if old < usual.low else old * STEP)


def raised_by_kl(run: RunRecord) -> tuple[SettingChange, ...]:
    """A rate that has moved the policy too little, raised by the ratio in which the policy has to move further.

    The KL grows with the square of the distance from the reference (its first term is the Fisher information), and
    AdamW's distance in proportion to the rate. The rate ends in its usual range at the most, or a step above where it
    was.
    """
    old, usual = number_setting(run, RATE), usual_rates(run)
    kl = ends_at(run, "policy/kl_k3")  # never negative, unlike the estimate policy/kl
    if not old > 0 or not kl > 0:
        return raised_rate(run)
    new = max(old * STEP, old * math.sqrt(USUAL_KL / kl))
    most = old * LEAP if usual is None else max(usual.high, old * STEP)
    return _to(run, RATE, min(new, most))


def lowered_rate(run: RunRecord, factor: float, path: str = RATE) -> tuple[SettingChange, ...]:
    """A rate that is too large, lowered by the factor, and into its usual range if that is lower still."""
    old, usual = number_setting(run, path), usual_rates(run, path)
    if not old > 0:
        return ()
    return _to(run, path, old * factor if usual is None else min(old * factor, usual.high))


def far_above(run: RunRecord, path: str = RATE) -> bool:
    """Whether the rate is far above its usual range."""
    usual = usual_rates(run, path)
    return usual is not None and number_setting(run, path) > FAR_ABOVE * usual.high


def below(run: RunRecord, path: str = RATE) -> bool:
    """Whether the rate is below its usual range."""
    usual = usual_rates(run, path)
    return usual is not None and number_setting(run, path) < usual.low


def usual_said(run: RunRecord, path: str = RATE) -> str:
    """The usual range as a sentence after another; empty if it is not known."""
    usual = usual_rates(run, path)
    return "" if usual is None else f" {usual.said}"


def num_weights(run: RunRecord) -> float:
    """The number of weights of the model that a run trains, or on which it trains an adapter, from the files of the
    model that it wrote or began with; nan if neither is on this machine."""
    place = run.environment.get("place")
    cwd = place.get("cwd") if isinstance(place, Mapping) else None
    names = [setting(run, "model")]
    if run.directory is not None:
        names.insert(0, str(run.directory / "model"))
    for name in names:
        if isinstance(name, str) and name:
            found = _weights_in(Path(cwd if isinstance(cwd, str) else ".") / Path(name).expanduser())
            if found > 0:
                return found
    return math.nan


def _to(run: RunRecord, path: str, new: float) -> tuple[SettingChange, ...]:
    return (change_to(run, path, two_digits(new)),)


def _weights_in(model: Path) -> float:
    """The number of weights in a model directory, of an adapter's base where this is one; 0 if there are none."""
    try:
        if (model / ADAPTER_FILE).exists():
            base = base_here(model, str(read_json(model / ADAPTER_FILE).get("base_model_name_or_path")))
            model = Path(base) if base else model
            if (model / ADAPTER_FILE).exists():  # a base that is an adapter itself, or none that was found
                return 0.0
        return float(sum(_weights_of(file) for file in sorted(model.glob("model*.safetensors"))))
    except (OSError, ValueError, TypeError, RecursionError, EngineError):  # damaged files have no size
        return 0.0


def _weights_of(file: Path) -> int:
    """The number of weights in a safetensors file, whose header has the shape of each."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: Any = json.loads(opened.read(size)) if size <= MAX_HEADER else {}
    tensors = header.values() if isinstance(header, dict) else ()
    shapes = [one.get("shape") for one in tensors if isinstance(one, dict)]
    return sum(math.prod(shape) for shape in shapes if isinstance(shape, list))
