"""Choose among the checkpoints of a run, afterwards, by a measure that the run did not train on.

Every checkpoint that the run kept (`keep_checkpoints`), and the model that it began with as step 0, answers the same
prompts by the same random numbers. The rule is that of the guard (`evals.checkpoint_choice`), and so is the protocol: a
run that had a guard is measured as the guard measured it.
"""

from __future__ import annotations

import fcntl
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from trimtab.core import config, registry
from trimtab.core.config import Choice
from trimtab.core.errors import ConfigError, DataError, TrimtabError
from trimtab.core.files import check_out, json_text, new_directory, write_out
from trimtab.core.terminal import note
from trimtab.core.types import Demonstration, PreferencePair, Prompt, prompt_id
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.engines.base import Sampler
from trimtab.engines.build import Engines, load_policy
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.learner import AdamW
from trimtab.engines.local.sampler import Sampling
from trimtab.evals.checkpoint_choice import MeasuredCheckpoint, best_checkpoint, decision, interval_of_chosen
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy
from trimtab.models.save import save_role
from trimtab.rewards.combined import judges, load_rewards, refuse_missing_facts, refuse_unread_flags
from trimtab.runs.checkpoints import checkpoints_in, step_of, whole_checkpoint
from trimtab.stages.guard.independence import refuse_empty_measure, refuse_trained_measure, same_source
from trimtab.stages.guard.measuring import PolicyCheck, evidence_of
from trimtab.stages.guard.prompts import different
from trimtab.stages.guard.watch import DECISION
from trimtab.stages.online.data import note_missing_facts
from trimtab.stages.online.models import load_models
from trimtab.stages.online.samplers import make_samplers
from trimtab.stages.online.settings import OnlineEngineSettings, OnlineSettings
from trimtab.stages.preference import PreferenceSettings
from trimtab.stages.reward_positions import refuse_short_reward_models
from trimtab.stages.sft import SFTSettings, start_policy

ABLE = (OnlineSettings, PreferenceSettings, SFTSettings)
"""The settings of the stages whose checkpoints can be asked: those that train a policy from a given model."""


@dataclass(frozen=True, kw_only=True)
class ChooseSettings:
    """What is asked of every checkpoint. For a run with a guard, its table [guard] is the default."""

    measure: Annotated[tuple[Any, ...], Choice("reward")]
    """The independent measure that decides, as in the table [guard]."""
    prompts: str
    """Prompts that the run did not train on: a file, a hub id or a world."""
    num_prompts: int = 64
    """How many of them."""
    replies_per_prompt: int = 1
    """Replies to each prompt."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256))
    """How replies are drawn; what is not given is as in the run, or as in `trimtab generate` if the run draws none."""
    token_budget: int = 4096
    """Tokens of one forward pass: memory and speed only."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How it is computed."""
    seed: int = 0
    """Seed of the replies; every checkpoint draws with the same random numbers."""

    def __post_init__(self) -> None:
        refuse_empty_measure(self.measure)
        if self.num_prompts < 2:
            raise ValueError(f"num_prompts = {self.num_prompts}; an interval over prompts needs at least 2")
        if self.engine.workers != 1:
            raise ValueError(f"engine.workers = {self.engine.workers}: checkpoints are asked by a single process")


@dataclass(frozen=True)
class ChosenCheckpoint:
    """What `choose` found."""

    series: Sequence[MeasuredCheckpoint]
    chosen: MeasuredCheckpoint
    decision: Path
    """The file with the evidence."""


def choose(
    directory: Path,
    values: Mapping[str, Any],
    *,
    where: str,
    out: Path | None = None,
    export: Path | None = None,
    command: str = "",
) -> ChosenCheckpoint:
    """Asks every checkpoint of the run in `directory`, writes the decision to `out` (decision.json in the run), and the
    chosen model to `export` if it is given.

    `values` are those of `ChooseSettings`; `command` is what was typed, for the decision. Raises ConfigError for a
    run of another stage, for one that is at work, for a measure or prompts that the run trained on, and if a file
    that is there would be overwritten; DataError for a directory without a run, for a run that kept no checkpoint,
    and for a damaged one.
    """
    path = out or directory / DECISION
    _refuse_existing(path if out is None else None, export)
    check_out(path)
    trained = _settings_of(directory)
    given = _over(_defaults(trained), values)
    if missing := [key for key in ("measure", "prompts") if key not in given]:
        raise ConfigError(
            f"no {' and no '.join(missing)} given, and the run had no guard that says",
            where=where,
            fix="measure by --gold WORLD, by --reward-model DIRECTORY or by measure='[\"exact_answer\"]', on prompts "
            "that the run did not train on: --prompts SOURCE",
        )
    settings = config.resolve(ChooseSettings, given, where=where)
    _refuse_trained(trained, settings, where=where)
    _refuse_at_work(directory)
    paths = {step_of(found): found for found in checkpoints_in(directory / "checkpoints")}
    if not paths:
        raise DataError(
            f"{directory} has no checkpoint",
            where=str(directory / "checkpoints"),
            fix="train with keep_checkpoints = 10, or so: by default the newest two are kept",
        )
    whole = {step: whole_checkpoint(directory, step) for step in paths}
    if isinstance(trained, OnlineSettings):  # computed and drawn as is asked here, and otherwise as the run did
        engine = OnlineEngineSettings(
            **{one.name: getattr(settings.engine, one.name) for one in fields(EngineSettings)}
        )
        trained = replace(trained, engine=engine, sampling=settings.sampling)
    chat = Chat(load_tokenizer(trained.model))
    prompts = _prompts(settings, chat)
    num_trained_on = _num_trained_on(trained, prompts)
    note_missing_facts(judges(trained), prompts, where="prompts")
    series = list(_asked(whole, trained, settings, chat, prompts))
    if not any(one.may_be_chosen for one in series):
        raise DataError(
            f"the measure judged too few replies of each of {len(series)} checkpoints",
            where="measure",
            fix="mend the measure, or give prompts that it can judge; the log says why it failed",
        )
    chosen = best_checkpoint(series)
    if export is not None:
        _export(whole.get(chosen.step), trained, settings, chat, export)
    asked = evidence_of(settings, prompts, num_trained_on)
    about = {"run": os.path.abspath(directory), "model_is": "not changed by this choice"}
    evidence = about | asked | {"seed": settings.seed, "command": command}
    write_out(path, json_text(decision(series, evidence=evidence)))
    return ChosenCheckpoint(series, chosen, path)


def _asked(
    paths: Mapping[int, Path], trained: Any, settings: ChooseSettings, chat: Chat, prompts: Sequence[Prompt]
) -> Iterator[MeasuredCheckpoint]:
    """The start of the run as step 0 and its checkpoints, measured in the order of their steps."""
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": settings.engine.find_device()}
    measure = load_rewards(settings.measure, **options)
    reward = None
    if isinstance(trained, OnlineSettings):
        refuse_unread_flags(trained.combine, prompts, where=settings.prompts)
        reward = load_rewards(trained.rewards, combine=trained.combine, **options)
    refuse_short_reward_models([measure, reward], prompts, chat, max_new_tokens=settings.sampling.max_new_tokens)
    policy, reference, _ = _roles(trained, chat, settings)
    engines = Engines(settings.engine)
    how: dict[str, Any] = {"token_budget": settings.token_budget, "precision": trained.precision}
    learner = engines.learner(policy, AdamW(), name="policy", num_updates=1, **how)
    scorer = engines.scorer(reference, name="reference", **how)
    with engines:
        sampler: Sampler
        if isinstance(trained, OnlineSettings):
            sampler, _ = make_samplers(trained, policy, chat, prompts, engines.sampler)
        else:
            sampler = engines.sampler(policy, chat, settings.sampling)
            sampler.check_prompts(prompts)
        check = PolicyCheck(
            prompts=prompts,
            replies_per_prompt=settings.replies_per_prompt,
            seed=settings.seed,
            sampler=sampler,
            policy=learner,
            reference=scorer,
            reward=reward,
            measure=measure,
        )
        for step in sorted({0, *paths}):
            if step in paths:
                learner.load(paths[step])
            yield check.replies(step).measured(step, measure)


def _export(checkpoint: Path | None, trained: Any, settings: ChooseSettings, chat: Chat, out: Path) -> None:
    """Writes the policy of a checkpoint, or that of the start, as the run writes its model."""
    policy, _, base = _roles(trained, chat, settings)
    if checkpoint is not None:
        how: dict[str, Any] = {"token_budget": settings.token_budget, "num_updates": 1}
        Engines().learner(policy, AdamW(), name="policy", **how).load(checkpoint)
    with new_directory(out) as aside:
        aside.mkdir()
        save_role(policy, chat.tokenizer, aside, base=base)


def rows(found: ChosenCheckpoint) -> Iterator[tuple[str, ...]]:
    """The table of the console: step, measure with its interval, KL, reward, and at the chosen step the interval that
    counts the choice."""
    for one in found.series:
        reward = "–" if math.isnan(one.reward) else f"{one.reward:.3f}"
        mark = f"chosen: {interval_of_chosen(one, len(found.series))}" if one is found.chosen else ""
        yield str(one.step), str(one.estimate), f"{one.kl:.2f}", reward, mark


def _refuse_existing(decision: Path | None, export: Path | None) -> None:
    if decision is not None and decision.exists():
        raise ConfigError(
            f"{decision} is there already: what the run itself, or an earlier call, has decided",
            where="trimtab choose",
            fix="name another file with --out, or remove it",
        )
    if export is not None and export.exists():
        raise ConfigError(f"{export} is there already", where="--export", fix="name a new directory")


def _settings_of(directory: Path) -> Any:
    """The settings of the run. Raises DataError or ConfigError if it is none whose checkpoints can be asked."""
    file = directory / "settings.toml"
    if not file.is_file():
        raise DataError(f"{directory} holds no run", where=str(directory), fix="give the directory of one stage's run")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"settings.toml is damaged: {error}", where=str(file), fix="restore it") from error
    stage = values.pop("stage", None)
    known = {name: registry.descriptor("stage", name).settings for name in registry.modules("stage")}
    if known.get(stage) not in ABLE:
        able = ", ".join(name for name, kind in known.items() if kind in ABLE)
        raise ConfigError(
            f"a run of the stage {stage!r}, which trains no policy from a given model",
            where=str(file),
            fix=f"give a run of one of {able}",
        )
    return config.resolve(known[stage], values, where=str(file))


def _over(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with values over them; of the sampling, key by key."""
    given = values.get("sampling")
    both = {"sampling": {**defaults["sampling"], **given}} if isinstance(given, Mapping) else {}
    return {**defaults, **values, **both}


def _defaults(trained: Any) -> dict[str, Any]:
    """How the run draws, and what its own guard was asked, as values of `ChooseSettings`; prompts that a guard held out
    have no name."""
    guard = getattr(trained, "guard", None)
    drawn = (getattr(one, "sampling", None) for one in (trained, guard))  # preference training draws in its guard alone
    sampling = next((one for one in drawn if one is not None), Sampling(max_new_tokens=256))
    common = {"seed": trained.seed, "sampling": config.dump(sampling)}
    if guard is None:
        return common
    table = config.dump(guard)
    names = ("measure", "prompts", "num_prompts", "replies_per_prompt")
    return common | {name: table[name] for name in names if table[name] != config.NONE}


def _refuse_at_work(directory: Path) -> None:
    lock = directory / ".lock"
    if not lock.exists():
        return
    with lock.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{directory} is in use by process {held.read().strip()}, which may remove checkpoints",
                where="the run directory",
                fix="wait for it or stop it; a guard chooses while a run goes on",
            ) from error


def _refuse_trained(trained: Any, settings: ChooseSettings, *, where: str) -> None:
    """Raises ConfigError if the measure is a reward that the run trained on, or the prompts are the run's data."""
    try:
        refuse_trained_measure(settings.measure, judges(trained))
    except ValueError as error:
        raise ConfigError(str(error), where=where, fix="name another measure") from error
    if (source := _source(trained)) is not None and same_source(settings.prompts, source):
        raise ConfigError(
            f"prompts = {settings.prompts!r} is what the run trained on",
            where=where,
            fix="name prompts that it did not train on",
        )


def _source(trained: Any) -> str:
    """The data that the run trained on."""
    return str(trained.prompts if isinstance(trained, OnlineSettings) else trained.data)


def _num_trained_on(trained: Any, prompts: Sequence[Prompt]) -> int | None:
    """How many prompts are among the data of the run, said on stderr if there are any; None if it cannot be read."""
    source, found = _source(trained), None
    kinds: tuple[Any, ...] = (Prompt, PreferencePair, Demonstration)
    for kind in kinds:
        with suppress(TrimtabError):
            loaded = load(kind, source, limit=getattr(trained, "limit", None), on_bad_row="drop")
            found = {prompt_id(getattr(one, "prompt", one).messages) for one in loaded.records}
            break
    if found is None:
        note(f"{source!r} cannot be read; whether the run trained on these prompts is not known")
        return None
    num = sum(prompt_id(prompt.messages) in found for prompt in prompts)
    if num:
        note(f"{num} of {len(prompts)} prompts are among those of the run, {source!r}")
    return num


def _prompts(settings: ChooseSettings, chat: Chat) -> list[Prompt]:
    found = load(Prompt, settings.prompts, limit=settings.num_prompts, accepts=chat.refusal).records
    prompts = different(found, chat, longest=settings.sampling.max_prompt_tokens, where=settings.prompts)
    if len(prompts) < 2:
        raise DataError(
            f"{len(prompts)} different prompts, and an interval over prompts needs two",
            where=settings.prompts,
            fix="give more prompts, or raise sampling.max_prompt_tokens",
        )
    measure = {f"measure.{number}": reward for number, reward in enumerate(settings.measure)}
    refuse_missing_facts(measure, prompts, where=settings.prompts)
    return prompts


def _roles(trained: Any, chat: Chat, settings: ChooseSettings) -> tuple[Policy, Policy, str]:
    """The policy as the run began, its reference, and the model that its adapter belongs to."""
    if isinstance(trained, OnlineSettings):
        models = load_models(trained, chat, with_rewards=False)
        return models.policy, models.reference, models.base
    device = settings.engine.find_device()
    policy, base = start_policy(trained.model, trained.adapter, chat, seed=trained.seed, device=device)
    reference = load_policy(getattr(trained, "reference", None) or trained.model, chat, settings)
    policy.temperature = reference.temperature
    return policy, reference, base
