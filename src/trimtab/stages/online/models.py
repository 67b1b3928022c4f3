"""The four models of the online loop: as models of their own, or as adapters and heads on one frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core import seeds
from trimtab.core.errors import ConfigError
from trimtab.core.hub import base_of, on_base, same_model
from trimtab.data.chat import Chat
from trimtab.models.adapters import add_adapter, load_adapter, refuse_other_shape
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.quantized import quantize
from trimtab.models.roles import Policy, ScalarModel, head_of_weights, zero_head
from trimtab.models.vocabulary import refuse_other_vocabulary
from trimtab.rewards.combined import CombinedReward, load_rewards
from trimtab.stages.online.settings import OnlineSettings


@dataclass(frozen=True)
class Models:
    """Policy, reference, critics and rewards, loaded. The critic is the policy if it is a head on the policy, and None
    if the advantages need no critic."""

    policy: Policy
    reference: Policy
    critic: Policy | ScalarModel | None
    rewards: CombinedReward
    base: str
    """The model that the policy's adapter belongs to; without adapters, the model that the policy started from."""
    cost_critic: ScalarModel | None = None
    """The critic of a limited cost, if there is one and the advantages need a critic."""

    @property
    def roles(self) -> dict[str, Policy | ScalarModel]:
        """Policy, reference and critics of their own, by name."""
        own = {} if self.critic in (None, self.policy) else {"critic": self.critic}
        cost = {} if self.cost_critic is None else {"cost_critic": self.cost_critic}
        return {"policy": self.policy, "reference": self.reference} | own | cost


def load_models(settings: OnlineSettings, chat: Chat, *, with_rewards: bool = True) -> Models:
    """Every model that the settings name; without the rewards for a process that does not judge. Raises an error with
    its fix for whatever does not fit together."""
    make = full_models if settings.adapter is None else shared_models
    return make(settings, chat, with_rewards=with_rewards)


def load_roles(settings: OnlineSettings, _directory: Path) -> tuple[str, dict[str, Policy | ScalarModel]]:
    """The tokenizer and the roles by name; see `Engines.start`."""
    return settings.model, load_models(settings, Chat(load_tokenizer(settings.model)), with_rewards=False).roles


def full_models(settings: OnlineSettings, chat: Chat, *, with_rewards: bool) -> Models:
    """The models without adapters: each role is a model of its own."""
    options: dict[str, Any] = {"pad_id": chat.pad_id, "temperature": settings.sampling.temperature}
    value_head = settings.advantage.needs_critic and settings.critic.init == "value_head"
    device = settings.engine.find_device()
    policy = Policy(load_causal(settings.model, device=device), with_value_head=value_head, **options)
    reference = Policy(_other_causal(settings.reference or settings.model, chat, device), **options)
    reference.requires_grad_(False)

    def critic_from(start: str, name: str) -> ScalarModel:
        refuse_other_vocabulary(chat.tokenizer, start, role="critic" if name == "critic" else "cost.critic")
        head_seed = seeds.derive(settings.seed, name)
        model = load_scalar(start, head_seed=head_seed, zero_head=True, device=device)
        return ScalarModel(model, pad_id=chat.pad_id, gives="values")

    critic: Policy | ScalarModel | None = policy if value_head else None
    if settings.has_own_critic:
        critic = critic_from(settings.critic_start(), "critic")
    start = settings.cost_critic_start
    cost_critic = critic_from(start, "cost_critic") if start is not None else None
    rewards = _rewards(settings) if with_rewards else CombinedReward([])
    return Models(policy, reference, critic, rewards, settings.model, cost_critic)


def _other_causal(path: str, chat: Chat, device: torch.device) -> PreTrainedModel:
    """A reference with weights of its own, which has to read the policy's token ids."""
    refuse_other_vocabulary(chat.tokenizer, path, role="reference")
    return load_causal(path, device=device)


def shared_models(settings: OnlineSettings, chat: Chat, *, with_rewards: bool) -> Models:
    """The models as adapters on one frozen base. The reference of a new adapter is the base itself; the reference of an
    adapter that was trained before is a copy of that adapter."""
    assert settings.adapter is not None
    lora, base = settings.adapter, base_of(settings.model) or settings.model
    if base_of(settings.model):
        refuse_other_shape(settings.model, lora)
    device = settings.engine.find_device()
    shared = load_causal(base, device=device)
    quantize(shared, lora.base_bits)

    heads: dict[str, dict[str, Tensor]] = {}
    """The score heads that adapters brought, by the name of the adapter."""

    def adapter(name: str, path: str | None) -> str:
        if path is not None:
            heads[name] = load_adapter(shared, name, path, with_head=name in ("critic", "cost_critic"))
        else:
            add_adapter(shared, name, lora, seed=seeds.derive(settings.seed, "adapter", name))
        return name

    options: dict[str, Any] = {"pad_id": chat.pad_id, "temperature": settings.sampling.temperature}
    value_head = settings.advantage.needs_critic and settings.critic.init == "value_head"
    policy = Policy(
        shared,
        adapter=adapter("policy", settings.model if base_of(settings.model) else None),
        with_value_head=value_head,
        **options,
    )
    reference_path = settings.reference or settings.model
    if same_model(reference_path, base):
        reference = Policy(shared, adapter=None, **options)
    elif on_base(reference_path, base):
        reference = Policy(shared, adapter=adapter("reference", reference_path), **options)
    else:
        reference = Policy(_other_causal(reference_path, chat, device), **options)
        reference.requires_grad_(False)

    def critic_from(start: str, role: str, *, fix: str) -> ScalarModel:
        if not same_model(start, base) and not on_base(start, base):
            raise ConfigError(
                f"the critic is to start from {start!r}, which is no adapter of {base!r}",
                where=f"{'critic' if role == 'critic' else 'cost.critic'} and adapter",
                fix=f"train the reward model with an adapter on that base, or set {fix}",
            )
        name = adapter(role, start if on_base(start, base) else None)
        # A critic that starts from a reward model also starts from its head, as a critic with weights of its own does.
        brought = heads.get(name, {})
        head = head_of_weights(brought, shared.device) if "score.weight" in brought else zero_head(shared)
        return ScalarModel(shared, pad_id=chat.pad_id, adapter=name, head=head, gives="values")

    critic: Policy | ScalarModel | None = policy if value_head else None
    if settings.has_own_critic:
        critic = critic_from(settings.critic_start(), "critic", fix="critic.init = 'policy'")
    start = settings.cost_critic_start
    fix = "cost.critic to the policy"
    cost_critic = critic_from(start, "cost_critic", fix=fix) if start is not None else None
    rewards = _rewards(settings, shared, base) if with_rewards else CombinedReward([])
    return Models(policy, reference, critic, rewards, base, cost_critic)


def _rewards(settings: OnlineSettings, shared: PreTrainedModel | None = None, base: str = "") -> CombinedReward:
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": settings.engine.find_device()}
    cost = settings.cost.reward if settings.cost else None
    return load_rewards(settings.rewards, combine=settings.combine, cost=cost, shared=shared, base=base, **options)
