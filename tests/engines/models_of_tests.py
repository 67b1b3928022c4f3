"""Models that the processes of a test load, each by the name of the case that uses it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import tiny
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import load_tokenizer
from trimtab.engines.build import Engines
from trimtab.engines.device import EngineSettings
from trimtab.models.adapters import LoRA, add_adapter
from trimtab.models.load import load_causal
from trimtab.models.roles import Policy, ScalarModel

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed; pip install '.[ray]' lifts this"
)


@dataclass(frozen=True, kw_only=True)
class CaseSettings:
    """The settings of a group of processes in a test."""

    model: str
    cases: tuple[str, ...] | None = None
    """The cases to load; None is all."""
    engine: EngineSettings = field(default_factory=EngineSettings)


def _policy(family: str, **options):
    return Policy(tiny.causal(family), pad_id=0, **options)


def _padded():
    policy = _policy("llama")
    policy.tree_form = False
    return policy


def _adapter():
    model = tiny.causal("llama")
    add_adapter(model, "policy", LoRA(rank=2), seed=0)
    return Policy(model, pad_id=0, adapter="policy")


CASES = {
    "llama": lambda: _policy("llama"),
    "qwen3": lambda: _policy("qwen3"),
    "gpt2, tied": lambda: _policy("gpt2"),
    "mistral, windowed": lambda: _policy("mistral_windowed"),
    "padded rows": _padded,
    "adapter": _adapter,
    "value head": lambda: _policy("llama", with_value_head=True),
    "critic": lambda: ScalarModel(tiny.scalar("llama"), pad_id=0, gives="values"),
    "checkpointed": lambda: _policy("llama"),
    "few trees": lambda: _policy("llama"),
    "resumed": lambda: _policy("llama"),
    "reference": lambda: _policy("llama", temperature=0.7),
    "nan": lambda: _policy("llama"),
}


def load(settings: CaseSettings, _directory: Path):
    """Every case's model, and two policies with a tokenizer to sample from."""
    chat = Chat(load_tokenizer(settings.model))
    samplers = {
        f"sampled at {t}": Policy(load_causal(settings.model), pad_id=chat.pad_id, temperature=t) for t in (1.0, 0.7)
    }
    return settings.model, {name: CASES[name]() for name in settings.cases or CASES} | samplers


def start(directory, workers, cases=None, **engine):
    """Engines over this many processes, and the models in this one."""
    settings = CaseSettings(model=str(directory), cases=cases, engine=EngineSettings(workers=workers, **engine))
    models = load(settings, directory)[1]
    return Engines.start(settings, directory, load=load, models=models), models
