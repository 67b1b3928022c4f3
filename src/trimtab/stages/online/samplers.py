"""Makes the samplers that draw rollouts from the policy, in one turn or in an environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.core.types import Prompt
from trimtab.data.chat import Chat
from trimtab.engines.base import Sampler
from trimtab.engines.episodes import EpisodeSampler
from trimtab.engines.local.form_choice import FormChoice
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

    def make(sampling: Sampling, choice: FormChoice | None = None) -> tuple[Sampler, LocalSampler]:
        """The sampler, and the one that draws its turns, which is itself if there is no environment."""
        # The step itself compares sampler and policy on every reply. It cannot with truncation, because the two are
        # different distributions, nor if it trains on rollouts of older weights; then the sampler does, when it draws.
        watched = (sampling.truncates and settings.correction is None) or settings.engine.max_staleness > 0
        options: dict[str, Any] = {"choice": choice, "watched": watched}
        if environment is None:
            made = make_sampler(policy, chat, sampling, **options)
            return made, made
        options["make"] = make_sampler
        episodes = EpisodeSampler(policy, chat, sampling, environment, settings.episodes, **options)
        return episodes, episodes.generator

    sampler, turns = make(settings.sampling)
    choice = turns.choice  # now, while the policy has all its weights: a learner may spread them over processes
    turns.check_prompts(prompts)
    if not settings.advantage.needs_greedy:
        return sampler, None
    return sampler, make(replace(settings.sampling, top_k=1), choice)[0]
