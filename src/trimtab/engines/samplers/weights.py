"""The files by which a sampler process gets its model and, after every update, the new weights.

They lie in memory (/dev/shm) if there is such a place. Every revision has a directory of its own, which nothing is
written over, so that no reader can take an older file for it.
"""

from __future__ import annotations

import fcntl
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
from trimtab.models.save import cast_weights

WEIGHTS_FILE = "model.safetensors"
_PREFIX = "trimtab-weights-"
_LOCK = "in-use"


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


class Scratch:
    """A directory for weights, in memory if this machine has a file system there. It is locked while this process uses
    it; those that killed runs have left, which no process holds, are removed."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        place = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        for left in place.glob(f"{_PREFIX}*/{_LOCK}"):
            if (lock := _locked(left)) is not None:
                shutil.rmtree(left.parent, ignore_errors=True)
                os.close(lock)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))
        (self.path / "new").touch()
        self._lock = _locked(self.path / "new")
        (self.path / "new").rename(self.path / _LOCK)  # nobody sees it before it is locked

    def remove(self) -> None:
        """Removes the directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(file: Path) -> int | None:
    """The descriptor of a file that is locked until it is closed; None if another process holds the lock, or if the
    file is not this user's."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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


def write_revision(policy: Policy, directory: Path, dtype: torch.dtype) -> None:
    """Writes the weights as they are now; those of the adapter if the policy is one, else all of them in `dtype`, in
    one file and under the names that the model's checkpoints have."""
    with writing("the weights for the sampler", directory, kept="the same command goes on from the last checkpoint"):
        if policy.adapter is not None:
            save_adapter(policy.model, policy.adapter, directory, base=str(policy.model.name_or_path))
        else:
            weights = cast_weights(policy.model, dtype)
            policy.model.save_pretrained(directory, state_dict=weights, max_shard_size="1000TB")
