"""Makes the samplers that draw rollouts from the policy, in one turn or in an environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.core.types import Prompt
from trimtab.data.chat import Chat
from trimtab.engines.base import Sampler
from trimtab.engines.episodes import EpisodeSampler
from trimtab.engines.local.form_choice import choose_form
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.roles import Policy
from trimtab.stages.online.settings import OnlineSettings


def make_samplers(
    settings: OnlineSettings,
    policy: Policy,
    chat: Chat,
    prompts: Sequence[Prompt],
    make_sampler: Callable[..., LocalSampler] = LocalSampler,
) -> tuple[Sampler, Sampler | None]:
    """The sampler of rollouts, and the sampler of the likeliest replies if the advantages compare with them;
    `make_sampler` is that of the engines. Raises an error with its fix if the longest prompt leaves no room for a
    reply."""
    environment = settings.environment.load() if settings.environment is not None else None
    choice = choose_form(policy, settings.sampling, chat)

    def make(sampling: Sampling) -> Sampler:
        # The step itself compares sampler and policy on every reply. With truncation it cannot, because the two are
        # different distributions; then the sampler does.
        options: dict[str, Any] = {"choice": choice, "watched": sampling.truncates and settings.correction is None}
        if environment is None:
            return make_sampler(policy, chat, sampling, **options)
        options["make"] = make_sampler
        return EpisodeSampler(policy, chat, sampling, environment, settings.episodes, **options)

    LocalSampler(policy, chat, settings.sampling, choice=choice).check_prompts(prompts)
    greedy = make(replace(settings.sampling, top_k=1)) if settings.advantage.needs_greedy else None
    return make(settings.sampling), greedy
