"""One label for each item from several votes: by counting, or by also learning how reliable each annotator is.

The three annotator models give each annotator r a confusion matrix: theta_r[k, l] is the probability that r answers l
if k is true. All are fitted by the same EM and differ in which matrices they allow. If the categories have sides (A and
B of a pair), matrices and prior are tied under exchange of the sides, so that the labels do not depend on which reply
was called A. With A and B alone, Dawid and Skene's model is then the one-coin model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.stats import Floats
from trimtab.votes.table import WORTH, VoteTable

AggregationMethod = Literal["majority", "dawid_skene", "one_coin", "mace"]
LabelFit = Callable[[Floats, Floats], tuple[Floats, Floats | None]]
"""An M-step: from expected counts [R, q, q] (truth, answer) and the last matrices to new ones, and to skills [R] if
these are parameters of the model."""


@dataclass(frozen=True, kw_only=True)
class ItemLabels:
    """The estimated label of each of I items in q categories, and how reliable each of R annotators is."""

    method: AggregationMethod
    probabilities: Floats
    """[I, q], probability of each category; by majority, its share of the votes. nan for an item without votes."""
    num_votes: Floats
    """[I], number of votes of each item."""
    skills: Floats | None = None
    """[R], probability that an annotator's answer is right, averaged over the prior (MACE: that it is not a guess);
    None by majority."""
    confusion: Floats | None = None
    """[R, q, q], probability of each answer (last axis) given each truth; None by majority."""
    prior: Floats | None = None
    """[q], estimated share of items of each category; None by majority."""
    log_likelihood: float = 0.0
    """Log-likelihood of the votes under the fitted model; 0 by majority."""
    num_iterations: int = 0
    converged: bool = True

    @property
    def best(self) -> tuple[int | None, ...]:
        """Index of the most probable category of each item; None if several share that place or there are no votes."""
        top = np.nan_to_num(self.probabilities.max(axis=1, initial=-np.inf), nan=np.inf)
        reach = np.isclose(self.probabilities, top[:, None], rtol=0, atol=1e-9)
        return tuple(int(np.argmax(row)) if row.sum() == 1 else None for row in reach)

    @property
    def entropy(self) -> Floats:
        """[I], entropy of the probabilities in nats: 0 if one category is certain."""
        p = self.probabilities
        return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), p).sum(axis=1))


def aggregate(
    votes: VoteTable,
    method: AggregationMethod = "majority",
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
    pseudo_count: float = 1.0,
) -> ItemLabels:
    """Labels of the items of `votes`, by one of four methods.

    majority: shares of votes. dawid_skene: a confusion matrix for each annotator (Dawid and Skene 1979, Applied
    Statistics 28). one_coin: each annotator is right with one probability, and errors fall evenly on the other
    categories. mace: an annotator knows the truth or guesses from habits of their own (Hovy et al. 2013, NAACL), and
    all categories are equally likely beforehand.

    EM starts from the shares of votes and stops when the log-likelihood of the votes changes by less than `tolerance`.
    For each annotator and truth, `pseudo_count` answers of every category and as many right ones again are added to
    the counts, so that an annotator with few votes is neither trusted nor distrusted fully; 0 is maximum likelihood.
    Repeated votes of an annotator on an item count as further answers: pass `votes.first_votes()` if the repeats were
    asked to check consistency.
    """
    table = votes.table()
    num_votes = table.sum(axis=1)
    with np.errstate(invalid="ignore"):
        shares = table / num_votes[:, None]
    if method == "majority" or not len(votes):
        return ItemLabels(method=method, probabilities=shares, num_votes=num_votes)
    q, num = len(votes.categories), len(votes.annotators)
    fit, swap = _FITS[method], votes.swap
    item, who, answer = votes.item, votes.annotator, votes.choice
    answers_of = who * q + answer
    judged = num_votes > 0
    belief = np.where(judged[:, None], shares, 1 / q)
    confusion = np.broadcast_to(np.eye(q) * 0.5 + 0.5 / q, (num, q, q))
    likelihood, num_iterations, converged = -np.inf, 0, False
    while not converged and num_iterations < max_iterations:
        num_iterations += 1
        seen = [np.bincount(answers_of, weights=belief[item, k], minlength=num * q) for k in range(q)]
        counts = np.stack(seen, axis=1).reshape(num, q, q).swapaxes(1, 2) + pseudo_count * (1 + np.eye(q))
        if swap is not None:
            counts = (counts + counts[:, swap][:, :, swap]) / 2
        confusion, skills = fit(counts, confusion)
        prior = np.full(q, 1 / q) if method == "mace" else belief[judged].mean(axis=0)
        if swap is not None:
            prior = (prior + prior[swap]) / 2
        with np.errstate(divide="ignore"):
            likely = np.log(confusion)
            votes_say = [np.bincount(item, weights=likely[who, k, answer], minlength=len(belief)) for k in range(q)]
            log_belief = np.log(prior) + np.stack(votes_say, axis=1)
        evidence = np.logaddexp.reduce(log_belief, axis=1)
        belief = np.exp(log_belief - evidence[:, None])
        gained, likelihood = float(evidence.sum()) - likelihood, float(evidence.sum())
        converged = abs(gained) < tolerance
    return ItemLabels(
        method=method,
        probabilities=np.where(judged[:, None], belief, np.nan),
        num_votes=num_votes,
        skills=np.einsum("rkk,k->r", confusion, prior) if skills is None else skills,
        confusion=confusion,
        prior=prior,
        log_likelihood=likelihood,
        num_iterations=num_iterations,
        converged=converged,
    )


def share_of_a(votes: VoteTable, labels: ItemLabels) -> Floats:
    """Share of preference for side A of each item [I], with ties as half: the soft label of a preference pair.

    Raises ValueError for votes that do not choose between sides.
    """
    if not votes.pairwise:
        raise ValueError(f"the choices {', '.join(votes.categories)} are no sides of a pair")
    worth = np.array([WORTH[category] for category in votes.categories])
    return np.asarray(labels.probabilities @ worth)


def _one_coin(counts: Floats, _: Floats) -> tuple[Floats, None]:
    q = counts.shape[1]
    right = np.einsum("rkk->r", counts) / np.maximum(counts.sum(axis=(1, 2)), 1e-300)
    wrong = (1 - right) / max(q - 1, 1)
    return wrong[:, None, None] + (right - wrong)[:, None, None] * np.eye(q), None


def _dawid_skene(counts: Floats, _: Floats) -> tuple[Floats, None]:
    # a row has no counts if the annotator never met this truth: every answer is then equally likely
    sums = counts.sum(axis=2, keepdims=True)
    return np.where(sums > 0, counts / np.where(sums > 0, sums, 1.0), 1 / counts.shape[1]), None


def _mace(counts: Floats, before: Floats) -> tuple[Floats, Floats]:
    """The M-step of MACE, theta[k, l] = (1 - s) [k = l] + s habit[l]: an annotator guesses with probability s.

    A right answer k was a guess with probability s habit[k] / theta[k, k]; a wrong answer always was.
    """
    eye = np.eye(counts.shape[1])
    # the last matrices say how often a right answer was a guess; off the diagonal every answer is one
    guess_share = _guesses(before)
    guessed = counts * np.where(eye == 1, guess_share[:, :, None], 1.0)
    habit = guessed.sum(axis=1) + 1e-12
    s = guessed.sum(axis=(1, 2)) / counts.sum(axis=(1, 2))
    habit /= habit.sum(axis=1, keepdims=True)
    return (1 - s)[:, None, None] * eye + s[:, None, None] * habit[:, None, :], 1 - s


_FITS: dict[AggregationMethod, LabelFit] = {"one_coin": _one_coin, "dawid_skene": _dawid_skene, "mace": _mace}


def _guesses(confusion: Floats) -> Floats:
    """Share of guesses among right answers, s habit[k] / theta[k, k], [R, q]; s habit[k] is theta[j, k] for j ≠ k."""
    q = confusion.shape[1]
    diagonal = np.einsum("rkk->rk", confusion)
    off = (confusion.sum(axis=1) - diagonal) / max(q - 1, 1)
    return np.asarray(off / diagonal)
