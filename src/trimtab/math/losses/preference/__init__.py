"""Learning from preferences without a reward model: the DPO family.

Every loss of `pairs`, `sorted_pairs` and `reference_free` is a function of the rewards that the policy itself implies
for the two replies of a pair; those of `replies` judge one reply at a time. `common` holds what they share.
"""

from trimtab.math.losses.preference import pairs, reference_free, replies, sorted_pairs  # noqa: F401
from trimtab.math.losses.preference.common import PreferenceLoss as PreferenceLoss
