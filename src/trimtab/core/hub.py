"""Resolves the names of models, before any model is read. Does not load torch.

A name is a directory or a hub id. Mistakes in it are reported here in a sentence and within seconds: a directory that
does not exist, a run directory instead of its model, a hub that cannot be reached.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from trimtab.core.errors import EngineError

MODEL_FILE, ADAPTER_FILE, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
GENERATION_FILE = "generation_config.json"
ENSEMBLE_FILE = "ensemble.json"
"""File in the directory of an ensemble of reward models, which is that of its first member too."""
REWARD_FILE = "reward.json"
"""File beside the adapter of a reward model, with what is known of its scores."""
BESIDE_FILE = "base.json"
"""File beside an adapter with the relative path from its directory to that of its base, so that both can be moved
together."""
HUB_SECONDS = 8.0
"""Time limit for the hub to answer whether it has a model."""


def find_model(name: str | Path) -> str:
    """The directory of a model or adapter, or the hub id of one that the hub has.

    If the hub cannot be reached, a hub id gives its directory in the cache; the hub id of an adapter always does.
    Raises EngineError that says what was found instead.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / MODEL_FILE).exists() and not (path / ADAPTER_FILE).exists():
            raise _no_model_in(path)
        return str(path)
    if path.is_file():
        raise EngineError(
            f"{str(name)!r} is a file; a model is a directory",
            where="the name of the model",
            fix="name a directory with config.json, model.safetensors and a tokenizer (GGUF and pickles are not read)",
        )
    if not _is_hub_id(str(name)):
        raise _no_directory(path)
    return _on_hub(str(name))


def base_of(name: str | Path) -> str | None:
    """The base model that an adapter directory names; None for a directory that is a model of its own.

    A relative base is searched for in the working directory, then in the adapter's directory and those above it. A base
    that was moved together with its adapter is found by the relative path saved beside the adapter.
    """
    path = Path(find_model(name))
    file = path / ADAPTER_FILE
    if not file.exists():
        return None
    if not (path / ADAPTER_WEIGHTS).exists():
        raise EngineError(
            f"{ADAPTER_FILE} without {ADAPTER_WEIGHTS}",
            where=str(name),
            fix="save the adapter as safetensors; other formats can run code and are not read",
        )
    base = read_json(file).get("base_model_name_or_path")
    if not base:
        raise EngineError(
            "the adapter does not say which base model it belongs to",
            where=str(file),
            fix="set base_model_name_or_path in it",
        )
    found = _base_from(path, str(base))
    _refuse_circle(path, found)
    return found


def _refuse_circle(adapter: Path, base: str) -> None:
    """Raises EngineError if the bases of an adapter lead back to an adapter that was passed already."""
    passed = [adapter.resolve()]
    while (file := Path(base) / ADAPTER_FILE).exists():
        if (here := Path(base).resolve()) in passed:
            raise EngineError(
                f"the adapter names {'itself' if len(passed) == 1 else 'a circle of adapters'} as its base",
                where=str(adapter / ADAPTER_FILE),
                fix="write the model that it was trained on into base_model_name_or_path",
            )
        passed.append(here)
        base = _base_from(Path(base), str(read_json(file).get("base_model_name_or_path") or ""))


def same_model(a: str | Path, b: str | Path) -> bool:
    """Whether two names mean the same model: the same hub id, or paths of one directory."""
    return str(a) == str(b) or Path(a).resolve() == Path(b).resolve()


def on_base(path: str | Path, base: str | Path) -> bool:
    """Whether the directory holds an adapter of this base."""
    other = base_of(path)
    return other is not None and same_model(other, base)


def is_ensemble(path: str | Path) -> bool:
    """Whether the directory holds an ensemble of reward models."""
    return (Path(path).expanduser() / ENSEMBLE_FILE).exists()


def members_in(path: str | Path) -> list[str]:
    """The directories of the members of an ensemble, which its file names; of another model only its own name."""
    if not is_ensemble(path):
        return [str(path)]
    file = Path(path).expanduser() / ENSEMBLE_FILE
    members = read_json(file).get("members")
    if not isinstance(members, list) or not members or not all(isinstance(member, str) for member in members):
        raise EngineError(
            f"{ENSEMBLE_FILE} names no members, but {members!r:.40}",
            where=str(file),
            fix="copy the directory again, or train the ensemble anew",
        )
    return [str(file.parent / member) for member in members]


def refuse_ensemble(path: str | Path, *, where: str) -> None:
    """Raises EngineError for an ensemble where one model is needed: its directory would be read as its first member."""
    if is_ensemble(path):
        raise EngineError(
            "this is an ensemble of reward models, and one model is needed here",
            where=where,
            fix="name one of its members: a copy of the directory without ensemble.json is the first, members/1 in it "
            "the second",
        )


def reward_facts(path: str | Path) -> dict[str, Any]:
    """What the reward stage wrote of a reward model into its directory, under names that begin with `reward_`: its
    zero, its moments, and what its scores mean. They are in `reward.json` of an adapter, and in `config.json` of a
    whole model. Empty for a model of another program, and for the id of one on the hub that is no adapter."""
    directory = Path(find_model(path))
    file = directory / (REWARD_FILE if (directory / ADAPTER_FILE).exists() else MODEL_FILE)
    found = read_json(file) if file.exists() else {}
    return {name: value for name, value in found.items() if name.startswith("reward_")}


def refuse_process_model(path: str | Path, *, where: str) -> None:
    """Raises EngineError for a process reward model where one score of a whole reply is needed."""
    if reward_facts(path).get("reward_kind") == "process":
        raise EngineError(
            "this is a process reward model, which scores the steps of a reply and not the reply",
            where=where,
            fix="name it with the reward 'process', in rewards of online, select or evaluate, or score replies of a "
            "file by it: trimtab score",
        )


def lasting_name(name: str | Path) -> str:
    """A name that means the same model in every working directory: a directory's absolute path, or a hub id."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory. Raises EngineError for a file that is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{file.name} cannot be read: {error}", where=str(file), fix="copy or download the directory again"
        ) from error
    if not isinstance(value, dict):
        raise EngineError(
            f"{file.name} holds no object, but {value!r:.40}",
            where=str(file),
            fix="copy or download the directory again",
        )
    return value


def base_here(adapter: Path, base: str) -> str | None:
    """The directory of an adapter's base, which the adapter calls `base`; None if it is not on this machine."""
    if any((Path(base).expanduser() / file).exists() for file in (MODEL_FILE, ADAPTER_FILE)):
        return base
    if not Path(base).is_absolute():
        here = adapter.resolve()
        for above in (here, *here.parents):
            if ((above / base) / MODEL_FILE).exists():
                return str(above / base)
    beside = adapter / BESIDE_FILE
    if beside.exists() and (moved := adapter / str(read_json(beside).get("beside"))).is_dir():
        return str(moved.resolve())
    return None


def _base_from(adapter: Path, base: str) -> str:
    if (found := base_here(adapter, base)) is not None:
        return found
    try:
        return find_model(base)
    except EngineError as error:
        raise EngineError(
            f"the base of the adapter is not found: {error.problem}",
            where=f"base_model_name_or_path in {adapter / ADAPTER_FILE}",
            fix=f"write there where the base is now; {error.fix}",
        ) from error


def _no_model_in(path: Path) -> EngineError:
    def is_model(directory: Path) -> bool:
        return (directory / MODEL_FILE).exists() or (directory / ADAPTER_FILE).exists()

    if is_model(path / "model"):
        return EngineError(
            f"{str(path)!r} is the directory of a run, not of its model",
            where="the name of the model",
            fix=f"name the model in it: {path / 'model'}",
        )
    if (path / "settings.toml").exists() and not (path / "model").exists():
        return EngineError(
            f"the run in {str(path)!r} has not written a model",
            where="the name of the model",
            fix="let the run finish, or name another model",
        )
    files = [f"{depth}/{name}" for depth in ("*", "*/*") for name in (MODEL_FILE, ADAPTER_FILE)]
    found = sorted({str(file.parent) for pattern in files for file in path.glob(pattern)})
    return EngineError(
        f"the directory {str(path)!r} holds no model: it has neither {MODEL_FILE} nor {ADAPTER_FILE}",
        where="the name of the model",
        fix=f"models in it: {', '.join(found[:8])}"
        if found
        else "name a directory with config.json, model.safetensors and a tokenizer",
    )


def _no_directory(path: Path) -> EngineError:
    """The error for a missing directory. It names the first missing part of the path and a similar name if any."""
    above = next(p for p in (*path.parents, Path()) if p.is_dir())
    missing = path.relative_to(above).parts[0] if above != Path() else path.parts[0]
    near = difflib.get_close_matches(missing, [p.name for p in above.iterdir() if p.is_dir()], 1)
    hint = f"did you mean {above / Path(near[0], *path.relative_to(above).parts[1:])}? " if near else ""
    return EngineError(
        f"no model directory {str(path)!r}: {str(above / missing)!r} does not exist",
        where=f"the name of the model, looked for from {Path.cwd()}",
        fix=f"{hint}name a directory, or a hub id as org/name; a run that makes this model has to come first",
    )


# --- the hub ---


def _is_hub_id(name: str) -> bool:
    """Whether the name has the form org/name and no directory `org` exists here. If one does, a path was meant."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name.partition("/")[0]).is_dir()


@lru_cache(maxsize=256)
def _on_hub(name: str) -> str:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    kept = [try_to_load_from_cache(name, file) for file in (ADAPTER_FILE, MODEL_FILE)]
    cached = next((str(Path(file).parent) for file in kept if isinstance(file, str)), None)
    files, problem = (None, "HF_HUB_OFFLINE is set") if _offline() else _ask_hub("model", name)
    if files is None:
        if cached is not None:
            return cached
        raise EngineError(
            f"there is no directory {name!r}, and as a hub id it cannot be fetched: {problem}",
            where="the name of the model",
            fix="copy the model here and name its directory, or fetch it where there is a network "
            f"(hf download {name}) and copy the cache; set HF_HUB_OFFLINE=1 to use only what is cached",
        )
    if ADAPTER_FILE in files:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    return name


@contextmanager
def without_retries(kind: str, name: str) -> Iterator[None]:
    """If the hub cannot be reached now, makes its libraries read this "model" or "dataset" from the cache only inside
    this block. Otherwise they would retry for half a minute first."""
    from huggingface_hub import constants

    files, problem = (None, "") if _offline() else _ask_hub(kind, name)
    reached = files is not None or problem.startswith(_NOT_THERE)
    libraries: list[Any] = [constants, *(sys.modules[n] for n in ("datasets.config",) if n in sys.modules)]
    before = [library.HF_HUB_OFFLINE for library in libraries]
    for library in libraries:
        library.HF_HUB_OFFLINE = library.HF_HUB_OFFLINE or not reached
    try:
        yield
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = value


_NOT_THERE = "the hub has no"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _ask_hub(kind: str, name: str) -> tuple[list[str] | None, str]:
    """The files of a repository, or None and the reason. The call runs in its own thread, because no time limit can be
    set for a name server or a proxy that does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    answer: list[tuple[list[str] | None, str]] = []

    def ask() -> None:
        try:
            info: Any = HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
            answer.append(([file.rfilename for file in info.siblings or ()], ""))
        except RepositoryNotFoundError:
            answer.append((None, f"{_NOT_THERE} {kind} of this name, or it is private (hf auth login)"))
        except Exception as error:  # whatever the network and its libraries raise
            answer.append((None, f"the hub cannot be reached ({type(error).__name__})"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answer[0] if answer else (None, f"the hub did not answer within {HUB_SECONDS:.0f} seconds")
