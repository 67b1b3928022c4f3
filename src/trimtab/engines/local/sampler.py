"""The local generator: samples replies with the weights being trained, and needs nothing but torch and transformers.

The form of decoding is chosen for a model before the first reply (`form_choice.py`): slots that are refilled
(`slots.py`), padded rows (`padded.py`), or rows in lockstep (`lockstep.py`). They give the same replies at different
speeds, and each is used only for models whose probabilities it gets right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.core import seeds
from trimtab.core.errors import ConfigError, DataError, EngineError
from trimtab.core.types import Prompt, Rollout
from trimtab.data.chat import Chat
from trimtab.engines.local.agreement import logprob_difference, refuse_difference
from trimtab.engines.local.form_choice import FormChoice, choose_form
from trimtab.engines.local.replies import ReplyBuffer, SampledReply, Sampling
from trimtab.engines.local.slots import SlotForm
from trimtab.engines.local.token_sets import stop_ids, unnamed_tokens
from trimtab.models.adapters import using
from trimtab.models.own_forward import learned_positions
from trimtab.models.precision import computing_in
from trimtab.models.roles import Policy

__all__ = ["LocalSampler", "ReplyBuffer", "SampledReply", "Sampling", "reply_names"]


class LocalSampler:
    """Samples from the policy with its weights at the time of each call."""

    def __init__(
        self, policy: Policy, chat: Chat, sampling: Sampling, *, choice: FormChoice | None = None, watched: bool = True
    ) -> None:
        """`choice` comes from another sampler of the same policy; without it, the form is chosen when first needed. If
        `watched`, every batch is compared with the policy here; if not, the caller does so."""
        self.policy = policy
        self.chat = chat
        self.sampling = sampling
        self._choice = choice
        self._watched = watched
        self.difference = 0.0
        """The largest difference between sampler and policy at one token, in nats, in the last comparison."""
        self.stop_ids = stop_ids(policy, chat)
        """Tokens that end a reply."""
        self._unnamed = unnamed_tokens(policy, chat)
        self.positions = learned_positions(policy.model)
        """The largest number of tokens of prompt and reply together; None if there is no limit."""

    @property
    def choice(self) -> FormChoice:
        """How this model is decoded, and why not faster. Raises EngineError if no form is right."""
        if self._choice is None:
            self._choice = choose_form(self.policy, self.sampling, self.chat)
        return self._choice

    @property
    def method(self) -> str:
        """The name of the form of decoding."""
        return self.choice.form.name

    @property
    def _name(self) -> str:
        return f"the sampler ({self.sampler}), architecture {type(self.policy.model).__name__}"

    @property
    def sampler(self) -> str:
        """The name of the form, and whether its steps are compiled or in another precision than float32, such as
        "fused, compiled"."""
        form, precision = self.choice.form, self.sampling.precision
        with computing_in(precision, self.policy.device.type):
            compiled = isinstance(form, SlotForm) and form.kernels.compiled
        return form.name + ", compiled" * compiled + f", {precision}" * (precision != "float32")

    @property
    def may_draw_meanwhile(self) -> bool:
        """False: it samples from the policy itself."""
        return False

    def sync(self) -> None:
        """Does nothing, since it shares the policy's weights."""

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> list[Rollout]:
        """`group_size` rollouts for each prompt. Every reply has its own random numbers, made from the seed, its
        prompt's id and its number in the group, so batch size and order of prompts do not change what is drawn."""
        encoded = self.encode(prompts)
        self.check_cache(encoded, group_size)
        uniforms = self.uniforms(prompts, group_size=group_size, seed=seed)
        return [
            Rollout(
                prompt=prompts[i // group_size],
                response=self.text(ids),
                prompt_ids=tuple(encoded[i // group_size]),
                response_ids=tuple(ids),
                logprobs=tuple(logprobs),
                finish_reason="stop" if stopped else "length",
            )
            for i, (ids, logprobs, stopped) in enumerate(
                self.continue_ids(encoded, group_size=group_size, uniforms=uniforms)
            )
        ]

    def uniforms(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> Tensor:
        """[prompts * group_size, max_new_tokens] the random numbers of each reply, one for each token."""
        names = reply_names(prompts, group_size)
        uniforms = np.empty((len(names), self.sampling.max_new_tokens))
        for i, name in enumerate(names):
            uniforms[i] = seeds.generator(seed, *name).random(self.sampling.max_new_tokens)
        return torch.from_numpy(uniforms)

    def continue_ids(
        self,
        prefixes: Sequence[Sequence[int]],
        *,
        group_size: int,
        uniforms: Tensor,
        limits: Tensor | None = None,
    ) -> list[SampledReply]:
        """`group_size` continuations of each prefix, in order. Takes and returns token ids; no text is involved.

        `uniforms` [B, T] are the random numbers; `limits` [B] are the most tokens of each, T by default.
        """
        if not prefixes:
            return []
        widths = [uniforms.shape[1]] * len(prefixes) if limits is None else limits.view(-1, group_size).amax(1).tolist()
        lengths = zip(map(len, prefixes), widths, strict=True)
        self.check_room(*max(lengths, key=sum))
        replies = ReplyBuffer(uniforms, self.sampling, self.chat, limits, stop_ids=self.stop_ids, unnamed=self._unnamed)
        self._decode(prefixes, group_size, replies)
        if self._watched:
            self.difference = logprob_difference(self.policy, prefixes, group_size, replies)
            refuse_difference(self.difference, self.policy.precision, self.sampling.precision, where=self._name)
        return replies.finished()

    def _decode(self, prefixes: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """Fills `replies` by the form of decoding, with the policy's adapter active and products in its precision."""
        policy, precision, form = self.policy, self.sampling.precision, self.choice.form  # chosen in float32
        with torch.no_grad(), using(policy.model, policy.adapter), computing_in(precision, policy.device.type):
            form.decode(prefixes, group_size, replies)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of each prompt. Raises DataError for one that is too long."""
        encoded = self.chat.prompt_ids([prompt.messages for prompt in prompts])
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > self.sampling.max_prompt_tokens:
                raise DataError(
                    f"a prompt of {len(ids)} tokens; the longest allowed is {self.sampling.max_prompt_tokens}",
                    where=f"prompt {prompt.id}: {prompt.text[:60]!r}",
                    fix="raise sampling.max_prompt_tokens, or drop long prompts with max_prompt_tokens of the data",
                )
        return encoded

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raises an error if the longest prompt leaves no room for the longest reply. A stage calls this before it
        begins."""
        if self.positions is not None or self.policy.length_limit is not None:
            longest = max(self.chat.prompt_lengths(prompts), default=0)
            self.check_room(longest, self.sampling.max_new_tokens)

    def check_room(self, longest_prompt: int, longest_reply: int) -> None:
        """Raises ConfigError if this many tokens need more positions than the model has learned, and EngineError if
        their probabilities would depend on how long the reply becomes."""
        num = longest_prompt + longest_reply
        asked = f"a prompt of {longest_prompt} tokens and a reply of up to {longest_reply} need {num} positions"
        stretched = self.policy.length_limit
        room = min(n for n in (self.positions, stretched, num) if n is not None) - longest_prompt
        fix = f"set sampling.max_new_tokens to at most {room}" if room > 0 else "use shorter prompts"
        fix += ", or leave long prompts out with sampling.max_prompt_tokens"
        if self.positions is not None and num > self.positions:
            raise ConfigError(
                f"{asked}; the model has {self.positions}",
                where="sampling.max_new_tokens and the longest prompt",
                fix=fix,
            )
        if stretched is not None and num > stretched:
            raise EngineError(
                f"{asked}; past {stretched} the positions of this model depend on the length of the whole row, so a "
                "token would be scored by other numbers than it was drawn by",
                where=f"sampling.max_new_tokens, architecture {type(self.policy.model).__name__}",
                fix=fix,
            )

    def check_cache(self, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        """Raises EngineError if the cache cannot hold one prompt and its replies. Called before anything as wide as a
        reply is allocated."""
        if prompts and isinstance(self.choice.form, SlotForm):
            self.choice.form.num_groups(prompts, group_size, self.sampling.max_new_tokens)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a reply, without its end token and up to the first stop text."""
        ended = len(ids) > 0 and ids[-1] in self.stop_ids
        text = self.chat.decode_response(ids[:-1] if ended else ids)
        return text[: min((at for s in self.sampling.stop if (at := text.find(s)) >= 0), default=len(text))]


def reply_names(prompts: Sequence[Prompt], group_size: int) -> list[tuple[str, int, int]]:
    """A name for each reply, from which its random numbers are made: its prompt's id, how often that prompt occurred
    before, and the reply's number in its group."""
    seen: dict[str, int] = {}
    names = []
    for prompt in prompts:
        repeat = seen[prompt.id] = seen.get(prompt.id, -1) + 1
        names += [(prompt.id, repeat, g) for g in range(group_size)]
    return names
