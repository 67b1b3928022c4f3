"""The forms of decoding of this package in a process of their own, with weights that arrive as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.data.chat import Chat
from trimtab.engines.local.form_choice import choose_form
from trimtab.engines.local.replies import DecodingForm, ReplyBuffer, Sampling
from trimtab.engines.samplers.weights import SamplerStart
from trimtab.models.adapters import adapter_weights, load_adapter, using
from trimtab.models.load import load_causal
from trimtab.models.precision import computing_in
from trimtab.models.roles import Policy


class OwnForm:
    """Decodes as `LocalSampler` does; see `DecodingForm`."""

    name = "process"

    def __init__(self, start: SamplerStart, chat: Chat) -> None:
        torch.set_num_threads(start.threads)
        self.start = start
        self.chat = chat
        self.policy = self._load(start.model)
        self._forms: dict[Sampling, DecodingForm] = {}

    def _load(self, path: str) -> Policy:
        model = load_causal(path, device=torch.device(self.start.device))
        return Policy(model, pad_id=self.chat.pad_id, temperature=self.start.temperature)

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """Draws `group_size` replies to each prompt into `replies`; see `DecodingForm`."""
        sampling, policy = replies.sampling, self.policy
        if sampling not in self._forms:
            self._forms[sampling] = choose_form(policy, sampling, self.chat).form
        with torch.no_grad(), using(policy.model, policy.adapter), computing_in(sampling.precision, policy.device.type):
            self._forms[sampling].decode(prompts, group_size, replies)

    @torch.no_grad()
    def update(self, directory: Path, revision: int) -> None:
        """Takes the weights or the adapter in `directory`. Raises EngineError if they do not fit."""
        if not self.start.rank:
            new = dict(self._load(str(directory)).model.named_parameters())
            for name, weight in self.policy.model.named_parameters():
                weight.copy_(new[name])
        elif self.policy.adapter is None:
            load_adapter(self.policy.model, "policy", directory)
            self.policy.adapter = "policy"
        else:
            from peft import set_peft_model_state_dict

            weights = {key.removeprefix("base_model.model."): w for key, w in adapter_weights(directory).items()}
            found: Any = set_peft_model_state_dict(self.policy.model, weights, adapter_name="policy")
            assert not found.unexpected_keys, found.unexpected_keys
