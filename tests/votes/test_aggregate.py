from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.feedback.published import anaesthetists, votes_of
from trimtab.votes.aggregate import aggregate, share_of_a

MODELS = ("one_coin", "dawid_skene", "mace")


def test_the_anaesthetists_of_dawid_and_skene():
    labels = aggregate(anaesthetists(), "dawid_skene", pseudo_count=0, tolerance=1e-8, max_iterations=500)
    assert labels.converged
    assert labels.prior == pytest.approx([0.40, 0.42, 0.11, 0.07], abs=0.005)  # their table 4
    assert labels.confusion[0].round(2).tolist() == [
        [0.89, 0.11, 0, 0],
        [0.07, 0.88, 0.05, 0],
        [0, 0.34, 0.66, 0],
        [0, 0, 0.56, 0.44],
    ]  # their table 2, observer 1


def simulated(right, num_items=400, categories=("x", "y", "z"), seed=0):
    """Votes by annotators of known accuracy, errors evenly among the rest."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(len(categories), size=num_items)
    triples = []
    for i in range(num_items):
        for j, p in enumerate(right):
            wrong = (truth[i] + generator.integers(1, len(categories))) % len(categories)
            triples.append((str(i), f"r{j}", categories[truth[i] if generator.random() < p else wrong]))
    return truth, votes_of(triples)


@pytest.mark.parametrize("method", MODELS)
def test_known_annotators_are_recovered_and_beat_the_majority(method):
    right = (0.9, 0.85, 0.45, 0.4, 0.4)
    truth, votes = simulated(right)
    labels = aggregate(votes, method)
    accuracy = np.mean(labels.probabilities.argmax(axis=1) == truth)
    assert accuracy > np.mean(aggregate(votes).probabilities.argmax(axis=1) == truth) + 0.03
    found = labels.skills
    if method == "mace":  # the chance of knowing: p = k + (1 - k) / 3
        found = found + (1 - found) / 3
    assert found == pytest.approx(right, abs=0.07)


@pytest.mark.parametrize("method", MODELS)
def test_the_likelihood_never_falls(method):
    _, votes = simulated((0.8, 0.6, 0.5), num_items=60)
    steps = [aggregate(votes, method, max_iterations=n, pseudo_count=0).log_likelihood for n in range(1, 15)]
    assert np.all(np.diff(steps) > -1e-9)


@pytest.mark.parametrize("method", MODELS)
def test_one_step_of_em_is_its_definition(method):
    _, votes = simulated((0.8, 0.6), num_items=6, seed=3)
    q, num = len(votes.categories), len(votes.annotators)
    labels = aggregate(votes, method, max_iterations=1, pseudo_count=1)
    belief = votes.table() / votes.table().sum(axis=1, keepdims=True)
    theta = np.zeros((num, q, q))
    for r in range(num):
        counts = 1 + np.eye(q)
        for i, who, answer in zip(votes.item, votes.annotator, votes.choice, strict=True):
            if who == r:
                counts[:, answer] += belief[i]
        if method == "dawid_skene":
            theta[r] = counts / counts.sum(axis=1, keepdims=True)
        elif method == "one_coin":
            p = np.trace(counts) / counts.sum()
            theta[r] = np.where(np.eye(q) == 1, p, (1 - p) / (q - 1))
        else:  # begun at knowing half the answers and guessing evenly
            guess = (0.5 / q) / (0.5 + 0.5 / q)
            guessed = np.where(np.eye(q) == 1, counts * guess, counts)
            s, habit = guessed.sum() / counts.sum(), guessed.sum(axis=0) / guessed.sum()
            theta[r] = (1 - s) * np.eye(q) + s * habit[None]
    prior = np.full(q, 1 / q) if method == "mace" else belief.mean(axis=0)
    assert labels.confusion == pytest.approx(theta, abs=1e-9)
    for i in range(len(votes.items)):
        p = prior.copy()
        for who, answer in zip(votes.annotator[votes.item == i], votes.choice[votes.item == i], strict=True):
            p *= theta[who][:, answer]
        assert labels.probabilities[i] == pytest.approx(p / p.sum(), abs=1e-9)


PAIRS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from("abc"), st.sampled_from(["A", "tie", "B"])), min_size=1, max_size=20
).filter(lambda rows: {"A", "B"} & {choice for *_, choice in rows})


@given(PAIRS, st.sampled_from(["majority", *MODELS]), st.data())
def test_labels_do_not_depend_on_which_reply_is_called_a(rows, method, data):
    turn = [data.draw(st.booleans()) for _ in range(5)]
    other = {"A": "B", "B": "A", "tie": "tie"}
    before = votes_of([(str(i), who, choice) for i, who, choice in rows])
    after = votes_of([(str(i), who, other[choice] if turn[i] else choice) for i, who, choice in rows])
    one, two = (aggregate(votes, method, max_iterations=30) for votes in (before, after))
    a, b = share_of_a(before, one), share_of_a(after, two)
    turned = np.array([turn[int(name)] for name in before.items])
    assert a == pytest.approx(np.where(turned, 1 - b, b), abs=1e-6)
    if one.skills is not None:
        assert one.skills == pytest.approx(two.skills, abs=1e-6)


@given(PAIRS, st.sampled_from(MODELS), st.randoms())
def test_labels_do_not_depend_on_names_or_order(rows, method, random):
    before = votes_of([(str(i), who, choice) for i, who, choice in rows])
    mixed = random.sample(rows, len(rows))
    after = votes_of([(f"item {i}", {"a": "z", "b": "y", "c": "x"}[who], choice) for i, who, choice in mixed])
    one, two = (aggregate(votes, method, max_iterations=30) for votes in (before, after))
    place = [after.items.index(f"item {name}") for name in before.items]
    assert one.probabilities == pytest.approx(two.probabilities[place], abs=1e-6)


def test_dawid_and_skene_for_pairs_is_the_one_coin_model():
    _, votes = simulated((0.9, 0.7, 0.6), categories=("A", "B"), num_items=50)
    one, two = (aggregate(votes, method, pseudo_count=0) for method in ("one_coin", "dawid_skene"))
    assert one.probabilities == pytest.approx(two.probabilities, abs=1e-9)
    assert one.confusion == pytest.approx(two.confusion, abs=1e-9)


def test_majority_is_the_share_of_votes_and_even_votes_have_no_winner():
    votes = votes_of([("1", "a", "A"), ("1", "b", "A"), ("1", "c", "tie"), ("2", "a", "A"), ("2", "b", "B")])
    labels = aggregate(votes)
    assert labels.probabilities == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [0.5, 0, 0.5]]))
    assert labels.best == (0, None)
    assert labels.entropy == pytest.approx([-(2 / 3) * np.log(2 / 3) - np.log(1 / 3) / 3, np.log(2)])
    assert share_of_a(votes, labels) == pytest.approx([5 / 6, 0.5])
    with pytest.raises(ValueError, match="no sides"):
        share_of_a(votes_of([("1", "a", "x")]), labels)


@pytest.mark.parametrize("method", ["majority", *MODELS])
def test_items_without_votes_have_no_label(method):
    votes = votes_of([("1", "a", "A"), ("2", "b", "B"), ("2", "a", "B")])
    labels = aggregate(votes.chosen(votes.item == 1), method)
    assert np.isnan(labels.probabilities[0]).all()
    assert labels.best == (None, 1)
    assert labels.num_votes.tolist() == [0, 2]


@pytest.mark.parametrize("method", MODELS)
def test_few_votes_give_no_certainty(method):
    labels = aggregate(votes_of([("1", "a", "A"), ("1", "b", "B"), ("1", "c", "A")]), method)
    assert 0.5 < labels.probabilities[0, 0] < 0.99
