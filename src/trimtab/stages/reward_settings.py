"""Settings of the reward stage, as all its files read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from trimtab.core.config import Choice
from trimtab.core.hub import same_model
from trimtab.core.types import PreferencePair
from trimtab.engines.local.learner import AdamW
from trimtab.math.losses.reward import BradleyTerry
from trimtab.models.adapters import LoRA
from trimtab.rewards.model import ModelReward
from trimtab.stages.supervised import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class RewardSettings(TrainingSettings):
    """Settings of the reward stage."""

    model: str
    """The model to start from: usually the SFT model; any causal model or encoder."""
    data: str
    """What the loss learns from, usually preference pairs: a file, a hub id or a world."""
    held_out_data: str | None = None
    """Data to judge the model by; without it, a share of `data` split by prompt."""
    held_out: float = 0.1
    """The share of the prompts that is held out. Ignored when held_out_data is given."""
    demonstrations: str | None = None
    """Demonstrations whose mean reward is shifted to zero: the first 1000 of them, fitted to max_tokens; without them,
    the chosen replies of the training pairs."""
    loss: Annotated[Any, Choice("reward_loss")] = field(default_factory=BradleyTerry)
    """The loss that is minimised: "bradley_terry" over pairs, "plackett_luce" over whole rankings, or over single
    replies "process" (step labels), "outcome" (thumbs) and "regression" (ratings)."""
    num_epochs: float = 1.0
    """Passes over the data. More than one may learn the noise of single votes by heart; with several votes on each pair
    it may bring points. The held-out accuracy says which."""
    batch_size: int = 64
    """Prompts per update, each with all its pairs."""
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-5, schedule="cosine", warmup_fraction=0.03))
    """The optimizer and its schedule."""
    adapter: LoRA | None = None
    """Train a low-rank adapter and the score head on the frozen model instead of all its weights."""
    head_seed: int | None = None
    """Seed of a new score head; None takes `seed`. Models to be averaged need one head to begin with."""
    members: int = 1
    """Train an ensemble of so many models, each with a seed and an order of the data of its own."""
    bootstrap: bool = False
    """Each member draws as many prompts as there are, with replacement, and trains on these."""
    teacher: Annotated[tuple[Any, ...], Choice("reward")] = ()
    """Learn from the scores of these rewards, added up with their weights, and not from the labels of `data`: a large
    model, an ensemble, or any other reward. The labels judge the model then."""
    teacher_temperature: float = 1.0
    """A pair's label is the sigmoid of the difference of the teacher's two scores, divided by this: below 1 for a
    teacher whose scores are no logits and lie close together."""

    def __post_init__(self) -> None:
        self._refuse_teacher()
        if self.bootstrap and self.members == 1:
            raise ValueError("bootstrap = true is for the members of an ensemble, and members = 1")
        if self.learns_from is PreferencePair:
            return
        for name, given in (("members", self.members > 1), ("demonstrations", self.demonstrations is not None)):
            if given:
                raise ValueError(
                    f"{name} with the loss {type(self.loss).__name__}: ensembles and the zero of demonstrations "
                    f"are for models of pairs; leave {name} out"
                )

    @property
    def learns_from(self) -> type[Any]:
        """The kind of record that the loss learns from."""
        kind: type[Any] = getattr(self.loss, "learns_from", PreferencePair)
        return kind

    def _refuse_teacher(self) -> None:
        """Raises ValueError if these settings can have no teacher, or need one."""
        if not self.teacher:
            if (given := self.teacher_temperature) != 1:
                raise ValueError(f"teacher_temperature = {given:g} without a teacher, whose scores it would divide")
            return
        loss = type(self.loss).__name__
        if self.learns_from is not PreferencePair or self.loss.needs_ranking:
            raise ValueError(
                f"teacher with the loss {loss}: a teacher labels pairs; use loss = 'bradley_terry', "
                "or leave teacher out"
            )
        if smoothing := getattr(self.loss, "label_smoothing", 0.0):
            raise ValueError(
                f"loss.label_smoothing = {smoothing:g} with a teacher, whose labels are soft already; leave it out, "
                "and raise teacher_temperature for softer ones"
            )
        alone = self.teacher[0] if len(self.teacher) == 1 else None
        corrected = getattr(alone, "length_correction", None) is not None
        if isinstance(alone, ModelReward) and same_model(alone.path, self.model) and not corrected:
            raise ValueError(
                f"teacher.0.path and model are both {self.model!r}: a model learns nothing from its own scores; name "
                "another teacher, or start from another model"
            )
