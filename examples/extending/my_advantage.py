"""An advantage estimator of your own, in one file:

trimtab online run.toml group_size=8 'advantage="examples/extending/my_advantage.py:OptimalBaseline"'
"""

from dataclasses import dataclass

from torch import Tensor

from trimtab.math.advantages import Episodes, Estimator, group_means
from trimtab.math.masking import sequence_lengths


@dataclass(frozen=True, kw_only=True)
class OptimalBaseline(Estimator):
    """The return of a reply against the mean of its group weighted by length (OPO: Hao et al., arXiv:2505.23585).

        A_i = R_i - sum_j l_j R_j / sum_j l_j,   l_j the tokens of reply j

    It is the baseline of least variance where a longer reply has a gradient that is larger in proportion.
    """

    whiten: bool = False
    """Bring the advantages of a batch to mean 0 and deviation 1."""

    @property
    def needs_group(self) -> bool:
        return True

    def __call__(self, episodes: Episodes) -> Tensor:
        returns, groups = episodes.returns, episodes.group_ids
        lengths = sequence_lengths(episodes.sequence_ids, len(groups)).to(returns.dtype)
        baselines = group_means(lengths * returns, groups)[0] / group_means(lengths, groups)[0]
        return (returns - baselines)[episodes.sequence_ids]
