"""Worked examples that were published with their results."""

from __future__ import annotations

import numpy as np

from trimtab.votes.table import VoteTable, votes_from_rows

KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): 4 observers, 12 units; also in Gwet (2014)."""

FLEISS = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ],
    dtype=np.float64,
)
"""10 subjects, 14 raters, 5 categories: the example of the encyclopaedias, kappa 0.210."""

ANAESTHETISTS = """
111 1 1 1 1/333 4 3 3 4/112 2 1 2 2/222 3 1 2 1/222 3 2 2 2/222 3 3 2 2/122 2 1 1 1/333 3 4 3 3/222 2 2 2 3/232 2 2 2 3
444 4 4 4 4/222 3 3 4 3/111 1 1 1 1/222 3 2 1 2/121 1 1 1 1/111 2 1 1 1/111 1 1 1 1/111 1 1 1 1/222 2 2 2 1/222 1 3 2 2
222 2 2 2 2/222 2 2 2 1/222 3 2 2 2/221 2 2 2 2/111 1 1 1 1/111 1 1 1 1/232 2 2 2 2/111 1 1 1 1/111 1 1 1 1/112 1 1 2 1
111 1 1 1 1/333 3 2 3 3/111 1 1 1 1/222 2 2 2 2/222 3 2 3 2/433 4 3 4 3/221 2 2 3 2/232 3 2 3 3/333 3 4 3 2/111 1 1 1 1
111 1 1 1 1/121 2 1 1 1/232 2 2 2 2/121 1 1 1 1/222 2 2 2 2
"""
"""Dawid and Skene (1979), table 1: 45 patients, 5 observers, the first of whom judged three times."""

BASEBALL = {
    "Milwaukee": [0, 7, 9, 7, 7, 9, 11],
    "Detroit": [6, 0, 7, 5, 11, 9, 9],
    "Toronto": [4, 6, 0, 7, 7, 8, 12],
    "New York": [6, 8, 6, 0, 6, 7, 10],
    "Boston": [6, 2, 6, 7, 0, 7, 12],
    "Cleveland": [4, 4, 5, 6, 6, 0, 6],
    "Baltimore": [2, 4, 1, 3, 1, 7, 0],
}
"""Agresti, Categorical Data Analysis (2002), table 10.10: wins against each team, in the order of the keys."""


def krippendorff_votes() -> VoteTable:
    lines = KRIPPENDORFF.split("\n")[1:-1]
    return votes_of(
        (str(i), f"coder {j}", mark)
        for j, line in enumerate(lines)
        for i, mark in enumerate(line.split())
        if mark != "."
    )


def anaesthetists() -> VoteTable:
    patients = ANAESTHETISTS.strip().replace("\n", "/").split("/")
    return votes_of(
        (str(i), f"observer {j}", mark)
        for i, patient in enumerate(patients)
        for j, marks in enumerate(patient.split())
        for mark in marks
    )


def votes_of(triples) -> VoteTable:
    """Votes of (item, annotator, choice)."""
    return votes_from_rows(
        [(f"row {n}", dict(zip(("item", "annotator", "choice"), t, strict=True))) for n, t in enumerate(triples)]
    )
