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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from trimtab.core import config, registry, seeds
from trimtab.core.config import Choice
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import check_out, json_text, replacing, write_out, writing
from trimtab.core.types import Prompt, records_hash
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.engines.build import Engines, load_policy
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.learner import AdamW
from trimtab.engines.local.sampler import Sampling
from trimtab.evals.checkpoint_choice import MeasuredCheckpoint, best_checkpoint, decision
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy
from trimtab.models.save import save_role
from trimtab.rewards.combined import load_rewards, refuse_missing_facts
from trimtab.runs.checkpoints import checkpoints_in, step_of, whole_checkpoint
from trimtab.stages.noise import seed_noise
from trimtab.stages.online.guard.measuring import ask, measure_digest
from trimtab.stages.online.guard.watch import DECISION
from trimtab.stages.online.models import load_models
from trimtab.stages.online.settings import OnlineSettings
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
    sampling: Sampling | None = None
    """How replies are drawn; None draws them as the run does, or as `trimtab generate` if the run draws none."""
    token_budget: int = 4096
    """Tokens of one forward pass: memory and speed only."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How it is computed."""
    seed: int = 0
    """Seed of the replies; every checkpoint draws with the same random numbers."""

    def __post_init__(self) -> None:
        if not self.measure:
            raise ValueError("measure is empty; name what decides, such as measure = ['exact_answer']")
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
    directory: Path, values: Mapping[str, Any], *, where: str, out: Path | None = None, export: Path | None = None
) -> ChosenCheckpoint:
    """Asks every checkpoint of the run in `directory`, writes the decision to `out` (decision.json in the run), and the
    chosen model to `export` if it is given.

    `values` are those of `ChooseSettings`. Raises ConfigError for a run of another stage, for one that is at work, and
    if a file that is there would be overwritten; DataError for a directory without a run, for a run that kept no
    checkpoint, and for a damaged one.
    """
    path = out or directory / DECISION
    _refuse_existing(path if out is None else None, export)
    check_out(path)
    trained = _settings_of(directory)
    settings = config.resolve(ChooseSettings, _defaults(trained) | dict(values), where=where)
    _refuse_at_work(directory)
    paths = {step_of(found): found for found in checkpoints_in(directory / "checkpoints")}
    if not paths:
        raise DataError(
            f"{directory} has no checkpoint",
            where=str(directory / "checkpoints"),
            fix="train with keep_checkpoints = 10, or so: by default the newest two are kept",
        )
    whole = {step: whole_checkpoint(directory, step) for step in paths}
    if settings.sampling is None:
        settings = replace(settings, sampling=getattr(trained, "sampling", Sampling(max_new_tokens=256)))
    chat = Chat(load_tokenizer(trained.model))
    prompts = _prompts(settings, chat)
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
    table = config.dump(settings)
    evidence = {
        "run": os.path.abspath(directory),
        "model_is": "not changed by this choice",
        "measure": {"settings": table["measure"], "sha256": measure_digest(table["measure"])},
        "prompts": {
            "source": settings.prompts,
            "num": len(prompts),
            "sha256": records_hash(prompts),
            "replies_per_prompt": settings.replies_per_prompt,
        },
        "seed": settings.seed,
    }
    write_out(path, json_text(decision(series, evidence=evidence)))
    return ChosenCheckpoint(series, chosen, path)


def _asked(
    paths: Mapping[int, Path], trained: Any, settings: ChooseSettings, chat: Chat, prompts: Sequence[Prompt]
) -> Iterator[MeasuredCheckpoint]:
    """The start of the run as step 0 and its checkpoints, measured in the order of their steps."""
    sampling = settings.sampling
    assert sampling is not None
    options: dict[str, Any] = {"token_budget": settings.token_budget, "device": settings.engine.find_device()}
    measure = load_rewards(settings.measure, **options)
    reward = None
    if isinstance(trained, OnlineSettings):
        reward = load_rewards(trained.rewards, combine=trained.combine, **options)
    judges = [part.reward for part in (*measure.parts, *(reward.parts if reward else ()))]
    refuse_short_reward_models(judges, prompts, chat, max_new_tokens=sampling.max_new_tokens)
    policy, reference, _ = _roles(trained, chat, settings)
    engines = Engines(settings.engine)
    how: dict[str, Any] = {"token_budget": settings.token_budget, "precision": trained.precision}
    learner = engines.learner(policy, AdamW(), name="policy", num_updates=1, **how)
    scorer = engines.scorer(reference, name="reference", **how)
    with engines:
        sampler = engines.sampler(policy, chat, sampling)
        sampler.check_prompts(prompts)
        for step in sorted({0, *paths}):
            if step in paths:
                learner.load(paths[step])
            seed_noise(settings.seed, "guard", step)
            sampler.sync()
            replies = ask(
                prompts,
                sampler=sampler,
                policy=learner,
                reference=scorer,
                reward=reward,
                replies_per_prompt=settings.replies_per_prompt,
                seed=seeds.derive(settings.seed, "guard"),
            )
            yield replies.measured(step, measure)


def _export(checkpoint: Path | None, trained: Any, settings: ChooseSettings, chat: Chat, out: Path) -> None:
    """Writes the policy of a checkpoint, or that of the start, as the run writes its model."""
    policy, _, base = _roles(trained, chat, settings)
    if checkpoint is not None:
        how: dict[str, Any] = {"token_budget": settings.token_budget, "num_updates": 1}
        Engines().learner(policy, AdamW(), name="policy", **how).load(checkpoint)
    with writing(str(out), out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as aside:
            aside.mkdir()
            save_role(policy, chat.tokenizer, aside, base=base)


def rows(found: ChosenCheckpoint) -> Iterator[tuple[str, ...]]:
    """The table of the console: step, measure with its interval, KL, reward, and a mark at the chosen step."""
    for one in found.series:
        reward = "–" if math.isnan(one.reward) else f"{one.reward:.3f}"
        mark = "chosen" if one is found.chosen else ""
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


def _defaults(trained: Any) -> dict[str, Any]:
    """What the run's own guard was asked, as values of `ChooseSettings`; prompts that it held out have no name."""
    common = {"seed": trained.seed}
    if getattr(trained, "guard", None) is None:
        return common
    table = config.dump(trained.guard)
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


def _prompts(settings: ChooseSettings, chat: Chat) -> list[Prompt]:
    assert settings.sampling is not None
    longest = settings.sampling.max_prompt_tokens
    found = load(Prompt, settings.prompts, limit=settings.num_prompts, accepts=chat.refusal).records
    prompts = [prompt for prompt in found if len(chat.encode_prompt(prompt.messages)) <= longest]
    if len(prompts) < 2:
        raise DataError(
            f"{len(prompts)} prompts, and an interval over prompts needs two",
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
