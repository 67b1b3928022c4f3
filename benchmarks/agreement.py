"""Agreement coefficients against published examples and known values of public data, as JSON.

    python benchmarks/agreement.py [--data FOLDER]

Writes `docs/evidence/data/agreement.json`: each value, what it should be, and how long a large table takes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np

from trimtab.feedback.vote_files import read_votes
from trimtab.votes.aggregate import aggregate
from trimtab.votes.agreement import Agreement, cohen_kappa, fleiss_kappa, gwet_ac, krippendorff_alpha
from trimtab.votes.ratings import ELO_PER_UNIT, Games, rate
from trimtab.votes.study import study
from trimtab.votes.table import VoteTable, votes_from_rows

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "evidence" / "data" / "agreement.json"


def published() -> list[dict]:
    """Worked examples from the literature."""
    sys.path.insert(0, str(ROOT))
    from tests.feedback.published import BASEBALL, FLEISS, anaesthetists, krippendorff_votes

    votes = krippendorff_votes()
    scales = {"nominal": "0.743", "ordinal": "0.815", "interval": "0.849", "ratio": "0.797"}
    rows = [
        row(
            f"Krippendorff's 4 × 12, {scale}",
            krippendorff_alpha(votes.table(), scale=scale, values=votes.values),
            known,
        )
        for scale, known in scales.items()
    ]
    rows.append(row("Gwet's four raters, AC1", gwet_ac(votes.table()), "0.77544"))
    rows.append(row("Fleiss 10 × 14 × 5", fleiss_kappa(FLEISS), "0.210"))
    first, second = np.repeat([0, 0, 1, 1], [20, 5, 10, 15]), np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    rows.append(row("Cohen 20/5/10/15", cohen_kappa(first, second, 2), "0.40"))
    labels = aggregate(anaesthetists(), "dawid_skene", pseudo_count=0, tolerance=1e-8, max_iterations=500)
    rows += [
        plain(f"Dawid and Skene's anaesthetists, share of class {k + 1}", float(labels.prior[k]), known)
        for k, known in enumerate(("0.40", "0.42", "0.11", "0.07"))
    ]
    pairs = [(i, j) for i, wins in enumerate(BASEBALL.values()) for j, n in enumerate(wins) for _ in range(n)]
    sides = np.array(pairs).T
    found = rate(Games(players=tuple(BASEBALL), first=sides[0], second=sides[1], outcome=np.ones(len(pairs))))
    elo = {player.name: player.elo.value for player in found.players}
    known = {"Milwaukee": "1.58", "Detroit": "1.44", "Toronto": "1.29", "New York": "1.25", "Boston": "1.11"}
    for name, value in {**known, "Cleveland": "0.68"}.items():
        rows.append(plain(f"Agresti's baseball, {name}", (elo[name] - elo["Baltimore"]) / ELO_PER_UNIT, value))
    return rows


def public(data: Path) -> list[dict]:
    """Data sets whose agreement is known."""
    names = ["annotator1", "annotator2", "annotator3"]
    votes = read_votes(data / "pandalm" / "testset-v1.jsonl.gz", columns={"item": "idx"}, annotator_columns=names)
    rows = [row("PandaLM, Fleiss", fleiss_kappa(votes.table()), "0.8745")]
    for model, known in (("instruct", "0.919"), ("guard", "0.893")):
        path = data / "xstest" / f"xstest_v2_completions_mistral{model}.jsonl.gz"
        votes = read_votes(path, columns={"item": "id"}, annotator_columns=["annotation_1", "annotation_2"])
        first, second = (votes.choice[votes.annotator == i] for i in (0, 1))
        rows.append(row(f"XSTest {model}, Cohen", cohen_kappa(first, second, 3), known))
        rows.append(row(f"XSTest {model}, Krippendorff", krippendorff_alpha(votes.table()), ""))
    votes = read_votes(
        data / "xsum_factuality" / "factuality_annotations_xsum_summaries.jsonl.gz",
        columns={"item": "bbcid+system", "annotator": "worker_id", "choice": "is_factual"},
        missing=["NULL"],
    )
    rows.append(row("XSum factuality, Fleiss", fleiss_kappa(votes.table()), "0.763"))
    for name, some in (("first vote of an annotator on an item", True), ("all votes", False)):
        votes = convabuse(data)
        table = (votes.first_votes() if some else votes).table()
        found = krippendorff_alpha(table, scale="ordinal")
        rows.append(row(f"ConvAbuse, ordinal, {name}", found, "0.660" if some else ""))
    return rows


def convabuse(data: Path):
    """Severity of one user turn in its context, from one column for each grade."""
    with gzip.open(data / "convabuse" / "ConvAbuseEMNLPfull.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    parts = ("conv_id", "prev_agent", "prev_user", "agent", "user")
    grades = ("-3", "-2", "-1", "0", "1")
    return table_of(
        (json.dumps([r[p] for p in parts]), r["annotator_id"], next(g for g in grades if r[f"is_abuse.{g}"] == 1))
        for r in rows
    )


def table_of(triples) -> VoteTable:
    """Votes of (item, annotator, choice)."""
    return votes_from_rows([("", dict(zip(("item", "annotator", "choice"), one, strict=True))) for one in triples])


def speed() -> dict:
    """Seconds for everything `trimtab feedback agreement` computes on a large table."""
    generator = np.random.default_rng(0)
    votes = table_of(
        (str(i), f"annotator {w}", str(generator.choice(["A", "B", "tie"])))
        for i in range(10_000)
        for w in generator.choice(30, size=5, replace=False)
    )
    began = time.perf_counter()
    study(votes)
    return {"votes": len(votes), "annotators": 30, "resamples": 1000, "seconds": round(time.perf_counter() - began, 2)}


def row(name: str, found: Agreement, known: str) -> dict:
    """A coefficient beside what it should be, to the digits given."""
    interval = found.interval
    bounds = {"low": interval.low, "high": interval.high, "items": interval.count}
    return {**plain(name, interval.value, known), **bounds}


def plain(name: str, value: float, known: str) -> dict:
    """A value beside what it should be."""
    digits = len(known.partition(".")[2])
    return {"name": name, "value": value, "known": known, "equal": f"{value:.{digits}f}" == known if known else None}


def main() -> None:
    """Computes and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the public data sets; without it theirs stay as they are")
    options = parser.parse_args()
    if options.data and not options.data.is_dir():
        parser.error(f"there is no folder {options.data}; its README names the public data sets")
    result = {
        "command": "python benchmarks/agreement.py",
        "published": published(),
        "data": public(options.data) if options.data else json.loads(OUT.read_text(encoding="utf-8"))["data"],
        "speed": speed(),
    }
    OUT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for one in [*result["published"], *result["data"]]:
        verdict = {True: "equal", False: "DIFFERS", None: ""}[one["equal"]]
        print(f"{one['name']:64}{one['value']:.4f}  {one['known']:8}{verdict}")
    print(result["speed"])


if __name__ == "__main__":
    main()
