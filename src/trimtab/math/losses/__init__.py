"""Losses over the batches of `trimtab.batches`.

A loss is a frozen dataclass. `weight(batch)` is its denominator, known before any forward pass, and a call gives the
SUM of the terms: the learner adds up both over micro-batches and ranks, divides once and multiplies by `coef`, so that
neither split changes the gradient.
"""
