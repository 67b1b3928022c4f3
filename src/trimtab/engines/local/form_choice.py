"""Chooses the form of decoding for a model: the fastest form whose log-probabilities are the model's own.

Nothing here knows architectures by name. Each form draws a few replies and is compared with the model's own logits on
single rows without padding and without a cache. A form that raises or differs is rejected, and the reason is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import to_device
from trimtab.core.errors import EngineError
from trimtab.core.terminal import note
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import first_line
from trimtab.engines.local.fused import supports_fusing
from trimtab.engines.local.kernels import find
from trimtab.engines.local.lockstep import LockstepForm
from trimtab.engines.local.padded import PaddedForm
from trimtab.engines.local.replies import DecodingForm, ReplyBuffer, SampledReply, Sampling
from trimtab.engines.local.slots import SlotForm
from trimtab.models.adapters import using
from trimtab.models.forms import narrow_windows
from trimtab.models.own_forward import learned_positions, own_attention
from trimtab.models.roles import Policy

MAX_DIFFERENCE = 1e-3
"""Largest difference between a form and the model at one token, in nats, for logits with a standard deviation of 1 or
more. For flatter logits the limit is lower, since mistakes are smaller there too. Rounding stays a hundred times
below."""
NUM_TOKENS = 5
"""Tokens of each reply that is drawn for the comparison."""


@dataclass(frozen=True)
class FormChoice:
    """The chosen form, and the reason why each faster one was rejected, for example
    `{"slots": "the model does not compute its numbers over flat rows"}`."""

    architecture: str
    form: DecodingForm
    passed_over: dict[str, str]

    @property
    def is_slow(self) -> bool:
        """Whether replies are decoded more slowly than in slots."""
        return not isinstance(self.form, SlotForm)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        way = WAYS.get(self.form.name, self.form.name)
        return f"replies of {self.architecture} are sampled in {way}" + (f" ({reasons})" if reasons else "")


WAYS = {
    "padded": "padded rows, slower than in slots",
    "lockstep": "rows of equal length, slower than in slots",
    "uncached": "whole forward passes without a cache, which is very slow",
}


def choose_form(policy: Policy, sampling: Sampling, chat: Chat) -> FormChoice:
    """The fastest form that gives the policy's own probabilities, with its weights as they are now. If it is a slow
    one, a note on stderr gives the reason. Raises EngineError if no form is right."""
    passed_over: dict[str, str] = {}
    if not policy.tree_form:
        passed_over["slots"] = "the model does not compute its numbers over flat rows"
    find(next(policy.model.parameters()))  # a mistake in the environment is no reason to take a slower form
    check = _Check(policy, chat)
    for form in forms(policy, sampling, chat):
        with narrow_windows(policy.model):
            problem = check.problem(form)
        if problem is None:
            choice = FormChoice(type(policy.model).__name__, form, passed_over)
            if choice.is_slow:
                note(str(choice))
            return choice
        passed_over[form.name] = problem
    raise EngineError(
        "no way of sampling gives the model's own probabilities"
        + "".join(f"\n  - {name}: {reason}" for name, reason in passed_over.items()),
        where=f"architecture {type(policy.model).__name__}",
        fix="sample from another architecture; training on demonstrations or pairs does not sample",
    )


def forms(policy: Policy, sampling: Sampling, chat: Chat) -> Iterator[DecodingForm]:
    """Yields every form that may suit the policy, the fastest first."""
    if policy.tree_form:
        if supports_fusing(policy.model):
            yield SlotForm(policy, sampling, "fused")
        yield SlotForm(policy, sampling, "rows")
    yield PaddedForm(policy, sampling, chat.pad_id)
    yield LockstepForm(policy, sampling, chat.pad_id, "lockstep")
    yield LockstepForm(policy, sampling, chat.pad_id, "uncached")


@dataclass(frozen=True)
class _Check:
    policy: Policy
    chat: Chat

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts that need padding, whose rows grow longer than the model's (narrowed) windows."""
        size = self.policy.model.config.get_text_config().vocab_size
        draw = torch.Generator().manual_seed(0)
        first = min(3, size - 1)  # the first ids are those of special tokens in most vocabularies
        return [torch.randint(first, size, (n,), generator=draw).tolist() for n in prompt_lengths(self.policy)]

    @torch.no_grad()
    def problem(self, form: DecodingForm) -> str | None:
        """What is wrong with a form, or None."""
        draw = torch.Generator().manual_seed(1)
        sampling = Sampling(max_new_tokens=NUM_TOKENS, temperature=self.policy.temperature)
        worst = 0.0
        for group_size in (1, 2):
            uniforms = torch.rand(len(self.prompts) * group_size, NUM_TOKENS, generator=draw, dtype=torch.float64)
            # Replies have different lengths, so that rows of ended replies are freed while others continue.
            limits = NUM_TOKENS - torch.arange(len(uniforms)) % (NUM_TOKENS - 1)
            replies = ReplyBuffer(uniforms, sampling, self.chat, limits, stop_ids=())
            with using(self.policy.model, self.policy.adapter):
                try:
                    form.decode(self.prompts, group_size, replies)
                except Exception as error:  # whatever it is, the next form may not raise it
                    return f"{type(error).__name__}: {first_line(error):.100}"
                worst = max(worst, self._difference(replies.finished(), group_size))
        return None if worst <= 1 else f"differs from the model's own logits by {worst * MAX_DIFFERENCE:.2g} nats"

    def _difference(self, drawn: Sequence[SampledReply], group_size: int) -> float:
        """The largest difference of a drawn log-probability from the model's own, in units of the largest allowed."""
        worst = 0.0
        for i, (ids, logprobs, _) in enumerate(drawn):
            logits = own_logits(self.policy.model, [*self.prompts[i // group_size], *ids], len(ids))
            logits = logits / self.policy.temperature
            own = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            allowed = MAX_DIFFERENCE * logits.std(-1).clamp(1e-2, 1.0).min()
            difference = float((torch.tensor(logprobs) - own).abs().max() / allowed)
            worst = max(worst, math.inf if math.isnan(difference) else difference)
        return worst


def own_logits(model: PreTrainedModel, ids: Sequence[int], num: int) -> Tensor:
    """[num, V] the model's own logits that predict the last `num` tokens of a row."""
    with own_attention(model):
        input_ids = to_device(torch.tensor([list(ids)]), model.device)
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits[0]
    return logits[-num - 1 : -1].float().cpu()


def prompt_lengths(policy: Policy) -> list[int]:
    """Lengths of prompts that need padding. One is longer than the windows of the comparison from the start, the others
    become so with their replies. If the model has few positions, the lengths are limited to them."""
    limits = [n for n in (learned_positions(policy.model), policy.length_limit) if n is not None]
    room = min(limits, default=1 << 30) - NUM_TOKENS
    return [max(1, min(length, room)) for length in (12, 2, 7)]
