"""The files by which a sampler process gets its model and, after every update, the new weights.

They lie in memory (/dev/shm) if there is such a place. Every version has a directory of its own, which nothing is
written over, so that no reader can take an older file for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import EngineError
from trimtab.core.files import writing
from trimtab.core.hub import find_model
from trimtab.models.adapters import save_adapter
from trimtab.models.precision import Precision
from trimtab.models.quantized import is_quantized
from trimtab.models.roles import Policy

WEIGHTS_FILE = "model.safetensors"
_PREFIX = "trimtab-weights-"


@dataclass(frozen=True, kw_only=True)
class SamplerStart:
    """What a sampler process must know before its first reply."""

    engine: str
    """ "vllm", or "process" for the forms of decoding of this package."""
    model: str
    """The directory of the model, or of the base of an adapter."""
    tokenizer: str
    """The directory of the tokenizer."""
    rank: int
    """The rank of the adapter that is drawn from; 0 means that all weights are sent."""
    device: str
    gpu_memory: float
    """The share of a GPU's memory that vLLM takes."""
    precision: Precision
    temperature: float
    max_length: int
    """The most tokens of a prompt and its reply together."""
    batch_size: int
    cache_gb: float
    threads: int
    """Threads that compute, on a CPU."""


def scratch_directory() -> Path:
    """A new directory for weights, in memory if this machine has a file system there. Those that killed runs have left
    are removed."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        if not _is_alive(int(left.name.removeprefix(_PREFIX).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))


def refuse_rounded_base(policy: Policy) -> None:
    """Raises EngineError if the policy is an adapter of a base that was rounded when it was loaded."""
    if is_quantized(policy.model):
        raise EngineError(
            "the base of the adapter has rounded weights, which a sampler process would not have",
            where="adapter.base_bits and engine.sampler",
            fix='set engine.sampler.name = "local", or adapter.base_bits = 32',
        )


def base_and_rank(policy: Policy) -> tuple[str | None, int]:
    """The path of the base and the rank of the adapter, if the policy is one; else None and 0."""
    if policy.adapter is None:
        return None, 0
    with_adapters: Any = policy.model
    return find_model(str(policy.model.name_or_path)), int(with_adapters.peft_config[policy.adapter].r)


def write_version(policy: Policy, directory: Path, precision: Precision) -> None:
    """Writes the weights as they are now, rounded to the precision of the products; those of the adapter if the policy
    is one."""
    if policy.adapter is not None:
        with _writing(directory):
            save_adapter(policy.model, policy.adapter, directory, base=str(policy.model.name_or_path))
    else:
        _save_model(policy, directory, torch.bfloat16 if precision == "bfloat16" else torch.float32)


def _save_model(policy: Policy, directory: Path, dtype: torch.dtype) -> None:
    """The model under the names of its checkpoints, in one file."""
    weights = {name: tensor.to(dtype) for name, tensor in policy.model.state_dict().items()}
    with _writing(directory):
        policy.model.save_pretrained(directory, state_dict=weights, max_shard_size="1000TB")


def _writing(directory: Path) -> contextlib.AbstractContextManager[None]:
    return writing("the weights for the sampler", directory, kept="the same command goes on from the last checkpoint")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
