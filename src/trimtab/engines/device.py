"""Where a stage computes: the device of its models, and the processes. It is chosen here; everything below follows the
device of its input."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from trimtab.core.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a stage is computed, and not what it computes: a resumed run may change all of it."""

    device: str = "cpu"
    """Where the models compute: "cpu", "cuda", or for example "cuda:1" for the second GPU."""

    workers: int = 1
    """Processes of this machine that compute together. Each holds the models and takes a share of every batch."""
    shard: bool = False
    """Each process keeps a share of the weights, gradients and optimizer state of a trained model, and gathers it to
    sample and to score. False keeps the whole model in each."""
    timeout_seconds: float = 600.0
    """A worker that takes longer over one call has hung, and ends the run."""

    def __post_init__(self) -> None:
        if self.shard and self.workers == 1:
            raise ValueError("shard = true with workers = 1: there is no other process to share with")
        if self.workers > 1 and self.device != "cpu":
            raise ValueError(
                f"workers = {self.workers} with device = {self.device!r}: several processes compute on the CPU only; "
                "set device = 'cpu' or workers = 1"
            )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f'device = {self.device!r}; it is "cpu", "cuda", or "cuda:1" for the second GPU')

    def find_device(self) -> torch.device:
        """The device. Raises EngineError if this machine does not have it."""
        device = torch.device(self.device)
        if device.type == "cpu":
            return device
        there = torch.cuda.device_count()
        if (device.index or 0) >= there:
            seen = f"this machine has {there} GPUs" if there else "torch sees no GPU on this machine"
            built = "" if torch.version.cuda else f", and torch {torch.__version__} is built without CUDA"
            raise EngineError(
                f"device = {self.device!r}, but {seen}{built}",
                where="engine.device",
                fix="set engine.device = 'cpu', or install the CUDA build of torch (https://pytorch.org) on a machine "
                "with a GPU",
            )
        # A tensor on a GPU names its number, and is compared with this device.
        return torch.device("cuda", device.index or 0)
