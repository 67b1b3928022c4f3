"""Rewards by name: `model` (a trained reward model) and `gold` (a world's own score)."""

from trimtab.rewards.gold import GoldReward
from trimtab.rewards.model import RewardModel

__all__ = ["GoldReward", "RewardModel"]
