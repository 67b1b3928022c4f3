"""Rewards by name: learned (`model`, `process`), a world's own (`gold`), verified (`exact_answer`, `regex`,
`reasoning_format`, `json_schema`, `unit_tests`), shaping (`length`, `overlong`, `repetition`), yours (`callable`)."""

from trimtab.rewards.answers import ExactAnswer
from trimtab.rewards.formats import JsonSchema, ReasoningFormat, Regex
from trimtab.rewards.gold import GoldReward
from trimtab.rewards.model import RewardModel
from trimtab.rewards.process import ProcessReward
from trimtab.rewards.python_callable import PythonCallable
from trimtab.rewards.shaping import Length, Overlong, Repetition
from trimtab.rewards.unit_tests import UnitTests

__all__ = [
    "ExactAnswer",
    "GoldReward",
    "JsonSchema",
    "Length",
    "Overlong",
    "ProcessReward",
    "PythonCallable",
    "ReasoningFormat",
    "Regex",
    "Repetition",
    "RewardModel",
    "UnitTests",
]
