"""Checks that a reward model can read the longest prompt and reply of a stage that samples.

A reply that is too long for it would otherwise end the stage at whatever step first draws one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from trimtab.core.errors import ConfigError
from trimtab.core.types import Prompt
from trimtab.data.chat import Chat
from trimtab.models.vocabulary import vocabulary_difference
from trimtab.rewards.combined import CombinedReward
from trimtab.rewards.process import ProcessScorer
from trimtab.rewards.scorer import RewardModelScorer


def refuse_short_reward_models(
    rewards: Iterable[object], prompts: Sequence[Prompt], chat: Chat, *, max_new_tokens: int
) -> None:
    """Raises ConfigError if one of the rewards, or of the parts of combined ones, is a reward model that has learned
    fewer positions than the longest prompt and reply need. A model with another vocabulary than the policy's is not
    checked, because the number of its tokens is known only once there is a text."""
    parts = ([p.reward for p in one.parts] if isinstance(one, CombinedReward) else [one] for one in rewards)
    for judge in chain.from_iterable(parts):
        reward = judge.scorer if isinstance(judge, ProcessScorer) else judge
        if not isinstance(reward, RewardModelScorer) or reward.positions is None:
            continue
        if vocabulary_difference(chat.tokenizer, reward.chat.tokenizer):
            continue
        longest = max(reward.chat.prompt_lengths(prompts), default=0)
        needed = longest + max_new_tokens + max(0, len(reward.ending) - 1)  # the ending takes the place of one token
        if needed > reward.positions:
            room = max_new_tokens - (needed - reward.positions)
            fix = f"set sampling.max_new_tokens to at most {room}" if room > 0 else "use shorter prompts"
            raise ConfigError(
                f"a prompt of {longest} tokens and a reply of up to {max_new_tokens} need {needed} positions; the "
                f"reward model has learned {reward.positions}",
                where=f"sampling.max_new_tokens and {reward.model.model.config._name_or_path or 'the reward model'}",
                fix=f"{fix}, or use a reward model that reads longer texts",
            )
