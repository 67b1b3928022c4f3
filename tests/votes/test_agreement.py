from __future__ import annotations

import collections
import gzip
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.feedback.published import FLEISS, krippendorff_votes, votes_of
from trimtab.feedback.vote_files import read_votes
from trimtab.votes.agreement import (
    Agreement,
    agreement_weights,
    annotator_pairs,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac,
    krippendorff_alpha,
    leave_one_out,
    noise_from_agreement,
    raw_agreement,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")
NO = {"num_resamples": 0}


# --- published examples ---


@pytest.mark.parametrize(
    ("scale", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_alpha_of_krippendorffs_own_example(scale, value):
    votes = krippendorff_votes()
    alpha = krippendorff_alpha(votes.table(), scale=scale, values=votes.values)
    assert round(alpha.interval.value, 3) == value
    assert alpha.interval.count == 11  # one unit has a single value


def test_ac1_of_gwets_example():
    # Gwet's own package gives 0.77544 for the same four raters, with an observed agreement of 0.8181818
    votes = krippendorff_votes()
    assert round(gwet_ac(votes.table(), **NO).interval.value, 5) == 0.77544
    assert round(raw_agreement(votes.table(), **NO).interval.value, 7) == 0.8181818


def test_fleiss_kappa_of_the_ten_subjects():
    assert round(fleiss_kappa(FLEISS).interval.value, 3) == 0.210


def test_cohens_kappa_of_twenty_five_ten_fifteen():
    first, second = np.repeat([0, 0, 1, 1], [20, 5, 10, 15]), np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    assert cohen_kappa(first, second, 2).interval.value == pytest.approx(0.40)


def test_weighted_kappa_of_a_table_worked_by_hand():
    # cells 3 1 0 / 1 2 1 / 0 1 1 of n = 10; linear: p_o = 1 - 4 · (1/2) / 10 = 0.8; rows and columns 4, 4, 2 give a
    # mean distance of (2·16·½ + 2·8·1 + 2·8·½)/100 = 0.4 by chance, so that kappa = 1 - 0.2 / 0.4
    cells = np.array([[3, 1, 0], [1, 2, 1], [0, 1, 1]])
    first, second = (np.repeat(index.ravel(), cells.ravel()) for index in np.indices((3, 3)))
    assert cohen_kappa(first, second, 3, weights="linear").interval.value == pytest.approx(0.5)


@pytest.mark.parametrize(("agreement", "accuracy"), [(0.63, 0.755), (0.726, 0.836), (0.81, 0.894)])
def test_noise_of_known_campaigns(agreement, accuracy):
    raw = raw_agreement(np.array([[2.0, 0.0]] * round(1000 * agreement) + [[1.0, 1.0]] * round(1000 * (1 - agreement))))
    assert round(noise_from_agreement(raw).interval.value, 3) == accuracy


# --- slow loops from the definitions ---


def ratings(max_categories: int = 4):
    """Ratings of each item, as lists of categories."""
    return st.integers(2, max_categories).flatmap(
        lambda q: st.tuples(
            st.just(q), st.lists(st.lists(st.integers(0, q - 1), min_size=0, max_size=5), min_size=1, max_size=8)
        )
    )


def table_of(q: int, items: list[list[int]]) -> np.ndarray:
    return np.array([[item.count(k) for k in range(q)] for item in items], dtype=np.float64)


def slow_alpha(q, items, distance):
    """One minus mean distance within units over mean distance of all pairable values."""
    units = [item for item in items if len(item) >= 2]
    values = [v for item in units for v in item]
    totals = collections.Counter(values)
    observed = sum(
        sum(distance(a, b, totals) for i, a in enumerate(u) for j, b in enumerate(u) if i != j) / (len(u) - 1)
        for u in units
    ) / len(values)
    n = len(values)
    expected = sum(distance(a, b, totals) for i, a in enumerate(values) for j, b in enumerate(values) if i != j) / (
        n * (n - 1)
    )
    return 1 - observed / expected


def ordinal(a, b, totals):
    low, high = min(a, b), max(a, b)
    return (sum(totals[g] for g in range(low, high + 1)) - (totals[a] + totals[b]) / 2) ** 2


SCALES = {
    "nominal": lambda a, b, _: float(a != b),
    "ordinal": ordinal,
    "interval": lambda a, b, _: (a - b) ** 2,
    "ratio": lambda a, b, _: ((a - b) / (a + b)) ** 2 if a != b else 0.0,
}


@given(ratings(), st.sampled_from(sorted(SCALES)))
def test_alpha_is_its_definition(drawn, scale):
    q, items = drawn
    alpha = krippendorff_alpha(table_of(q, items), scale=scale, values=np.arange(q) * 1.0, **NO)
    if not alpha.undefined:
        assert alpha.interval.value == pytest.approx(slow_alpha(q, items, SCALES[scale]), abs=1e-9)


@given(ratings())
def test_raw_agreement_and_leave_one_out_are_their_definitions(drawn):
    q, items = drawn
    rated = [item for item in items if len(item) >= 2]
    raw, alone = raw_agreement(table_of(q, items), **NO), leave_one_out(table_of(q, items), **NO)
    if not rated:
        assert raw.undefined == alone.undefined
        assert raw.undefined
        return
    assert raw.interval.value == pytest.approx(
        np.mean([np.mean([a == b for a, b in itertools.permutations(item, 2)]) for item in rated])
    )
    shares = []
    for item in rated:
        for i, vote in enumerate(item):
            others = collections.Counter(item[:i] + item[i + 1 :])
            favourites = [k for k, n in others.items() if n == max(others.values())]
            shares.append((vote in favourites) / len(favourites) / len(item))
    assert alone.interval.value == pytest.approx(sum(shares) / len(rated))


@given(ratings(), st.sampled_from(["identity", "linear", "quadratic", "ordinal"]))
def test_gwets_coefficient_is_its_definition(drawn, kind):
    q, items = drawn
    found = gwet_ac(table_of(q, items), weights=kind, **NO)
    rated, voted = [i for i in items if len(i) >= 2], [i for i in items if i]
    if not rated:
        assert found.undefined.startswith("no ")
        return
    span = q - 1

    def weight(a, b):
        d = abs(a - b)
        return {
            "identity": float(d == 0),
            "linear": 1 - d / span,
            "quadratic": 1 - (d / span) ** 2,
            "ordinal": 1 - math.comb(d + 1, 2) / math.comb(q, 2),
        }[kind]

    observed = np.mean([np.mean([weight(a, b) for a, b in itertools.permutations(item, 2)]) for item in rated])
    share = [np.mean([item.count(k) / len(item) for item in voted]) for k in range(q)]
    total = sum(weight(a, b) for a in range(q) for b in range(q))
    chance = total / (q * (q - 1)) * sum(p * (1 - p) for p in share)
    assert found.interval.value == pytest.approx((observed - chance) / (1 - chance))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_two_annotators_have_the_same_fleiss_and_alpha_up_to_the_small_sample_term(pairs):
    # Krippendorff (2004, 11.3.4): alpha = pi + (1 - pi) / (2n) for Scott's pi, which is Fleiss of two raters
    table = table_of(3, [list(pair) for pair in pairs])
    fleiss, alpha = fleiss_kappa(table, **NO), krippendorff_alpha(table, **NO)
    assert fleiss.undefined == alpha.undefined
    if not fleiss.undefined:
        kappa = fleiss.interval.value
        assert alpha.interval.value == pytest.approx(kappa + (1 - kappa) / (2 * len(pairs)))


# --- invariance ---


def everything(items: list[list[int]], q: int, swap) -> list[Agreement]:
    table = table_of(q, items)
    two = np.array([item[:2] for item in items if len(item) >= 2], dtype=np.int64).reshape(-1, 2)
    return [
        raw_agreement(table, **NO),
        leave_one_out(table, **NO),
        fleiss_kappa(table, swap=swap, **NO),
        gwet_ac(table, swap=swap, **NO),
        gwet_ac(table, swap=swap, weights="quadratic", **NO),
        krippendorff_alpha(table, swap=swap, **NO),
        krippendorff_alpha(table, swap=swap, scale="ordinal", **NO),
        cohen_kappa(two[:, 0], two[:, 1], q, swap=swap, **NO),
        cohen_kappa(two[:, 0], two[:, 1], q, swap=swap, weights="quadratic", **NO),
    ]


def same(before: list[Agreement], after: list[Agreement]) -> None:
    for a, b in zip(before, after, strict=True):
        # one category as given has no variation, whatever its sides: the one case that naming can change
        if not a.undefined and not b.undefined:
            assert a.interval.value == pytest.approx(b.interval.value, abs=1e-12), a.name
        assert bool(a.undefined) == bool(b.undefined) or "no variation" in a.undefined + b.undefined


PAIRS = st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=4), min_size=2, max_size=8)
SWAP = np.array([2, 1, 0])  # A, tie, B


@given(PAIRS, st.data())
def test_nothing_depends_on_which_reply_of_an_item_is_called_a(items, data):
    turned = [[2 - v for v in item] if data.draw(st.booleans()) else item for item in items]
    same(everything(items, 3, SWAP), everything(turned, 3, SWAP))


@given(PAIRS)
def test_without_sides_exchanging_all_of_them_still_changes_nothing(items):
    same(everything(items, 3, None), everything([[2 - v for v in item] for item in items], 3, None))


@given(PAIRS, st.randoms())
def test_nothing_depends_on_the_order_of_items_or_annotators(items, random):
    mixed = random.sample(items, len(items))
    same(everything(items, 3, SWAP), everything(mixed, 3, SWAP))
    without_cohen = [[*random.sample(item[:2], len(item[:2])), *item[2:]] for item in items]
    same(everything(items, 3, SWAP)[:7], everything(without_cohen, 3, SWAP)[:7])


def test_counting_both_ways_round_is_what_it_says():
    # the same votes entered once as they are and once exchanged, without the small-sample term of alpha
    items = [[0, 0], [0, 1], [2, 0], [0, 0, 1]]
    table = table_of(3, items)
    doubled = np.concatenate([table, table[:, SWAP]])
    for statistic in (gwet_ac, fleiss_kappa):
        assert statistic(table, swap=SWAP, **NO).interval.value == pytest.approx(
            statistic(doubled, **NO).interval.value
        )


# --- intervals ---


def test_the_interval_is_that_of_resampled_items():
    generator = np.random.default_rng(0)
    table = generator.multinomial(3, [0.6, 0.1, 0.3], size=40).astype(np.float64)
    found = krippendorff_alpha(table, num_resamples=4000)
    slow = []
    for _ in range(1000):
        drawn = table[generator.integers(40, size=40)]
        slow.append(krippendorff_alpha(drawn, **NO).interval.value)
    assert found.interval.low == pytest.approx(np.quantile(slow, 0.025), abs=0.03)
    assert found.interval.high == pytest.approx(np.quantile(slow, 0.975), abs=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    truth = 0.8**2 + 0.2**2
    hits = 0
    for seed in range(100):
        right = generator.binomial(3, 0.8, size=150)
        found = raw_agreement(np.stack([right, 3 - right], axis=1) * 1.0, num_resamples=300, seed=seed).interval
        hits += found.low <= truth <= found.high
    assert 88 <= hits <= 99


def test_the_seed_decides_the_interval():
    assert fleiss_kappa(FLEISS, seed=1) == fleiss_kappa(FLEISS, seed=1)
    assert fleiss_kappa(FLEISS, seed=1) != fleiss_kappa(FLEISS, seed=2)


def test_blocks_of_resamples_are_whole():
    wide = np.random.default_rng(0).multinomial(5, np.full(300, 1 / 300), size=60).astype(np.float64)
    assert not math.isnan(krippendorff_alpha(wide, num_resamples=500).interval.low)


# --- what does not exist ---


def test_what_does_not_exist_is_said_in_words():
    nobody = np.zeros((3, 2))
    alone = np.array([[1.0, 0.0], [0.0, 1.0]])
    one_choice = np.array([[3.0, 0.0], [3.0, 0.0]])
    for statistic in (raw_agreement, leave_one_out, fleiss_kappa, gwet_ac, krippendorff_alpha):
        assert statistic(nobody).undefined == "no votes"
        assert statistic(alone).undefined == "no overlap: no item has two votes"
        assert math.isnan(statistic(alone).interval.value)
    for chance_corrected in (fleiss_kappa, krippendorff_alpha):
        found = chance_corrected(one_choice, categories=["A", "B"], swap=np.array([1, 0]))
        assert found.text == "undefined: no variation: every vote is 'A'"
    assert gwet_ac(one_choice).interval.value == 1  # a second category could have been chosen
    assert gwet_ac(one_choice[:, :1], categories=["A"]).undefined == "no variation: every vote is 'A'"
    assert cohen_kappa(np.array([], dtype=int), np.array([], dtype=int), 2).undefined.startswith("no overlap")
    assert cohen_kappa(np.array([1]), np.array([1]), 2, categories=["A", "B"]).undefined.endswith("'B'")


def test_agreement_below_chance_has_no_noise():
    raw = raw_agreement(np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0]]))
    assert noise_from_agreement(raw).undefined == "two annotators agree on 33%, less often than two coins"
    assert noise_from_agreement(raw_agreement(np.eye(2))).undefined.startswith("no overlap")


def test_one_item_has_a_value_and_no_interval():
    found = raw_agreement(np.array([[2.0, 1.0]]))
    assert found.interval.value == pytest.approx(1 / 3)
    assert found.text == "0.333 (n=1)"
    assert found.note == "one item: no interval"


def test_fleiss_says_which_items_it_left_out():
    found = fleiss_kappa(np.array([[3.0, 0.0], [1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [1.0, 0.0]]))
    assert found.note.startswith("on the items with exactly 3 votes; 2 others left out")
    assert found.interval.count == 3


def test_resamples_without_a_value_are_counted():
    found = krippendorff_alpha(np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]))
    assert "of the resamples" in found.note


def test_a_scale_with_values_needs_them():
    with pytest.raises(ValueError, match="needs the values"):
        krippendorff_alpha(FLEISS, scale="interval")


def test_weights_agree_with_gwets_tables():
    # R package irrCAC, vignette "weighting", three categories
    assert agreement_weights(3, "linear").tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    assert agreement_weights(3, "ordinal")[0] == pytest.approx([1, 2 / 3, 0])
    assert agreement_weights(3, "quadratic", np.array([0.0, 1.0, 4.0]))[1] == pytest.approx([15 / 16, 1, 7 / 16])


# --- pairs of annotators ---


def test_every_two_annotators_who_share_items_are_compared():
    rows = [
        ("1", "ann", "x"),
        ("1", "bob", "x"),
        ("2", "ann", "y"),
        ("2", "bob", "x"),
        ("3", "ann", "y"),
        ("3", "bob", "y"),
    ]
    votes = votes_of([*rows, ("1", "cy", "x"), ("9", "dee", "x")])
    pairs = {(pair.first, pair.second): pair for pair in annotator_pairs(votes)}
    assert set(pairs) == {("ann", "bob"), ("ann", "cy"), ("bob", "cy")}
    both = pairs["ann", "bob"]
    assert (both.agreement.value, both.agreement.count) == (pytest.approx(2 / 3), 3)
    # p_o = 2/3, p_e = (1·2 + 2·1)/9
    assert both.kappa.interval.value == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert pairs["ann", "cy"].kappa.undefined == "no variation: every vote is 'x'"


# --- real data ---


@real_data
def test_three_annotators_of_pandalm():
    names = [f"annotator{i}" for i in (1, 2, 3)]
    votes = read_votes(SHARED / "pandalm" / "testset-v1.jsonl.gz", columns={"item": "idx"}, annotator_columns=names)
    assert round(fleiss_kappa(votes.table(), **NO).interval.value, 4) == 0.8745


@real_data
@pytest.mark.parametrize(("model", "kappa", "alpha"), [("instruct", 0.9186, 0.919), ("guard", 0.8925, 0.893)])
def test_two_annotators_of_xstest(model, kappa, alpha):
    # known as 0.919 and 0.893, which is alpha to three digits; Cohen's kappa of the second is 0.8925
    path = SHARED / "xstest" / f"xstest_v2_completions_mistral{model}.jsonl.gz"
    votes = read_votes(path, columns={"item": "id"}, annotator_columns=["annotation_1", "annotation_2"])
    first, second = (votes.choice[votes.annotator == i].tolist() for i in (0, 1))
    n = len(first)
    observed = Fraction(sum(a == b for a, b in zip(first, second, strict=True)), n)
    chance = sum(Fraction(first.count(k) * second.count(k), n * n) for k in range(3))
    found = cohen_kappa(np.array(first), np.array(second), 3, **NO).interval.value
    assert found == pytest.approx(float((observed - chance) / (1 - chance)), abs=1e-12)
    assert round(found, 4) == kappa
    assert round(krippendorff_alpha(votes.table(), **NO).interval.value, 3) == alpha


@real_data
def test_factuality_of_xsum_by_three_workers():
    votes = read_votes(
        SHARED / "xsum_factuality" / "factuality_annotations_xsum_summaries.jsonl.gz",
        columns={"item": "bbcid+system", "annotator": "worker_id", "choice": "is_factual"},
        missing=["NULL"],
    )
    found = fleiss_kappa(votes.table(), **NO)
    assert round(found.interval.value, 3) == 0.763
    assert (found.interval.count, votes.counts["not_judged"]) == (1354, 33)


@real_data
def test_severity_of_abuse_by_two_to_seven_annotators():
    votes = convabuse()
    first = votes.first_votes()
    assert round(krippendorff_alpha(first.table(), scale="ordinal", **NO).interval.value, 3) == 0.660
    assert len(first) < len(votes)  # some judged an item twice


def convabuse():
    with gzip.open(SHARED / "convabuse" / "ConvAbuseEMNLPfull.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    parts = ("conv_id", "prev_agent", "prev_user", "agent", "user")
    return votes_of(
        (
            json.dumps([row[part] for part in parts]),
            row["annotator_id"],
            next(str(grade) for grade in (-3, -2, -1, 0, 1) if row[f"is_abuse.{grade}"] == 1),
        )
        for row in rows
    )
