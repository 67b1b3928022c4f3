"""Files of results, which `trimtab eval SUITE MODEL BASELINE --out FILE` wrote, read again for the capability tax."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import read_json
from trimtab.evals.suites.tax import PairedGap, TaxVerdict, tax_verdicts

VERSION = 1
"""The version of `suite.schema.json`, raised when a reader of the file would have to change."""


def read_results(files: Sequence[Path], *, for_tax: bool = True) -> list[dict[str, Any]]:
    """The results in the files. Raises DataError for a file that holds none with a baseline, is of another version or
    has scores outside [0, 1] or, unless the results are only shown, has a figure without a better direction, and
    ConfigError if a suite is there twice or the models differ."""
    found: list[dict[str, Any]] = []
    for path in files:
        if not path.is_file():
            raise DataError("there is no such file", where=str(path), fix="give files of trimtab eval SUITE … --out")
        result = read_json(path, fix="write it again with trimtab eval SUITE MODEL BASELINE --out FILE")
        if problem := _problem(result):
            raise DataError(problem, where=str(path), fix="give files of trimtab eval SUITE MODEL BASELINE --out FILE")
        main = result["metrics"][0]
        if result.get("baseline") is None:
            raise DataError(
                "results without a baseline compare nothing",
                where=str(path),
                fix="run the suite with MODEL and BASELINE, or leave the file out",
            )
        if for_tax and main["better"] == "neither":
            raise DataError(
                f"neither direction of {main['name']} is better, so that it says nothing about a tax",
                where=str(path),
                fix="leave the file out",
            )
        if any(one["suite"] == result["suite"] for one in found):
            raise ConfigError(
                f"the suite {result['suite']} is given twice", where=str(path), fix="give one file for each suite"
            )
        if found and _models_of(result) != _models_of(found[0]):
            raise ConfigError(
                f"{result['model']} against {result['baseline']}, and another pair of models in {files[0]}",
                where=str(path),
                fix="give results of one model and one baseline",
            )
        found.append(result)
    return found


def _problem(result: dict[str, Any]) -> str | None:
    """What keeps a file from being read as results; None for results."""
    if not {"suite", "metrics", "items", "model"} <= result.keys():
        return "these are no results of a suite"
    if result.get("version") != VERSION:
        return f"results of version {result.get('version')}; this is read in version {VERSION}"
    metrics, items = result["metrics"], result["items"]
    if not (_are_tables(metrics, "name", "better") and _are_tables(items, "cluster", "scores")):
        return "the metrics or the items are not those of results"
    if not all(isinstance(item["cluster"], str) for item in items):
        return "an item whose cluster is no text"
    name, which = metrics[0]["name"], ["scores"] if result.get("baseline") is None else ["scores", "baseline_scores"]
    for scores in (item.get(one) for item in items for one in which):
        if not isinstance(scores, dict):
            return "an item without its scores"
        values = scores.get(name, [])
        if not isinstance(values, list) or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in values):
            return f"scores of {name} that are no list of numbers from 0 to 1: {str(values)[:60]}"
    return None


def _are_tables(rows: Any, *names: str) -> bool:
    """Whether these are one or more tables with the names."""
    return isinstance(rows, list) and bool(rows) and all(isinstance(r, dict) and {*names} <= r.keys() for r in rows)


def _models_of(result: dict[str, Any]) -> list[str]:
    """The model and the baseline of a result: by their digests, or by their names if there are none."""
    return [result.get(f"{who}_sha256") or result[who] for who in ("model", "baseline")]


def verdicts_of(results: Sequence[dict[str, Any]], *, margin: float) -> list[TaxVerdict]:
    """The capability tax by the first metric of each suite. Raises DataError if a model has no value of it."""
    gaps: dict[tuple[str, str], PairedGap] = {}
    for result in results:
        main = result["metrics"][0]
        ours, theirs = (
            [item[which].get(main["name"], ()) for item in result["items"]] for which in ("scores", "baseline_scores")
        )
        if not (any(ours) and any(theirs)):
            raise DataError(
                f"no item has {main['name']} for one of the models",
                where=f"the results of {result['suite']}",
                fix="run the suite on more items",
            )
        if main["better"] == "lower":
            ours, theirs = theirs, ours
        clusters = [item["cluster"] for item in result["items"]]
        gaps[result["suite"], main["name"]] = PairedGap.of_values(ours, theirs, clusters)
    return tax_verdicts(gaps, margin=margin)
