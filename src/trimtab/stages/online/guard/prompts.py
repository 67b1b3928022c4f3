"""The prompts of all checks: from a source of their own, or held out of those that a run trains on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.core import seeds
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Prompt, prompt_id
from trimtab.data.chat import Chat
from trimtab.rewards.combined import refuse_missing_facts
from trimtab.runs.run import Run
from trimtab.stages.online.guard.independence import different
from trimtab.stages.online.guard.settings import GuardSettings
from trimtab.stages.reading import read


@dataclass(frozen=True)
class GuardPrompts:
    """The prompts of a run with a guard."""

    checks: Sequence[Prompt]
    """The prompts of every check, in their order."""
    training: Sequence[Prompt]
    """The prompts that are trained on."""
    num_trained_on: int
    """How many prompts of the checks are among them."""


def prompts_of_guard(
    guard: GuardSettings, training: Sequence[Prompt], run: Run, chat: Chat, *, longest: int, least: int, seed: int
) -> GuardPrompts:
    """The prompts of checks, of at most `longest` tokens, and those to train on, of which there have to be `least`.

    A prompt that the source has twice is asked once. Raises DataError if there are too few for checks, or if one lacks
    a fact that the measure compares with, and ConfigError if too few are left.
    """
    if guard.prompts is None:
        chosen, rest = _held_out(training, guard.num_prompts, seed=seed)
        if len(rest) < least:
            raise ConfigError(
                f"guard.num_prompts = {guard.num_prompts} of {len(training)} prompts leave {len(rest)} to train on, "
                f"and a step takes {least}",
                where="guard.num_prompts and prompts",
                fix="give more prompts, or name a source for the guard's own: guard.prompts",
            )
    else:
        found = read(Prompt, guard.prompts, run, limit=guard.num_prompts, accepts=chat.refusal).records
        short = [prompt for prompt in found if len(chat.encode_prompt(prompt.messages)) <= longest]
        chosen = different(short)
        if num := len(short) - len(chosen):
            print(f"note: {num} of {len(short)} prompts of the guard repeat another and are left out", file=sys.stderr)
        rest = list(training)
    where = guard.prompts or "the prompts held out for the guard"
    if len(chosen) < guard.least_prompts:
        raise DataError(
            f"{len(chosen)} different prompts for the guard, which needs at least {guard.least_prompts}"
            f"{' to act on a fall' if guard.actions else ''}",
            where=where,
            fix="give more prompts, or raise sampling.max_prompt_tokens",
        )
    measure = {f"guard.measure.{number}": reward for number, reward in enumerate(guard.measure)}
    refuse_missing_facts(measure, chosen, where=where)
    trained = {prompt_id(prompt.messages) for prompt in rest}
    num_trained_on = sum(prompt_id(prompt.messages) in trained for prompt in chosen)
    if num_trained_on:
        print(f"note: {num_trained_on} of {len(chosen)} prompts of the guard are trained on too", file=sys.stderr)
    return GuardPrompts(chosen, rest, num_trained_on)


def _held_out(prompts: Sequence[Prompt], num: int, *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """`num` different prompts, drawn by the seed, and all that are none of these."""
    able = list({prompt_id(prompt.messages): prompt for prompt in prompts}.items())
    order = seeds.generator(seed, "guard", "prompts").permutation(len(able))[:num]
    chosen = dict(able[i] for i in sorted(order.tolist()))
    return list(chosen.values()), [prompt for prompt in prompts if prompt_id(prompt.messages) not in chosen]
