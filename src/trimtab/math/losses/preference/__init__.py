"""Learning from preferences without a reward model: the DPO family.

Every loss in `pairs`, `sorted_pairs` and `reference_free` is a function of the implied rewards of a pair's two replies,
which come from the policy itself. The losses in `replies` judge one reply at a time. `common` holds what they share.
"""

from trimtab.math.losses.preference import pairs, reference_free, replies, sorted_pairs  # noqa: F401
from trimtab.math.losses.preference.common import PreferenceLoss as PreferenceLoss
