"""Episodes: replies in several turns, with observations of an environment in between.

Turns are joined as token ids, not as text: sampled tokens keep their ids, an observation is encoded once and appended,
and the next turn continues from those ids. Nothing is rendered or tokenised again, so the sequence that is trained on
is the one that was sampled from. All episodes of a batch take a turn together. Every turn computes the whole sequence
so far again; keeping the keys and values of earlier turns would save that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.core import seeds
from trimtab.core.bounds import refuse_out_of_range
from trimtab.core.errors import EngineError, TrimtabError
from trimtab.core.types import FinishReason, Observation, Prompt, Rollout
from trimtab.data.chat import Chat
from trimtab.engines.base import Environment
from trimtab.engines.local.form_choice import FormChoice
from trimtab.engines.local.sampler import LocalSampler, SampledReply, Sampling, reply_names
from trimtab.models.roles import Policy

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """Limits at which an episode is cut off. `sampling.max_new_tokens` bounds all of its tokens, also observations."""

    max_turns: int = 8
    """Turns of the policy; an episode that would continue after them is cut off."""
    max_observation_tokens: int = 256
    """Tokens of one observation; a longer one is cut off, and counted."""

    def __post_init__(self) -> None:
        refuse_out_of_range(self, "max_turns", "max_observation_tokens")


@dataclass
class Episode:
    """A reply while it is being written."""

    prompt: Prompt
    prompt_ids: list[int]
    state: Any
    """The state of the environment."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    observations: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""
    events: Counter[str] = field(default_factory=Counter)
    finish_reason: FinishReason | None = None
    """None while the episode continues."""

    def observe(self, ids: Sequence[int], text: str) -> None:
        """Appends tokens and text that the policy did not choose."""
        if ids:
            self.observations.append((len(self.ids), len(self.ids) + len(ids)))
            self.ids += ids
        self.text += text

    def rollout(self) -> Rollout:
        """The finished episode as a rollout."""
        assert self.finish_reason is not None
        return Rollout(
            prompt=self.prompt,
            response=self.text,
            prompt_ids=tuple(self.prompt_ids),
            response_ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            observations=tuple(self.observations),
            events=dict(self.events),
        )


class EpisodeSampler:
    """Samples episodes with the local generator. A rollout's text is the whole episode, with observations and stop
    texts; its last token is always the policy's.

    Events of every rollout: `turns`, `observation_tokens`, `cut_observations`, `out_of_turns` and `out_of_tokens` (0 or
    1 each, the reason of a cut-off), and whatever the environment counts.
    """

    def __init__(
        self,
        policy: Policy,
        chat: Chat,
        sampling: Sampling,
        environment: Environment,
        limits: EpisodeLimits,
        *,
        choice: FormChoice | None = None,
        watched: bool = False,
        make: Callable[..., LocalSampler] = LocalSampler,
    ) -> None:
        """`choice` and `watched` mean the same as for `LocalSampler`, and `make` makes the sampler of the turns."""
        stopping = replace(sampling, stop=(*sampling.stop, *environment.stop))
        self.generator = make(policy, chat, stopping, choice=choice, watched=watched)
        self.chat = chat
        self.environment = environment
        self.limits = limits
        self.max_tokens = sampling.max_new_tokens

    @property
    def sampler(self) -> str:
        """How the turns are decoded, for the run's records."""
        return f"{self.generator.sampler}, turn by turn"

    @property
    def may_draw_meanwhile(self) -> bool:
        """False: the environment is the user's code, and is called by the thread that updates the policy."""
        return False

    def sync(self) -> None:
        """Gives the sampler of the turns the policy's weights as they are now."""
        self.generator.sync()

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, seed: int) -> list[Rollout]:
        """`group_size` episodes for each prompt. The n-th token that the policy chooses in an episode has its own
        random number, whatever was observed before, and the environment has its own seed, so batch size and order of
        prompts do not change the episodes."""
        encoded = self.generator.encode(prompts)
        self.generator.check_cache(encoded, group_size)
        uniforms = self.generator.uniforms(prompts, group_size=group_size, seed=seed)
        episodes = []
        for i, name in enumerate(reply_names(prompts, group_size)):
            prompt = prompts[i // group_size]
            reset = partial(self.environment.reset, prompt, seed=seeds.derive(seed, "environment", *name))
            state = asked(prompt, reset)
            episodes.append(Episode(prompt, encoded[i // group_size], state))
        drawn = self.generator.continue_ids(encoded, group_size=group_size, uniforms=uniforms)
        going = list(range(len(episodes)))
        while going:
            for i, turn in zip(going, drawn, strict=True):
                self._take(episodes[i], turn)
            going = [i for i in going if episodes[i].finish_reason is None]
            drawn = self._next_turns([episodes[i] for i in going], uniforms[going])
        return [episode.rollout() for episode in episodes]

    def _next_turns(self, episodes: Sequence[Episode], uniforms: Tensor) -> list[SampledReply]:
        limits = torch.tensor([self.max_tokens - len(e.ids) for e in episodes], dtype=torch.int64)
        rows = torch.zeros_like(uniforms)
        for row, numbers, episode in zip(rows, uniforms, episodes, strict=True):
            used = len(episode.logprobs)
            row[: len(numbers) - used] = numbers[used:]
        prefixes = [e.prompt_ids + e.ids for e in episodes]
        return self.generator.continue_ids(prefixes, group_size=1, uniforms=rows, limits=limits)

    def _take(self, episode: Episode, turn: SampledReply) -> None:
        """Adds one turn of the policy and the environment's answer to it."""
        ids, logprobs, stopped = turn
        text = self.chat.decode_response(ids)
        episode.ids += ids
        episode.logprobs += logprobs
        episode.text += text
        episode.events.update(turns=1, observation_tokens=0, cut_observations=0, out_of_turns=0, out_of_tokens=0)
        if not stopped:
            episode.events["out_of_tokens"] += 1
            episode.finish_reason = "length"
            return
        observation = asked(episode.prompt, partial(self.environment.step, episode.state, text))
        if not isinstance(observation, Observation):
            raise EngineError(
                f"the environment answered with {observation!r}, which is no Observation",
                where=f"prompt {episode.prompt.id}",
                fix="return trimtab.core.types.Observation(text=…) from its step",
            )
        episode.events.update(observation.events)
        if observation.done:
            episode.finish_reason = "stop"
        elif episode.events["turns"] == self.limits.max_turns:
            episode.events["out_of_turns"] += 1
            episode.finish_reason = "length"
        else:
            self._observe(episode, observation, ended=ids[-1] in self.generator.stop_ids)

    def _observe(self, episode: Episode, observation: Observation, *, ended: bool) -> None:
        """Appends an observation. The episode is cut off if there is no room for it and one more token."""
        text = observation.text
        ids = self.chat.encode_inline(text)
        if len(ids) > self.limits.max_observation_tokens:
            episode.events["cut_observations"] += 1
            ids = ids[: self.limits.max_observation_tokens]
            text = self.chat.decode_response(ids).rstrip("\N{REPLACEMENT CHARACTER}")  # the cut may split a character
        if ended or observation.new_turn:
            ids = self.chat.encode_user_turn(text, ended=ended)
            text = f"\n\n{text}\n\n"
        if len(episode.ids) + len(ids) >= self.max_tokens:
            episode.events["out_of_tokens"] += 1
            episode.finish_reason = "length"
            return
        episode.events["observation_tokens"] += len(ids)
        episode.observe(ids, text)


def asked(prompt: Prompt, question: Callable[[], T]) -> T:
    """The environment's answer. If the environment raises an exception, raises EngineError that names the prompt: it
    should report failures of its tools to the policy itself, so any other exception is a mistake in its code."""
    try:
        return question()
    except TrimtabError:
        raise
    except Exception as error:
        raise EngineError(
            f"the environment raised {type(error).__name__}: {error}",
            where=f"prompt {prompt.id}: {prompt.text[:60]!r}",
            fix="mend its code; what the policy did wrong is to be told as an Observation",
        ) from error
