"""The local scorer: runs a model over trees without gradients, a bounded number of tokens at a time."""

from __future__ import annotations

from torch import Tensor

from trimtab.batches.trees import TokenTrees
from trimtab.engines.base import Scorer, WeightHolder
from trimtab.models.forward import exact_kl_of, token_logprobs_of, token_values_of
from trimtab.models.roles import Policy, ScalarModel


class LocalScorer(WeightHolder):
    """Scores trees with a policy, a reference or a critic in this process."""

    def __init__(self, role: Policy | ScalarModel, *, token_budget: int) -> None:
        """`token_budget` bounds the tokens of one forward pass."""
        self.role = role
        self.token_budget = token_budget

    def logprobs(self, trees: TokenTrees) -> Tensor:
        """[M] log-probability of every trained token at the policy's temperature."""
        assert isinstance(self.role, Policy)
        return token_logprobs_of(self.role, trees, self.token_budget)

    def values(self, trees: TokenTrees) -> Tensor:
        """[M] the critic's value before every trained token."""
        return token_values_of(self.role, trees, self.token_budget)

    def kl_to(self, reference: Scorer, trees: TokenTrees) -> Tensor:
        """[M] exact KL(self || reference) of the next-token distribution at every trained token, in nats."""
        assert isinstance(self.role, Policy)
        assert isinstance(reference, LocalScorer)
        assert isinstance(reference.role, Policy)
        return exact_kl_of(self.role, reference.role, trees, self.token_budget)
