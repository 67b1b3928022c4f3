"""Settings of the online stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torch import Tensor

from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.config import Choice
from trimtab.core.errors import ConfigError
from trimtab.core.metrics import Metrics
from trimtab.engines.device import EngineSettings
from trimtab.engines.episodes import EpisodeLimits
from trimtab.engines.local.learner import AdamW
from trimtab.engines.local.sampler import Sampling
from trimtab.math.advantages import GAE
from trimtab.math.combining import Combination, SafetyGate, WeightedSum
from trimtab.math.correction import SamplerCorrection, no_correction
from trimtab.math.kl import FixedKL, KLController
from trimtab.math.losses.policy import PPO
from trimtab.math.losses.value import ValueLoss
from trimtab.models.adapters import LoRA
from trimtab.models.precision import Precision
from trimtab.rewards.combined import judges, part_names
from trimtab.rewards.model import ModelReward
from trimtab.stages.guard.independence import refuse_trained_measure, same_source
from trimtab.stages.guard.settings import OnlineGuardSettings


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What happens to a reward before it reaches the advantages, in this order."""

    normalize: bool = False
    """Subtract the running mean and divide by the running deviation of the reward."""
    scale_only: bool = False
    """With normalize: divide by the running deviation but keep the mean."""
    clip: float | None = None
    """Clip the reward to between minus and plus this."""
    missing_eos_penalty: float = 0.0
    """Subtracted from a reply that did not end before max_new_tokens."""

    def __post_init__(self) -> None:
        if self.scale_only and not self.normalize:
            raise ValueError("scale_only = true needs normalize = true")
        refuse_out_of_range(self, "clip", "missing_eos_penalty")


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Groups without a signal, whose replies all have the same reward, are replaced by groups of further prompts (DAPO:
    Yu et al., arXiv:2503.14476, section 3.2)."""

    max_rounds: int = 4
    """The most rounds of sampling in one step; groups that are missing after the last round are counted."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "max_rounds")


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """The value function."""

    init: Literal["reward", "policy", "value_head"] = "reward"
    """Start from the reward model, from the policy with a new head, or be a head on the policy itself."""
    path: str | None = None
    """Start from this directory instead of the first reward model."""
    warmup_steps: int = 0
    """The number of first steps in which only the critic learns."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=9e-6))
    """The critic's own optimizer; a value head shares the policy's."""
    loss: ValueLoss = field(default_factory=ValueLoss)
    """The clipped value loss."""

    def __post_init__(self) -> None:
        if self.init == "value_head" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} with init = 'value_head': a head on the policy cannot learn alone "
                "without moving the policy; set warmup_steps = 0 or give the critic a model of its own"
            )
        if self.init == "value_head" and self.path is not None:
            raise ValueError("path with init = 'value_head': the head has no model of its own")


@dataclass(frozen=True, kw_only=True)
class CostLimit:
    """A limit on the mean cost of replies, kept by a Lagrange multiplier lambda (Safe RLHF: Dai et al.,
    arXiv:2310.12773). The policy is moved by (A - lambda * A_cost) / (1 + lambda)."""

    reward: Annotated[Any, Choice("reward")]
    """What a reply costs: any reward, times its weight. A weight of -1 makes the cost of a score that says how safe a
    reply is."""
    limit: float
    """The mean cost that is allowed, in the units of the cost."""
    initial_lambda: float = 1.0
    """lambda at the start."""
    most_lambda: float = 5.0
    """lambda never becomes more than this."""
    least_lambda: float = 0.01
    """lambda never becomes less than this, because it would take very long to come back."""
    learning_rate: float = 0.1
    """How fast lambda moves: by exp(learning_rate * lambda * (mean cost - limit)) in a step."""
    damping: float = 0.0
    """What moves the policy is lambda * exp(damping * (mean cost - limit)), which damps the swings around the limit."""
    window: int = 128
    """The mean cost is that of the latest replies, so many of them, but always of all replies of a step."""
    critic: str | None = None
    """The model that the cost's critic starts from, if the advantages need one. None is the cost's own reward model, or
    the policy if the cost is none."""

    def __post_init__(self) -> None:
        if (credit := getattr(self.reward, "credit", "reply")) != "reply":
            raise ValueError(f"a cost with credit = {credit!r}; a limit is on whole replies: set credit = 'reply'")
        if not self.reward.weight:
            raise ValueError("a cost with weight = 0 is 0 for every reply; give another weight, or leave cost out")
        if not self.least_lambda <= self.initial_lambda <= self.most_lambda:
            how = "less than least" if self.initial_lambda < self.least_lambda else "more than most"
            bound = self.least_lambda if self.initial_lambda < self.least_lambda else self.most_lambda
            raise ValueError(f"initial_lambda = {self.initial_lambda} is {how}_lambda = {bound}")
        if (bounds := getattr(self.reward, "bounds", None)) is not None:
            low, high = sorted(self.reward.weight * bound + 0.0 for bound in bounds)
            if not low <= self.limit < high:
                why = "no reply can keep it" if self.limit < low else "every reply keeps it"
                raise ValueError(
                    f"limit = {self.limit:g}, and a reply costs from {low:g} to {high:g}: {why}; set a limit from "
                    f"{low:g} to below {high:g}"
                )


@dataclass(frozen=True, kw_only=True)
class PretrainingMix:
    """PPO-ptx: a language-modelling loss on demonstrations beside the RL loss (arXiv:2203.02155, eq. 2)."""

    data: str
    """Demonstrations: a file, a hub id or a world."""
    coef: float = 1.0
    """Weight of the loss; both losses are means over tokens."""
    batch_size: int = 16
    """Demonstrations per update."""
    max_tokens: int = 1024
    """Longest prompt and reply together. Longer prompts are cut on the left, longer replies are dropped; both are
    counted."""


@dataclass(frozen=True, kw_only=True)
class OnlineEngineSettings(EngineSettings):
    """How online training is computed. A resumed run may change all of it; a lag then holds from there on."""

    max_staleness: int = 0
    """The lag of rollouts: step n trains on rollouts drawn with the weights after step n - 1 - max_staleness (the first
    steps with those of the start). 0 draws with the newest weights; 1 lets a sampler with weights of its own draw while
    the policy is updated. More than 0 needs the table [correction] and a loss that bounds its ratios."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_out_of_range(self, "max_staleness")


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Settings of the online stage."""

    model: str
    """The policy to start from: usually the SFT model."""
    reference: str | None = None
    """The frozen model that the KL is taken to; None is the policy as it starts."""
    prompts: str
    """Prompts: a file, a hub id or a world."""
    limit: int | None = None
    """Use only the first prompts."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the prompts at a bad row, or drop and count such rows."""
    rewards: Annotated[tuple[Any, ...], Choice("reward")]
    """The rewards that judge the rollouts."""
    combine: Annotated[Combination, Choice("combination")] = field(default_factory=WeightedSum)
    """How several rewards become one: their weighted sum, or a gate between helpfulness and safety."""
    cost: CostLimit | None = None
    """A limit on what replies cost on average; None sets none."""
    shaping: Shaping = field(default_factory=Shaping)
    """What happens to the reward before it reaches the advantages."""
    world: str | None = None
    """Log this world's gold score of every batch. Watched only: it never trains."""

    advantage: Annotated[Any, Choice("advantage")] = field(default_factory=GAE)
    """The advantage estimator."""
    loss: Annotated[Any, Choice("policy_loss")] = field(default_factory=PPO)
    """The policy loss."""
    kl: Annotated[KLController, Choice("kl_controller")] = field(default_factory=lambda: FixedKL(coef=0.05))
    """The KL coefficient: fixed, or adapted to a target."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL is subtracted from the reward of each token or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] | None = None
    """How the KL is estimated there; None is k1 in the reward and k3 in the loss. "exact" sums over the vocabulary."""
    critic: CriticSettings = field(default_factory=CriticSettings)
    """The value function."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    pretraining_mix: PretrainingMix | None = None
    """PPO-ptx; None leaves it out."""
    whiten_rewards: bool = False
    """Divide the distances of the shaped token rewards of a batch from their mean by their deviation, as in Ziegler et
    al. (arXiv:1909.08593). Their mean stays, so each token of a reply adds mean * (1 - 1 / deviation) to its return."""
    on_failed_reward: Literal["stop", "drop"] = "stop"
    """Stop at a reply that a reward could not judge, or leave it out and count it. It never counts as zero."""
    skip_truncated: bool = False
    """Leave replies that were cut off at max_new_tokens out of the update; they still count in their group's mean."""
    dynamic_sampling: DynamicSampling | None = None
    """Replace groups whose replies all have the same reward; None trains on them."""
    correction: SamplerCorrection | None = None
    """Weigh tokens by how the policy and the sampler differ. None requires that they agree, if both compute in float32;
    in another precision they never do, and the defaults of this table hold. With top-p or top-k they differ by
    definition, and replies are trained on without weights."""

    guard: OnlineGuardSettings | None = None
    """Watch the run by a measure that it does not train on, and act when the measure falls; None does not."""
    environment: Annotated[Any, Choice("environment")] | None = None
    """The environment that answers the policy between its turns, such as tools; None for replies of one turn."""
    episodes: EpisodeLimits = field(default_factory=EpisodeLimits)
    """How long an episode in an environment may become."""
    sampling: Sampling = field(default_factory=Sampling)
    """How rollouts are drawn."""
    prompts_per_step: int = 64
    """Prompts per step."""
    group_size: int = 1
    """Rollouts per prompt."""
    num_steps: int = 100
    """Rounds of sampling and updates."""
    num_epochs: int = 4
    """Passes over the rollouts of a step."""
    num_minibatches: int = 1
    """Updates per pass, each on a minibatch."""
    stop_kl: float | None = None
    """End the passes of a step once the policy has moved this far per token (k3, nats)."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=3e-6))
    """The policy's optimizer."""
    adapter: LoRA | None = None
    """Make policy and critic low-rank adapters on one frozen base. The reference is then the base (or a copy of the
    adapter that the policy starts from), and a reward model that is an adapter of the same base shares it too."""
    precision: Precision = "float32"
    """Precision of the matrix products in training and scoring; weights and log-probabilities stay float32."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass: less memory, a third more work."""
    token_budget: int = 4096
    """Tokens of one forward pass: memory and speed only."""
    engine: OnlineEngineSettings = field(default_factory=OnlineEngineSettings)
    """How the stage is computed."""
    sample_every: int = 5
    """Steps between samples written to samples.jsonl; 0 writes none."""
    num_samples: int = 4
    """Samples written each time."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """The number of newest checkpoints that stay, for `trimtab choose`; each holds the weights and the optimizers. A
    guard keeps its best besides."""
    seed: int = 0
    """Seed of prompts, rollouts and minibatches."""
    trackers: Annotated[tuple[Any, ...], Choice("tracker")] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one, such as [[rewards]] name = 'model', path = '…'")
        if self.has_own_critic and self.critic.warmup_steps >= self.num_steps:
            raise ValueError(
                f"critic.warmup_steps = {self.critic.warmup_steps} of num_steps = {self.num_steps}: the policy would "
                "never be updated; lower the one or raise the other"
            )
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"num_minibatches = {self.num_minibatches} with prompts_per_step = {self.prompts_per_step}: "
                "a minibatch holds whole prompts"
            )
        if self.group_size == 1 and (self.advantage.needs_group or self.dynamic_sampling):
            wanting = "dynamic_sampling" if self.dynamic_sampling else f"advantage {type(self.advantage).__name__}"
            raise ValueError(
                f"group_size = 1 with {wanting}, which compares the replies of a prompt with each other; "
                "set group_size = 2 or more"
            )
        self._refuse_combination()
        if self.kl_in == "loss" and self.kl_estimator in ("k1", "exact"):
            raise ValueError(
                f"kl_estimator = {self.kl_estimator!r} with kl_in = 'loss': the expected gradient of k1 as a loss is "
                "zero, and that of k2 is the exact KL's; set kl_estimator = 'k2' or 'k3', or kl_in = 'reward'"
            )
        if lag := self.engine.max_staleness:
            self._refuse_lag(lag)
        for credit in {getattr(reward, "credit", "reply") for reward in self.rewards} - {"reply"}:
            if refusal := self.credit_refusal(f"with credit = {credit!r}", "set credit = 'reply'"):
                raise ValueError("; ".join(refusal))
            if self.sampling.stop:
                raise ValueError(
                    f"sampling.stop and rewards with credit = {credit!r}: a reply that is cut at a text may end inside "
                    "a token, and its tokens are then not those that the reward reads; leave stop out, or set credit = "
                    "'reply'"
                )
        if self.cost is not None and self.whiten_rewards:
            raise ValueError(
                "whiten_rewards = true with a cost: the reward would be in deviations and the cost in the units of its "
                "limit, between which lambda could not weigh; leave one of them out"
            )
        if self.guard is not None:
            self._refuse_blind_guard(self.guard)
        refuse_out_of_range(self, "prompts_per_step", "group_size", "num_steps", "num_epochs", "num_minibatches")

    def _refuse_combination(self) -> None:
        """Raises ValueError if the rewards can not be combined as the settings say."""
        if self.rewards and self.cost is None and not any(reward.weight for reward in self.rewards):
            raise ValueError(
                "every reward has weight = 0, so that nothing is rewarded; give one of them another weight"
            )
        if problem := self.combine.refusal(part_names(self.rewards)):
            raise ValueError(problem)
        if self.combine.whiten and self.shaping.normalize:
            raise ValueError(
                "shaping.normalize = true with combine.whiten = true: both scale the rewards; leave one of them out"
            )
        if isinstance(self.combine, SafetyGate):
            self._refuse_open_gate(self.combine)
        if not self.reads_parts:
            return
        if len(self.rewards) < 2:
            raise ValueError("advantage.per_reward = true with one reward; it needs several, or per_reward = false")
        if self.combine != WeightedSum():
            raise ValueError("advantage.per_reward = true scales and adds up the rewards itself; leave combine out")
        if self.whiten_rewards:
            raise ValueError(
                "whiten_rewards = true with advantage.per_reward = true, which does not read the rewards of tokens; "
                "leave one of them out"
            )
        if self.shaping != Shaping():
            raise ValueError(
                "shaping with advantage.per_reward = true: it shapes the sum of the rewards, which is never made; "
                "leave it out, and let a reward such as 'overlong' charge for replies without an end"
            )
        if self.kl_in == "reward" and self.kl.initial:
            raise ValueError(
                "kl_in = 'reward' with advantage.per_reward = true: the KL belongs to none of the rewards; set "
                "kl_in = 'loss'"
            )

    def _refuse_open_gate(self, gate: SafetyGate) -> None:
        """Raises ValueError if no safety score can be below the threshold, as far as the reward says its bounds."""
        reward = dict(zip(part_names(self.rewards), self.rewards, strict=True))[gate.safety]
        if (bounds := getattr(reward, "bounds", None)) is None:
            return
        lowest = min(reward.weight * bound + 0.0 for bound in bounds)
        if lowest >= gate.logit:
            raise ValueError(
                f"combine.safety = {gate.safety!r}, whose scores are at least {lowest:g}: as logits they are never "
                f"below the threshold {gate.threshold:g} (the logit {gate.logit:.3g}), so that the gate does nothing; "
                "name a reward that gives logits, such as a reward model, or raise combine.threshold"
            )

    def credit_refusal(self, which: str, instead: str) -> tuple[str, str] | None:
        """The problem, and what to do, if rewards of single tokens would be lost in sums or shifted as if they were
        sums; None if they are credited. `which` says what rewards they are, `instead` how they become those of
        replies."""
        if not getattr(self.advantage, "credits_tokens", False):
            return (
                f"rewards {which} and the advantage {type(self.advantage).__name__}, which gives all tokens of a reply "
                "the advantage of its sum",
                f"use 'gae', 'reinforce_pp' or 'remax', or {instead} (an estimator of your own that credits tokens "
                "says so with credits_tokens = True)",
            )
        if self.shaping.normalize or self.shaping.clip is not None:
            return (
                f"shaping.normalize or shaping.clip and rewards {which}: they are of the reward of a whole reply",
                f"leave them out (whiten_rewards scales the rewards of tokens), or {instead}",
            )
        if self.combine != WeightedSum():
            return (
                f"combine and rewards {which}: it combines the rewards of whole replies",
                f"leave it out for the plain weighted sum, or {instead}",
            )
        return None

    @property
    def reads_parts(self) -> bool:
        """Whether the advantages read the scores of each reward. An estimator of the user's own need not say so."""
        return bool(getattr(self.advantage, "per_reward", False))

    @property
    def scales_parts(self) -> bool:
        """Whether each reward is scaled by itself before they are added up."""
        return self.reads_parts or self.combine.normalize != "none"

    def _refuse_lag(self, lag: int) -> None:
        """Raises ValueError if rollouts of older weights would be trained on as if the policy had drawn them."""
        if self.correction is None:
            raise ValueError(
                f"engine.max_staleness = {lag} without a correction: rollouts of older weights need weights of their "
                "own; add the table [correction] (its defaults will do: correction = {})"
            )
        if not getattr(self.loss, "bounds_ratio", False):
            raise ValueError(
                f"engine.max_staleness = {lag} with the loss {type(self.loss).__name__}, which does not bound its "
                "ratios, so that one old reply could move the policy far; use 'ppo', 'gspo' or 'cispo', or set "
                "max_staleness = 0 (a loss of your own that bounds them says so with bounds_ratio = True)"
            )

    def _refuse_blind_guard(self, guard: OnlineGuardSettings) -> None:
        """Raises ValueError if the guard could see no fall or could not do what it is to do."""
        refuse_trained_measure(guard.measure, judges(self))
        if guard.prompts is not None and same_source(guard.prompts, self.prompts):
            raise ValueError(
                f"guard.prompts and prompts are both {guard.prompts!r}; leave guard.prompts out to hold a share "
                "of them out of training, or name prompts that are not trained on"
            )
        if "raise_kl" in guard.actions and not isinstance(self.kl, FixedKL):
            raise ValueError(
                f"guard.actions has 'raise_kl' with the KL controller {type(self.kl).__name__}, which sets the "
                "coefficient itself; use kl.name = 'fixed', or other actions"
            )
        if "raise_kl" in guard.actions and self.advantage.per_reward and self.kl_in == "reward":
            raise ValueError(
                "guard.actions has 'raise_kl' with advantage.per_reward = true and kl_in = 'reward', where no KL is "
                "paid that could be raised; set kl_in = 'loss', or use other actions"
            )

    @property
    def has_own_critic(self) -> bool:
        """Whether there is a critic that is no head on the policy."""
        return bool(self.advantage.needs_critic) and self.critic.init != "value_head"

    def only_critic_learns(self, number: int) -> bool:
        """Whether step `number`, counted from 0, leaves the policy as it is while the critic warms up."""
        return self.has_own_critic and number < self.critic.warmup_steps

    def critic_start(self) -> str:
        """The model that a critic of its own starts from: its path, the first reward model, or the policy. Raises
        ConfigError if it is to be a reward model and there is none."""
        if self.critic.path is not None:
            return self.critic.path
        if self.critic.init == "policy":
            return self.model
        path = next((reward.path for reward in self.rewards if isinstance(reward, ModelReward)), None)
        if path is None:
            raise ConfigError(
                "critic.init = 'reward', but no reward is a reward model",
                where="critic.init and rewards",
                fix="set critic.path to a reward model, or critic.init = 'policy'",
            )
        return path

    @property
    def cost_critic_start(self) -> str | None:
        """The model that the critic of a limited cost starts from: its own path, the cost's reward model, or the
        policy. None without a limit, and for advantages that need no critic."""
        if self.cost is None or not self.advantage.needs_critic:
            return None
        return self.cost.critic or getattr(self.cost.reward, "path", None) or self.model

    @property
    def weigh(self) -> Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Metrics]]:
        """What weighs tokens by how the policy and the sampler differ: 1 for each without a correction."""
        never_equal = not self.sampling.truncates and not (self.computes_in_float32 and self.one_engine)
        return self.correction or (SamplerCorrection() if never_equal else no_correction)

    @property
    def computes_in_float32(self) -> bool:
        """Whether policy and sampler do, and so agree but for the last digits."""
        return self.precision == self.sampling.precision == "float32"

    @property
    def one_engine(self) -> bool:
        """Whether policy and sampler are computed by the same code."""
        return self.engine.sampler.name != "vllm"

    def scores_old_policy(self, number: int) -> bool:
        """Whether this step scores its rollouts with the policy before it learns from them.

        A single update starts from the policy that sampled, and the sampler has reported the log-probability of each
        token; the update itself then shows whether the two agree. The first step is scored all the same, so that a
        sampler that is not the policy is refused before anything is trained. So are the steps in which only the critic
        learns.
        """
        single = self.num_epochs * self.num_minibatches == 1 and number >= max(1, self.critic.warmup_steps)
        float32 = self.computes_in_float32 and self.one_engine
        same = float32 and self.correction is None and not self.sampling.truncates
        return not (single and same)
