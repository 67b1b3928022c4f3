"""The part of a page about what was gained for the distance from the reference: reward and gold over the square root of
the KL, with the curves fitted to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from trimtab.reports import charts
from trimtab.reports.collect import RunRecord
from trimtab.reports.fits import EQUATIONS, MeasuredFit, fits_of
from trimtab.reports.headline import bounds, show
from trimtab.reports.page import Folded, Panel, Panels, Part, Table, Text


def over_kl_parts(runs: Sequence[RunRecord]) -> list[Part]:
    """The charts of the runs that logged a KL and a reward, the fits as a table, and folded the parts of gold."""
    fits = {run.name: fits_of(run) for run in runs}
    names = {name for run in runs for name in run.metrics if name.startswith("gold/")}
    how = (
        "Rightwards is further from the reference. The reward is what training sees, gold what it is meant to stand "
        "for; where reward still climbs and gold turns down, the reward model is being gamed. "
    )
    if not names:
        how = "Rightwards is further from the reference. Without a gold score this shows only what the reward claims."
    across = "√nats across"
    reward = charts.over_kl(runs, "reward/mean", "reward", wide=True)
    _draw_fits(reward, fits, "reward")
    panels = [Panel("Reward over √KL", f"units of reward, {across}", how, reward)]
    if "gold/mean" in names:
        how = "A large dot marks the highest smoothed gold; faint points are single steps."
        gold = charts.over_kl(runs, "gold/mean", "gold score (0–1)", wide=True, peak=True)
        _draw_fits(gold, fits, "gold")
        panels.append(Panel("Gold score over √KL", f"score 0–1, {across}", how, gold))
    how = "One part of the gold score. The part that falls first is the one that the reward does not see."
    parts = [
        Panel(name.removeprefix("gold/"), "score", how, charts.over_kl(runs, name, "score", peak=True))
        for name in sorted(names - {"gold/mean"})
    ]
    folded: list[Part] = [Folded("The parts of gold over √KL", [Panels(parts)])] if parts else []
    return [Panels(panels), *fit_parts(fits), *folded]


def _draw_fits(chart: charts.Chart, fits: Mapping[str, Sequence[MeasuredFit]], of: str) -> None:
    """Adds the fitted curves of a measure in the colours of their runs, dashed, as far as was measured."""
    for found, colour in zip(fits.values(), cycle(charts.PALETTE), strict=False):
        for one in (fit for fit in found if fit.of == of):
            distances = np.linspace(0, one.fit.max_distance, 60)
            chart.line(distances, one.at(distances), colour, size=1.2, dashed=True)


def fit_parts(fits: Mapping[str, Sequence[MeasuredFit]]) -> list[Part]:
    """The fits of runs, by their names, as a table with a hint how to read it; nothing if there are none."""
    rows = [
        (
            name,
            one.of,
            EQUATIONS[one.fit.form],
            f"{show(one.alpha.value)} {bounds(one.alpha)}",
            "–" if one.fit.form == "linear" else f"{show(one.beta.value)} {bounds(one.beta)}",
            _peak(one),
            show(one.fit.max_distance**2),
        )
        for name, found in fits.items()
        for one in found
    ]
    if not rows:
        return []
    head = ("", "of", "fitted, d = √KL", "alpha", "beta", "highest at a KL of", "measured up to")
    how = (
        "Dashed: the form of Gao et al. (2210.10760), or a straight line if that fits as well (AICc), of the gain over "
        "the reference. The intervals draw what was measured again; no curve is drawn beyond that."
    )
    return [Table(rows, head), Text(how, "how")]


def _peak(fitted: MeasuredFit) -> str:
    found = fitted.peak_kl
    if found is None:
        return "none in reach"
    high = "none in reach" if math.isinf(found.high) else show(found.high)
    return f"{show(found.value)} [{show(found.low)}, {high}]"
