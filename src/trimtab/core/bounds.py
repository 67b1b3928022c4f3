"""The allowed range of every number in a run file, by name. One name has one meaning, so one range, in all stages.

The range is checked when the value is read, before anything is imported or loaded. Conditions on two settings together
(for example `min_tokens` and `max_tokens`) are checked by the `__post_init__` of their class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`. Each end belongs to the range unless it is open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    infinite: bool = False
    """Whether `inf` is allowed; for a bound such as `max_ratio` it means "no bound"."""

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range; nan never does."""
        if math.isinf(value) and not self.infinite:
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def words(self) -> str:
        """The range in words, to follow "must be", for example "at least 0 and below 1"."""
        least = "" if self.low == -math.inf else f"{'above' if self.low_open else 'at least'} {self.low:g}"
        most = "" if self.high == math.inf else f"{'below' if self.high_open else 'at most'} {self.high:g}"
        return " and ".join(part for part in (least, most) if part) or "a finite number"


ANY = Range()
COUNT = Range(1)
OR_NONE = Range(0)
"""A count or an amount that may be zero."""
AMOUNT = Range(0, low_open=True)
SHARE = Range(0, 1)
BOUND = Range(0, low_open=True, infinite=True)

RANGES: dict[str, Range] = {
    # data and models
    **dict.fromkeys(["limit", "num_documents", "num_prompts", "num_held_out_prompts", "max_tokens"], COUNT),
    "rank": Range(1, 2**16),  # no layer is wider; each adapter's own layers are looked at when it is made
    **dict.fromkeys(["num_layers", "hidden_size", "num_heads", "mlp_size"], COUNT),
    "max_positions": Range(2),
    "vocab_size": Range(261),  # every byte and the special tokens
    "held_out": Range(0, 1, high_open=True),
    **dict.fromkeys(["last_blocks", "members"], COUNT),
    "alpha": AMOUNT,
    "base_bits": Range(4, 32),
    # steps and batches
    **dict.fromkeys(
        ["num_steps", "max_steps", "batch_size", "token_budget", "checkpoint_every", "keep_checkpoints"], COUNT
    ),
    **dict.fromkeys(
        [
            "prompts_per_step",
            "group_size",
            "num_minibatches",
            "replies_per_prompt",
            "best_of_prompts",
            "num_completions",
            "replies_per_step",
        ],
        COUNT,
    ),
    **dict.fromkeys(
        ["validate_every", "sample_every", "num_samples", "best_of", "warmup_steps", "seed", "head_seed"], OR_NONE
    ),
    "num_epochs": Range(0, 1e6, low_open=True),
    # optimizers
    **dict.fromkeys(["learning_rate", "eps"], AMOUNT),
    **dict.fromkeys(["optimizer.learning_rate", "optimizer.eps"], Range(0, 1, low_open=True)),
    **dict.fromkeys(["beta1", "beta2", "warmup_fraction"], Range(0, 1, high_open=True)),
    "weight_decay": OR_NONE,
    "max_gradient_norm": BOUND,
    # sampling and episodes
    **dict.fromkeys(["max_new_tokens", "max_prompt_tokens", "max_turns", "max_observation_tokens"], COUNT),
    **dict.fromkeys(["temperature", "teacher_temperature"], Range(1e-3, 1e3)),  # beyond, logits are all or nothing
    "cache_gb": AMOUNT,
    "top_p": Range(0, 1, low_open=True),
    "top_k": OR_NONE,
    "max_rounds": Range(2),
    "num_passages": COUNT,
    # losses
    **dict.fromkeys(["coef", "centering_coef", "nll_coef", "margin_coef", "entropy_coef"], OR_NONE),
    **dict.fromkeys(["odds_coef", "beta", "tau", "desirable_weight", "undesirable_weight"], AMOUNT),
    "label_smoothing": Range(0, 0.5, high_open=True),
    "divergence_alpha": Range(0, 1, low_open=True, high_open=True),
    "ld_alpha": SHARE,
    "length": COUNT,
    "clip_low": SHARE,
    "clip_high": Range(0, infinite=True),
    "dual_clip": Range(1, low_open=True),
    **dict.fromkeys(["max_ratio", "clip", "high", "stop_kl"], BOUND),
    "low": Range(0, 1, high_open=True),
    # advantages and the KL
    "gamma": OR_NONE,
    "advantage.gamma": SHARE,
    "lam": SHARE,
    **dict.fromkeys(["target", "horizon"], AMOUNT),
    # the guard of a run, and the choice of a checkpoint
    **dict.fromkeys(["guard.every", "measure_every", "patience"], COUNT),
    "guard.num_prompts": Range(2),  # an interval over prompts needs two
    "guard.alpha": Range(0, 1, low_open=True, high_open=True),
    "guard.margin": OR_NONE,
    "kl_factor": Range(1, low_open=True),
    **dict.fromkeys(["kl_floor", "kl_budget"], AMOUNT),
    # rewards
    **dict.fromkeys(["weight", "right_from"], ANY),
    "missing_eos_penalty": OR_NONE,
    **dict.fromkeys(["initial_lambda", "least_lambda", "most_lambda"], AMOUNT),
    "damping": OR_NONE,
    "window": COUNT,
    "cost.limit": ANY,
    "threshold": Range(0, 1, low_open=True, high_open=True),
    "aggregate_coef": AMOUNT,
    **dict.fromkeys(["min_tokens", "per_token", "most"], OR_NONE),
    **dict.fromkeys(["buffer_tokens", "n", "memory_mb", "num_processes", "file_mb", "num_parallel"], COUNT),
    "seconds": AMOUNT,
    "workers": COUNT,
    "processes": COUNT,
    "gpu_memory": Range(0, 1, low_open=True),
    "timeout_seconds": AMOUNT,
    "max_staleness": OR_NONE,
    "free": Range(0, 1, high_open=True),
    "top_fraction": Range(0, 1, low_open=True),
    # annotators
    **dict.fromkeys(["num_annotators", "votes_per_pair"], COUNT),
    "agreement": Range(0.5, 1, low_open=True),
}
"""Keyed by the setting's name, or by table and name (`advantage.gamma`) if the name alone is ambiguous."""
_TOO_LARGE = 2**63
"""The first whole number that tensors cannot hold."""


def out_of_range(path: str, value: object) -> str:
    """A message if the number at a key path is out of its range, or "". Other values always pass."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    table, _, name = path.rpartition(".")
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        return f"{name} = {str(value)[:20]}…; it must be below 2^63"
    within = f"{table.rpartition('.')[2]}.{name}"
    allowed = RANGES.get(within) or RANGES.get(name) or ANY
    return "" if allowed.holds(value) else f"{name} = {value!r}; it must be {allowed.words}"


def refuse_out_of_range(settings: object, *paths: str) -> None:
    """Raises ValueError for the first of these settings that is out of its range, such as
    `refuse_out_of_range(self, "advantage.gamma", "lam")`. A run file is checked when it is read; this is for settings
    that are made in Python."""
    for path in paths:
        if problem := out_of_range(path, getattr(settings, path.rpartition(".")[2])):
            raise ValueError(problem)
