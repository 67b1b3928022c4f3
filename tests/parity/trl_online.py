"""TRL's own trainers around stand-in models that say what they are told, so that its methods can be asked directly.

TRL is imported in functions: this file is also read where it is not installed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import write_model_directory
from trimtab.math.logprobs import token_logprobs
from trimtab.models.load import load_causal, load_tokenizer

VOCAB = 11
PROMPT = 2
"""Tokens of every prompt."""


class Told(nn.Module):
    """A causal model whose hidden states are the logits it was given, [B, T, VOCAB]: of a row of input, those with the
    number that is its first token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.head = nn.Linear(VOCAB, VOCAB, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(VOCAB))
        self.head.requires_grad_(False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.is_gradient_checkpointing = False

    def base_model(self, input_ids: Tensor, **more: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.logits[input_ids[:, 0]])

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        raise AssertionError("the fused head replaces this")


class Rollouts:
    """B sampled replies of different lengths with every quantity that a loss could read."""

    def __init__(self, lengths: list[int], *, group_size: int, seed: int = 0, temperature: float = 1.0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.lengths, self.group_size, self.temperature = lengths, group_size, temperature
        self.width = max(lengths)
        self.mask = torch.arange(self.width) < torch.tensor(lengths)[:, None]
        self.replies = torch.randint(2, VOCAB, self.mask.shape, generator=self.draw)
        self.old = self.logits()
        self.new = self.old + self.logits(0.2)
        self.ref = self.old + self.logits(0.3)
        self.sampler = (self.logprobs(self.old) + 0.15 * torch.randn(self.mask.shape, generator=self.draw)).detach()
        self.scores = torch.randn(len(lengths), generator=self.draw)

    @property
    def sequence_ids(self) -> Tensor:
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    @property
    def group_ids(self) -> Tensor:
        return torch.arange(len(self.lengths)) // self.group_size

    def logits(self, scale: float = 1.5) -> Tensor:
        return scale * torch.randn(len(self.lengths), PROMPT + self.width, VOCAB, generator=self.draw)

    def logprobs(self, logits: Tensor) -> Tensor:
        """[B, T] of the replies."""
        of_replies = (logits[:, PROMPT - 1 : -1] / self.temperature).log_softmax(-1)
        return of_replies.gather(-1, self.replies[..., None])[..., 0]

    def flat(self, padded: Tensor) -> Tensor:
        """[M] what belongs to a token of a reply."""
        return padded[self.mask]

    def ours(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[M] log-probabilities and entropies as trimtab computes them from the same hidden states."""
        hidden = self.flat(logits[:, PROMPT - 1 : -1])
        logprobs, entropy = token_logprobs(
            hidden, torch.eye(VOCAB), self.flat(self.replies), temperature=self.temperature, with_entropy=True
        )
        assert entropy is not None
        return logprobs, entropy


@functools.cache
def model_directory(directory: str) -> Any:
    """A tiny model that TRL's constructors can look at before it is replaced."""
    return write_model_directory(Path(directory))


class Trainer:
    """One of TRL's trainers, made by its own constructor, that was handed `rollouts` instead of sampling."""

    def __init__(self, kind: str, directory: Any, rollouts: Rollouts, *, reward_funcs: Any = None, **config: Any):
        import trl
        from datasets import Dataset
        from trl.trainer.utils import add_fused_lm_head

        path = model_directory(str(directory))
        size = len(rollouts.lengths)
        options = {
            "output_dir": str(directory),
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": size,
            "num_generations": rollouts.group_size,
            "max_completion_length": rollouts.width,
            "num_iterations": 2,  # else TRL takes the policy as it is for the policy as it was
            "temperature": rollouts.temperature,
            "disable_tqdm": True,
        }
        self.rollouts = rollouts
        score = reward_funcs or [lambda **_: rollouts.scores.tolist()]
        beta = config.pop("beta", 0.0)
        correction = config.pop("correction", None)
        self.trainer = getattr(trl, f"{kind}Trainer")(
            model=load_causal(path),
            args=getattr(trl, f"{kind}Config")(**options | config),
            processing_class=load_tokenizer(path),
            reward_funcs=score,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * size}),
        )
        self.trainer.beta = beta
        if correction is not None:
            mode, low, high = correction
            self.trainer.use_vllm = self.trainer.vllm_importance_sampling_correction = True
            self.trainer.vllm_importance_sampling_mode = mode
            self.trainer.vllm_importance_sampling_clip_min = low
            self.trainer.vllm_importance_sampling_clip_max = high
        self.trainer._generate = self._generate

        def told(logits: Tensor) -> Told:
            model = Told(logits)
            add_fused_lm_head(model, temperature=rollouts.temperature, outputs=("log_probs", "entropy"))
            return model

        self.told = told
        self.policy = told(rollouts.old)
        self.kind = kind
        self.trainer.model = self.policy
        self.trainer.ref_model = told(rollouts.ref)

    def _generate(self, prompts: list[Any]) -> Any:
        r = self.rollouts
        prompt_ids = [[row, 3] for row in range(len(r.lengths))]
        replies = [row[:n].tolist() for row, n in zip(r.replies, r.lengths, strict=True)]
        if self.kind == "RLOO":
            return prompt_ids, replies, ["a"] * len(replies)
        sampled = [row[:n].tolist() for row, n in zip(r.sampler, r.lengths, strict=True)]
        vllm = self.trainer.use_vllm
        return prompt_ids, replies, None, ["a"] * len(replies), sampled if vllm else None, {}, None, None

    def judged(self) -> dict[str, Any]:
        """What TRL makes of the rollouts before training: advantages, weights, normaliser."""
        inputs = [{"prompt": "a"} for _ in self.rollouts.lengths]
        found: dict[str, Any] = self.trainer._generate_and_score_completions(inputs)
        return found

    def loss(self, inputs: dict[str, Any], logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """TRL's loss and its gradient in the logits of the policy as it is now."""
        self.policy = self.told(self.rollouts.new if logits is None else logits)
        self.trainer.current_gradient_accumulation_steps = self.trainer.args.gradient_accumulation_steps
        loss = self.trainer._compute_loss(self.policy, inputs)
        (gradient,) = torch.autograd.grad(loss, self.policy.logits)
        return loss.detach(), gradient

    def metric(self, name: str) -> float:
        """The value TRL logged last."""
        return float(self.trainer._metrics["train"][name][-1])
