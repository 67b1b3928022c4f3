"""Checks what a run reads before anything is trained: files and their columns, models, functions, libraries.

Without these checks, a pipeline would stop at a missing file of its last stage only after hours. Only beginnings are
read here; the stage itself reads the whole, and has the last word.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from trimtab import worlds
from trimtab.core import config, registry
from trimtab.core.errors import EXTRAS, ConfigError, DataError, EngineError, TrimtabError, need
from trimtab.core.hub import ADAPTER_FILE, ADAPTER_WEIGHTS, MODEL_FILE, base_of, refuse_ensemble
from trimtab.core.types import Demonstration, Prompt
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.data.sources import read_rows, records_source
from trimtab.data.tokenizers import load_config, load_tokenizer
from trimtab.engines.launchers import check_launcher
from trimtab.models.adapters import add_adapter
from trimtab.models.load import is_classifier, refuse_several_labels
from trimtab.models.vocabulary import refuse_other_vocabulary
from trimtab.models.weights import check_file, check_weights
from trimtab.rewards.combined import judges, judges_and_measure, refuse_missing_facts, refuse_unread_flags
from trimtab.rewards.gold import GoldReward, GoldScorer
from trimtab.rewards.length_correction import read_correction
from trimtab.rewards.model import ModelReward, RewardModel
from trimtab.rewards.python_callable import PythonCallable, load_function
from trimtab.runs.resume import may_become
from trimtab.stages.stage import ModelKind, Stage

Made = Mapping[str, tuple[str, Any]]
"""The directories of earlier stages of a pipeline, each with the stage and its settings."""
NUM_ROWS = 1000
"""How many rows of a file are checked."""


@dataclass(frozen=True)
class DataUse:
    """Data that a stage reads, for example `DataUse("data", "pairs.jsonl", (PreferencePair,))`."""

    key: str
    source: str
    kinds: tuple[type, ...]
    """The kinds of record, any one of which will do; empty if any text will do."""


@dataclass(frozen=True)
class ModelUse:
    """A model that a stage loads, for example `ModelUse("baseline", "runs/sft/model", "policy")`."""

    key: str
    path: str
    kind: ModelKind


def check(stages: Mapping[str, tuple[str, Any]], out: Path, *, where: str) -> None:
    """Raises one error with all that is missing or does not fit in the stages of a pipeline in `out`, by their names.
    Finished stages are not checked, unless they are to become longer."""
    earlier: dict[str, tuple[str, Any]] = {}
    found: list[tuple[str, TrimtabError]] = []
    for name, (stage, settings) in stages.items():
        if not (out / name / "summary.json").exists() or would_grow(out / name, stage, settings):
            made = {str(out / before): done for before, done in earlier.items()}
            found += [(f"stages.{name}.{key}", error) for key, error in _problems(stage, settings, made)]
        earlier[name] = stage, settings
    _raise(found, where)


def check_stage(stage: str, settings: Any, *, where: str) -> None:
    """Raises one error with all that is missing or does not fit in a single stage."""
    _raise(list(_problems(stage, settings, {})), where)


def would_grow(directory: Path, stage: str, settings: Any) -> bool:
    """Whether these settings ask more of a finished run than it has done."""
    if not (directory / "summary.json").exists() or not (directory / "settings.toml").exists():
        return False
    try:
        before = tomllib.loads((directory / "settings.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False  # it is reported when the run is opened
    now = tomllib.loads(config.to_toml(config.dump(settings)))
    lengths = ((key, before.get(key), now.get(key)) for key in registry.descriptor("stage", stage).grows)
    return any(a != b and may_become(key, a, b, num_done=0, finished=True) for key, a, b in lengths)


def describe(stage: str) -> Stage:
    """The descriptor of a stage."""
    found: Stage = registry.descriptor("stage", stage)
    return found


def _raise(found: list[tuple[str, TrimtabError]], where: str) -> None:
    if not found:
        return
    if len(found) > 1:
        lines = [f"{key}: {error.problem} ({error.where}); {error.fix}" for key, error in found]
        raise config.refused(lines, where=where)
    key, error = found[0]
    raise type(error)(error.problem, where=f"{error.where} ({key})", fix=error.fix)


def _problems(stage: str, settings: Any, made: Made) -> Iterator[tuple[str, TrimtabError]]:
    """Every key whose value cannot be used, and why."""
    if (engine := getattr(settings, "engine", None)) is not None:
        yield from _tried("engine.device", engine.find_device)
        yield from _tried("engine", engine.sampler.find)
        yield from _tried("engine", check_launcher, engine)
    looks: list[DataUse | ModelUse] = [*_sources(stage, settings), *models_of(stage, settings)]
    broken: set[str] = set()  # each model is reported once
    for look in looks:
        if isinstance(look, ModelUse) and look.path in broken:
            continue
        try:
            if isinstance(look, DataUse):
                _check_source(look, stage, settings, made)
            else:
                _check_model(look, made)
                _check_fit(look, settings, made)
        except TrimtabError as error:
            broken |= {look.path} if isinstance(look, ModelUse) else set()
            yield look.key, error
    if getattr(settings, "has_own_critic", False):
        yield from _tried("critic.init", settings.critic_start)
    for key, name in _worlds(settings):
        yield from _tried(key, worlds.load, name)
    for key, reward in judges_and_measure(settings).items():
        if isinstance(reward, PythonCallable):
            yield from _tried(f"{key}.function", load_function, reward.function)
        if isinstance(reward, RewardModel) and reward.length_correction and _made_by(reward.path, made) is None:
            yield from _tried(f"{key}.length_correction", read_correction, reward.path, reward.length_correction)
    for tracker in getattr(settings, "trackers", ()):
        if (name := registry.name_of("tracker", type(tracker))) in EXTRAS:
            what = f"the tracker {name!r}"
            yield from _tried("trackers", need, name, extra=name, setting=what, where="trackers")


def _tried(key: str, check: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[tuple[str, TrimtabError]]:
    """The key and the error of a check that raises one; nothing if it passes."""
    try:
        check(*arguments, **options)
    except TrimtabError as error:
        yield key, error


# --- data ---


def _sources(stage: str, settings: Any) -> Iterator[DataUse]:
    """The data that the stage reads, and the kinds of record it may hold."""
    data = describe(stage).data(settings)
    kinds: dict[str, tuple[type, ...]] = {
        "data": data,
        "held_out_data": data,
        "prompts": (Prompt,),
        "demonstrations": (Demonstration,),
    }
    for key, wanted in kinds.items():
        if (source := getattr(settings, key, None)) is not None:
            yield DataUse(key, source, wanted)
    if (mix := getattr(settings, "pretraining_mix", None)) is not None:
        yield DataUse("pretraining_mix.data", mix.data, (Demonstration,))
    if (guard := getattr(settings, "guard", None)) is not None and guard.prompts is not None:
        yield DataUse("guard.prompts", guard.prompts, (Prompt,))


def _check_source(look: DataUse, stage: str, settings: Any, made: Made) -> None:
    """Raises an error if the data cannot be read as any of the kinds of record that it may hold, or if it holds too few
    prompts for a step or none of the facts that a reward asks for."""
    if (step := _made_by(look.source, made)) is not None:
        maker, _, file = step
        if file not in (writes := describe(maker).writes):
            raise DataError(
                f"the stage {maker} writes no {file!r}",
                where=look.source,
                fix=f"it writes {', '.join(writes)}",
            )
        return
    own = records_source(look.source)
    if not look.kinds and own is None:
        read_rows(look.source, limit=NUM_ROWS)
        return
    drops = getattr(settings, "on_bad_row", "stop") == "drop"
    limit = min(getattr(settings, "limit", None) or NUM_ROWS, NUM_ROWS)
    errors = []
    for kind in look.kinds or (Prompt,):
        try:
            if own is not None:
                own.check(kind, look.source)
            else:
                loaded = load(kind, look.source, on_bad_row="drop" if drops else "stop", limit=limit)
                if look.key == "prompts":
                    _check_prompts(loaded.records, look.source, describe(stage).least_prompts(settings), settings)
            return
        except DataError as error:
            errors.append(error)
    # If bad rows may be dropped, the rows at the beginning say nothing about the others.
    if not (drops and "rows cannot be used" in errors[-1].problem):
        raise errors[-1]


def _check_prompts(prompts: Sequence[Prompt], source: str, least: int, settings: Any) -> None:
    if len(prompts) < min(least, NUM_ROWS) and getattr(settings, "on_bad_row", "stop") == "stop":
        raise ConfigError(
            f"prompts_per_step = {least} of {len(prompts)} prompts: a step would hold some twice",
            where=source,
            fix="give more prompts, or lower prompts_per_step",
        )
    for key, reward in judges(settings).items():
        fact = getattr(reward, "fact", None)
        if isinstance(fact, str) and not any(fact in prompt.facts for prompt in prompts):
            known = sorted({name for prompt in prompts for name in prompt.facts})
            raise DataError(
                f"no prompt has the fact {fact!r} that {key} compares with; there are {', '.join(known) or 'none'}",
                where=source,
                fix="add a column of that name to the prompts' file, or name the right fact in the reward's settings",
            )
    if getattr(settings, "on_failed_reward", "drop") == "stop":
        refuse_missing_facts(judges(settings), prompts, where=source, droppable=True)
    if (combine := getattr(settings, "combine", None)) is not None:
        refuse_unread_flags(combine, prompts, where=source, needed=False)  # a flag may be rarer than the rows read here
    guard = getattr(settings, "guard", None)
    for key, name in _worlds(settings):
        if guard is not None and key.startswith("guard.") and guard.prompts is not None:
            continue  # measured on prompts of their own
        if prompts and name in registry.names("world"):
            GoldScorer(worlds.load(name)).gold(prompts[0], "")


def _worlds(settings: Any) -> Iterator[tuple[str, str]]:
    """The worlds that the settings name."""
    if (name := getattr(settings, "world", None)) is not None:
        yield "world", name
    for key, reward in judges_and_measure(settings).items():
        if isinstance(reward, GoldReward):
            yield f"{key}.world", reward.world


# --- models ---


def models_of(stage: str, settings: Any) -> Iterator[ModelUse]:
    """The models that the stage loads, and the kind that each has to be."""
    kinds: dict[str, ModelKind] = {
        "model": describe(stage).model,
        "reference": "policy",
        "baseline": "policy",
        "reward_model": "reward model",
    }
    for key, kind in kinds.items():
        if (path := getattr(settings, key, None)) is not None:
            yield ModelUse(key, path, kind)
    for key, reward in judges_and_measure(settings).items():
        if isinstance(reward, ModelReward):
            yield ModelUse(f"{key}.path", reward.path, "reward model")
    if getattr(settings, "has_own_critic", False):
        with suppress(ConfigError):  # reported by `_problems`
            yield ModelUse("critic.path" if settings.critic.path else "critic.init", settings.critic_start(), "any")
    if getattr(settings, "cost", None) is not None and (start := settings.cost_critic_start) is not None:
        yield ModelUse("cost.critic", start, "any")


def _check_model(look: ModelUse, made: Made) -> None:
    """Raises an error if a model directory is missing or damaged, is not a model directory, or holds a model of another
    kind."""
    if (step := _made_by(look.path, made)) is not None:
        stage, _, file = step
        makes = describe(stage).makes
        if file != "model" or makes is None:
            able = [name for name in registry.modules("stage") if describe(name).makes is not None]
            raise ConfigError(
                f"the stage {stage} writes no model {file!r}" if makes else f"the stage {stage} writes no model",
                where=look.path,
                fix=f"name a stage that does, as @NAME: {', '.join(able)}",
            )
        _require_kind(look, makes)
        return
    path = Path(look.path)
    if not path.exists():
        if _is_a_path(look.path):
            raise EngineError(f"there is no directory {look.path!r}", where=look.path, fix=_near(path))
        return  # a hub id
    if not (path / MODEL_FILE).exists() and not (path / ADAPTER_FILE).exists():
        inner = path / "model"
        meant = f"did you mean {str(inner)!r}? " if (inner / MODEL_FILE).exists() else ""
        raise EngineError(
            f"{look.path!r} is no model: it has no config.json",
            where=look.path,
            fix=f"{meant}a model directory holds config.json, model.safetensors and a tokenizer",
        )
    _check_directory(look)


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def _check_directory(look: ModelUse) -> None:
    """The checks that loading a directory makes, but for the numbers in its weights."""
    if look.key in ("model", "reference", "baseline"):
        refuse_ensemble(look.path, where=look.key)
    whole = look.path
    while (base := base_of(whole)) is not None:
        check_file(Path(whole) / ADAPTER_WEIGHTS)
        whole = base
    if not Path(whole).is_dir():
        return  # a base on the hub
    check_weights(whole)
    if is_classifier(look.path):
        _require_kind(look, "reward model")
    elif _architecture(whole).endswith(_CAUSAL):
        _require_kind(look, "policy")
    refuse_several_labels(whole, where=look.path)
    if look.key == "model" or look.kind == "reward model":
        Chat(load_tokenizer(look.path))  # of the other models only the weights are read


def _architecture(path: str) -> str:
    return next(iter(load_config(path).architectures or ()), "")


def _check_fit(look: ModelUse, settings: Any, made: Made) -> None:
    """Raises an error if the model does not fit the other settings: its vocabulary has to be that of the policy, and an
    adapter needs layers of the names that are asked for."""
    adapter = getattr(settings, "adapter", None)
    whole = Path(look.path).is_dir() and base_of(look.path) is None
    if look.key == "model" and adapter is not None and whole and _architecture(look.path).endswith(_CAUSAL):
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        causal: Any = AutoModelForCausalLM
        with init_empty_weights():
            add_adapter(causal.from_config(load_config(look.path)), "policy", adapter, seed=0)
    policy, other = _origin(settings.model, made), _origin(look.path, made)
    if policy is None or other is None or not _reads_ids_of_policy(look, settings):
        return
    role = look.key if look.key == "cost.critic" else look.key.partition(".")[0]
    refuse_other_vocabulary(load_tokenizer(policy), other, role=role, where=f"{look.path} and {settings.model}")


def _reads_ids_of_policy(look: ModelUse, settings: Any) -> bool:
    """Whether this model is given the token ids of the policy, and not the text."""
    if look.key == "reference":
        guarded = getattr(settings, "guard", None) is not None
        return guarded or bool(getattr(settings.loss, "needs_reference", True))
    return look.key in ("baseline", "critic.path", "critic.init", "cost.critic")


def _origin(path: str, made: Made) -> str | None:
    """The directory whose vocabulary the model has: its own, or that of the model that earlier stages started from.
    None if there is none yet."""
    name: str | None = path
    while name is not None and (step := _made_by(name, made)) is not None:
        name = getattr(step[1], "model", None)
    return name if name is not None and Path(name).is_dir() else None


def _require_kind(look: ModelUse, kind: ModelKind) -> None:
    if look.kind in ("any", kind):
        return
    made_by = " or ".join(name for name in registry.modules("stage") if describe(name).makes == look.kind)
    raise EngineError(
        f"{look.path!r} is a {kind}, and {look.key} is to be a {look.kind}",
        where=look.path,
        fix=f"name a {look.kind}, such as model/ of a run of {made_by}",
    )


def _is_a_path(name: str) -> bool:
    """Whether a name that does not exist can only be a path: a hub id is "org/name"."""
    parts = name.split("/")
    return len(parts) != 2 or name.startswith((".", "/", "~")) or Path(parts[0]).is_dir()


def _near(path: Path) -> str:
    """A fix that names the nearest existing directory and what it holds."""
    below = next(parent for parent in (path.parent, *path.parents) if parent.exists())
    names = sorted(p.name for p in below.iterdir() if p.is_dir() and not p.name.startswith("."))[:8]
    there = f"; {str(below)!r} holds {', '.join(names)}" if names else f"; {str(below)!r} holds no directory"
    return f"check the path, which is read from {os.getcwd()}{there}"


def _made_by(path: str, made: Made) -> tuple[str, Any, str] | None:
    """The stage that is to write this path, its settings, and the path below its directory; None if no earlier stage
    writes it."""
    for directory, (stage, settings) in made.items():
        if path.startswith(directory + os.sep):
            return stage, settings, path.removeprefix(directory + os.sep)
    return None
