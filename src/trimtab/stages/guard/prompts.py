"""The prompts of all checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.core.errors import DataError
from trimtab.core.terminal import note
from trimtab.core.types import Prompt, prompt_id
from trimtab.data.chat import Chat
from trimtab.rewards.combined import refuse_missing_facts
from trimtab.runs.run import Run
from trimtab.stages.guard.settings import GuardSettings
from trimtab.stages.reading import read, say_prompts_left_out


@dataclass(frozen=True)
class GuardPrompts:
    """The prompts of a run with a guard."""

    checks: Sequence[Prompt]
    """The prompts of every check, in their order."""
    num_trained_on: int
    """How many of them are trained on."""


def read_checks(guard: GuardSettings, source: str, run: Run, chat: Chat, *, longest: int) -> list[Prompt]:
    """The prompts of `source`, of at most `longest` tokens; one that the source has twice is asked once."""
    found = read(Prompt, source, run, limit=guard.num_prompts, accepts=chat.refusal).records
    return different(found, chat, longest=longest, where=source)


def different(prompts: Sequence[Prompt], chat: Chat, *, longest: int, where: str) -> list[Prompt]:
    """The prompts of at most `longest` tokens without repetitions, the first of each, since an interval over prompts
    counts every one as another. How many repeat another is said on stderr."""
    lengths = chat.prompt_lengths(prompts)
    short = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= longest]
    say_prompts_left_out({"dropped_long_prompts": len(prompts) - len(short)}, len(prompts), longest=longest)
    found: dict[str, Prompt] = {}
    for prompt in short:
        found.setdefault(prompt_id(prompt.messages), prompt)
    if num := len(short) - len(found):
        note(f"{where}: {num} of {len(short)} prompts repeat another and are left out")
    return list(found.values())


def check_prompts(
    guard: GuardSettings, chosen: Sequence[Prompt], *, where: str, is_trained: Callable[[Prompt], bool]
) -> GuardPrompts:
    """The prompts of checks with the number of those that are trained on, which is said on stderr.

    Raises DataError if there are too few, or if one lacks a fact that the measure compares with.
    """
    if len(chosen) < guard.least_prompts:
        raise DataError(
            f"{len(chosen)} different prompts for the guard, which needs at least {guard.least_prompts}"
            f"{' to act on a fall' if guard.actions else ''}",
            where=where,
            fix="give more prompts, or raise sampling.max_prompt_tokens",
        )
    measure = {f"guard.measure.{number}": reward for number, reward in enumerate(guard.measure)}
    refuse_missing_facts(measure, chosen, where=where)
    if num := sum(map(is_trained, chosen)):
        note(f"{num} of {len(chosen)} prompts of the guard are trained on too")
    return GuardPrompts(chosen, num)
