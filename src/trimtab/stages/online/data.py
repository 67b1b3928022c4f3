"""Reads the data of online training: prompts, those of the guard, and the demonstrations of the pretraining mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.batches.trees import Tree
from trimtab.core import seeds
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.terminal import note
from trimtab.core.types import Prompt, prompt_id
from trimtab.data.chat import Chat
from trimtab.rewards.combined import judges, refuse_missing_facts, refuse_unread_flags
from trimtab.runs.run import Run
from trimtab.stages.guard.prompts import GuardPrompts, check_prompts, read_checks
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import endless
from trimtab.stages.reading import read, read_demonstration_trees, say_prompts_left_out
from trimtab.stages.rehearsal import UNKNOWN, largest_step, steps_rehearsed
from trimtab.stages.stage import FEW_STEPS


@dataclass(frozen=True)
class OnlineData:
    """The data of a run."""

    prompts: list[Prompt]
    """Those to train on."""
    checks: GuardPrompts
    """Those of the guard; none without one."""
    demonstrations: Sequence[Tree]
    """Those of the pretraining mix; none without one."""
    counts: dict[str, int]
    """What was read and left out."""

    @property
    def every_prompt(self) -> list[Prompt]:
        """All prompts that are answered."""
        return [*self.prompts, *self.checks.checks]


def read_data(settings: OnlineSettings, chat: Chat, run: Run) -> OnlineData:
    """Everything that the run reads. Raises an error with its fix if one of the parts is too little."""
    counts: dict[str, int] = {}
    prompts = read_prompts(settings, chat, run, counts)
    checks, prompts = guard_prompts(settings, prompts, run, chat)
    return OnlineData(prompts, checks, read_mix(settings, chat, run, counts), counts)


def read_prompts(settings: OnlineSettings, chat: Chat, run: Run, counts: dict[str, int]) -> list[Prompt]:
    """The prompts that are short enough. Dropped prompts are counted, and reported on stderr if they are more than a
    few.

    Raises DataError if none is left, and ConfigError if they are fewer than a step takes."""
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "accepts": chat.refusal}
    loaded = read(Prompt, settings.prompts, run, limit=settings.limit, **options)
    longest = settings.sampling.max_prompt_tokens
    lengths = chat.prompt_lengths(loaded.records)
    kept = [i for i, length in enumerate(lengths) if length <= longest]
    prompts = [loaded.records[i] for i in kept]
    if not prompts:
        raise DataError(
            f"none of {len(loaded.records)} prompts has at most {longest} tokens",
            where=settings.prompts,
            fix="raise sampling.max_prompt_tokens",
        )
    if len(prompts) < settings.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step = {settings.prompts_per_step} of {len(prompts)} prompts: a step would hold some twice",
            where=f"prompts_per_step and {settings.prompts}",
            fix="give more prompts, or lower prompts_per_step",
        )
    refuse_unread_flags(settings.combine, prompts, where=settings.prompts)
    if settings.on_failed_reward == "stop":
        refuse_missing_facts(judges(settings), prompts, where=settings.prompts, droppable=True)
    counts |= dict(loaded.counts) | {"dropped_long_prompts": len(loaded.records) - len(prompts)}
    say_prompts_left_out(counts, len(loaded.records), longest=longest)
    return in_order_of_rehearsal(prompts, [lengths[i] for i in kept], settings)


def guard_prompts(
    settings: OnlineSettings, prompts: list[Prompt], run: Run, chat: Chat
) -> tuple[GuardPrompts, list[Prompt]]:
    """The prompts of the guard and those to train on; without a guard, all are to train on.

    Raises DataError if there are too few for checks, and ConfigError if too few are left to train on."""
    guard = settings.guard
    if guard is None:
        return GuardPrompts([], 0), prompts
    if guard.prompts is None:
        chosen, rest = hold_out_for_guard(prompts, guard.num_prompts, seed=settings.seed)
        if len(rest) < settings.prompts_per_step:
            raise ConfigError(
                f"guard.num_prompts = {guard.num_prompts} of {len(prompts)} prompts leave {len(rest)} to train on, "
                f"and a step takes {settings.prompts_per_step}",
                where="guard.num_prompts and prompts",
                fix="give more prompts, or name a source for the guard's own: guard.prompts",
            )
    else:
        chosen = read_checks(guard, guard.prompts, run, chat, longest=settings.sampling.max_prompt_tokens)
        rest = prompts
    trained = {prompt_id(prompt.messages) for prompt in rest}
    where = guard.prompts or "the prompts held out for the guard"
    found = check_prompts(guard, chosen, where=where, is_trained=lambda prompt: prompt_id(prompt.messages) in trained)
    if guard.prompts is not None:  # the others are checked with those to train on
        refuse_unread_flags(settings.combine, chosen, where=guard.prompts)
    note_missing_facts(judges(settings), chosen, where="guard.prompts")
    return found, rest


def hold_out_for_guard(prompts: Sequence[Prompt], num: int, *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """`num` different prompts, drawn by the seed, and all that are none of these."""
    able = list({prompt_id(prompt.messages): prompt for prompt in prompts}.items())
    order = seeds.generator(seed, "guard", "prompts").permutation(len(able))[:num]
    chosen = dict(able[i] for i in sorted(order.tolist()))
    return list(chosen.values()), [prompt for prompt in prompts if prompt_id(prompt.messages) not in chosen]


def note_missing_facts(rewards: Mapping[str, Any], prompts: Sequence[Prompt], *, where: str) -> None:
    """Says on stderr that a reward which decides nothing cannot judge some prompts."""
    try:
        refuse_missing_facts(rewards, prompts, where=where)
    except DataError as error:
        note(f"{where}: {error.problem}; the reward that is reported leaves out replies to them")


def in_order_of_rehearsal(prompts: list[Prompt], lengths: list[int], settings: OnlineSettings) -> list[Prompt]:
    """The prompts, in a rehearsal so that its last step takes those of the run's largest step, with replies as long as
    they may become."""
    if not (num := steps_rehearsed(UNKNOWN)):
        return prompts
    each, replies = settings.prompts_per_step, settings.group_size * settings.sampling.max_new_tokens
    order = endless(len(prompts), 1, settings.seed)
    steps = [order.take(n * each, (n + 1) * each) for n in range(num)]
    whole = [step for step in steps if len(set(step)) == each]  # another may hold a prompt twice
    if steps[FEW_STEPS - 1] not in whole:
        return prompts
    largest = whole[largest_step(([lengths[i] + replies for i in step] for step in whole), settings)]
    others = iter(sorted(set(range(len(prompts))) - set(largest)))
    places = dict(zip(steps[FEW_STEPS - 1], largest, strict=True))
    return [prompts[places[i] if i in places else next(others)] for i in range(len(prompts))]


def read_mix(settings: OnlineSettings, chat: Chat, run: Run, counts: dict[str, int]) -> Sequence[Tree]:
    """The demonstrations of the pretraining mix, fitted to its max_tokens; what was dropped or truncated is counted.

    Raises DataError if none is left."""
    mix = settings.pretraining_mix
    if mix is None:
        return ()
    return read_demonstration_trees(
        mix.data,
        run,
        chat,
        max_tokens=mix.max_tokens,
        on_too_long="truncate_prompt_left",
        on_bad_row=settings.on_bad_row,
        counts=counts,
        owner="mix",
        where=f"pretraining_mix, {mix.data}",
        fix="raise pretraining_mix.max_tokens, or give shorter demonstrations",
    )
