"""The correction of a reward for the length of the reply: curves of `evals.length_curves` in a model's directory.

The file `length_correction.json` stands beside the weights, so a run that records the model has recorded its correction
too. It holds both kinds of curves, and a run file says which is used, if any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.files import json_text, write_whole
from trimtab.core.hub import members_in, read_json
from trimtab.core.metrics import Metrics, mean_of
from trimtab.evals.length_curves import BANDWIDTH, FEWEST, METHODS, LengthCurve, LengthMethod, fit_curve
from trimtab.stats import Floats

LENGTH_FILE = "length_correction.json"
"""File with the curves in the directory of a reward model; of an ensemble, in that of the whole."""


@dataclass(frozen=True)
class LengthCorrection:
    """What is subtracted from the scores of a reward model, or of each member of an ensemble on their common scale."""

    curves: tuple[LengthCurve, ...]
    """One for each member; a single model is the only one."""
    name: str = "model"
    """That of the reward in metrics."""

    def of(self, lengths: Sequence[int]) -> Tensor:
        """[K, B] what is subtracted from the K members' scores of replies of these numbers of tokens."""
        return torch.from_numpy(self._at(lengths)).float()

    def metrics(self, lengths: Sequence[int]) -> Metrics:
        """`reward/NAME_for_length`: the mean over replies of what is subtracted. `reward/NAME_beyond_lengths`: the
        share of replies that are shorter or longer than all to which the curves were fitted."""
        first = self.curves[0].lengths
        return {
            f"reward/{self.name}_for_length": mean_of(self.of_mean(np.array(lengths)).tolist()),
            f"reward/{self.name}_beyond_lengths": mean_of(not first[0] <= num <= first[-1] for num in lengths),
        }

    def of_mean(self, lengths: Floats) -> Floats:
        """What is subtracted from the mean of the members' scores, in the shape of `lengths`."""
        return np.asarray(self._at(lengths).mean(0))

    def _at(self, lengths: ArrayLike) -> Floats:
        return np.stack([curve.at(lengths) for curve in self.curves])


def fitted(scores: Floats, lengths: Floats, *, data: Sequence[str], bandwidth: float = BANDWIDTH) -> dict[str, Any]:
    """The curves of both kinds of K members, from their scores [K, n] of replies and the replies' lengths [n] in
    tokens, as the file holds them. `data` names where the replies are from. See `length_refusal`."""
    curves = {
        method: [dataclasses.asdict(fit_curve(row, lengths, method, bandwidth=bandwidth)) for row in scores]
        for method in METHODS
    }
    about = {"version": 1, "unit": "tokens", "data": list(data), "num_replies": len(lengths), "bandwidth": bandwidth}
    return about | curves


def write_correction(found: dict[str, Any], directory: Path) -> None:
    """Writes what `fitted` gave into the directory of the model, whole or not at all."""
    write_whole(directory / LENGTH_FILE, json_text(found))


def corrections_in(path: str | Path) -> dict[str, LengthCorrection]:
    """The corrections in the directory of a model by their method; none without the file."""
    there = (Path(path).expanduser() / LENGTH_FILE).is_file()
    return {method: read_correction(path, method) for method in METHODS} if there else {}


def read_correction(path: str | Path, method: LengthMethod, *, name: str = "model") -> LengthCorrection:
    """The correction in the directory of a model. Raises ConfigError if there is none, and EngineError if its file is
    damaged."""
    file = Path(path).expanduser() / LENGTH_FILE
    if not file.is_file():
        raise ConfigError(
            f"length_correction = {method!r}, and no curve was fitted to this reward model: it has no {LENGTH_FILE}",
            where=str(path),
            fix=f"fit it to replies that the model was not trained on: trimtab debias {path} REPLIES (the reward stage "
            f"does so by itself, if the pairs that it holds out have {FEWEST} replies or more)",
        )
    rows = read_json(file).get(method)
    try:
        curves = tuple(_curve(row) for row in rows or ())
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(f"holds no curve under {method!r}: {error}", file) from error
    if len(curves) != (num := len(members_in(path))):
        raise _damaged(f"holds {len(curves)} curves under {method!r} for {num} model{'s' * (num > 1)}", file)
    return LengthCorrection(curves, name)


def _curve(row: Any) -> LengthCurve:
    lengths, rewards = ([float(x) for x in row[name]] for name in ("lengths", "rewards"))
    slope = float(row["slope"])
    if not lengths or len(lengths) != len(rewards) or lengths != sorted(lengths):
        raise ValueError(f"{len(lengths)} lengths with {len(rewards)} rewards, or not in order")
    if not all(map(math.isfinite, (*lengths, *rewards, slope))):
        raise ValueError("a number is not finite")
    return LengthCurve(tuple(lengths), tuple(rewards), slope)


def _damaged(what: str, file: Path) -> EngineError:
    return EngineError(f"{LENGTH_FILE} {what}", where=str(file), fix="fit it again: trimtab debias MODEL REPLIES")
