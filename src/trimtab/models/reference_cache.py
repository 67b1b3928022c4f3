"""Log-probabilities of a reference that never changes: computed once, kept on disk, and computed again when anything
that they depend on changes.

A file is named by a hash of everything that its values depend on: the weights and the architecture, the token ids
(which reflect the data, the template, the tokenizer and any truncation), the precision, the temperature, how the
forward passes are split, and the version of torch. So a file is never out of date; after a change it is only not found.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.batches.trees import TokenTrees, Tree
from trimtab.core.files import replacing
from trimtab.core.terminal import warn
from trimtab.models.forward import token_logprobs_of
from trimtab.models.roles import Policy

TREES_PER_FILE = 4096
"""Trees in one file, which are the most that a killed run has to compute again."""


def reference_logprobs(reference: Policy, trees: Sequence[Tree], *, token_budget: int, directory: Path) -> list[Tensor]:
    """Log-probabilities of the trained tokens of each tree, [num_trained] float32. They are read from `directory` if
    they are kept there, else computed and kept. A damaged file is reported on stderr and made again."""
    digest = model_hash(reference)
    found: list[Tensor] = []
    for start in range(0, len(trees), TREES_PER_FILE):
        part = trees[start : start + TREES_PER_FILE]
        path = directory / f"{content_key(digest, reference, part, token_budget)}.safetensors"
        sizes = [tree.num_trained for tree in part]
        kept = read(path, sum(sizes))
        if kept is None:
            began = time.perf_counter()
            kept = token_logprobs_of(reference, TokenTrees.build(part), token_budget)
            write(path, kept)
            took = time.perf_counter() - began
            print(f"reference: {len(part)} prompts read in {took:.1f} s, kept in {path}", file=sys.stderr)
        else:
            print(f"reference: {len(part)} prompts read before, in {path}", file=sys.stderr)
        found.extend(torch.split(kept, sizes))
    return found


def model_hash(policy: Policy) -> str:
    """SHA-256 of the weights that the policy uses and of its architecture. It does not depend on adapters of other
    roles, nor on the names under which adapters store the weights of the base."""
    model = policy.model
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_ARCHITECTURE}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in sorted((n.replace(".base_layer", ""), t) for n, t in tensors.items()):
        if "lora_" in name:
            if policy.adapter is None or f".{policy.adapter}." not in name:
                continue
            name = name.replace(f".{policy.adapter}.", ".")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    if policy.adapter is not None:  # the scale of an adapter is not among its weights
        layers: Any = model.named_modules()
        scaling = [(n, m.scaling[policy.adapter]) for n, m in layers if policy.adapter in getattr(m, "lora_A", ())]
        digest.update(json.dumps(sorted(scaling)).encode())
    return digest.hexdigest()


_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def content_key(model_digest: str, policy: Policy, trees: Sequence[Tree], token_budget: int) -> str:
    """The file name, without suffix, for the log-probabilities of these trees under a model with this digest."""
    how = [model_digest, policy.precision, policy.temperature, policy.way, token_budget, torch.__version__]
    digest = hashlib.sha256(json.dumps(how).encode())
    for tree in trees:
        shape = (len(tree.prompt), *(len(b.ids) for b in tree.branches))
        ids = [*tree.prompt, *(i for b in tree.branches for i in b.ids), *(m for b in tree.branches for m in b.mask)]
        digest.update(_bytes(torch.tensor([len(shape), *shape, *ids], dtype=torch.int64)))
    return digest.hexdigest()[:32]


def read(path: Path, size: int) -> Tensor | None:
    """The values [size] that `write` kept. None if the file is missing or damaged; damage is reported on stderr."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            values: Tensor = file.get_tensor("logprobs")
            checksum = (file.metadata() or {}).get("sha256")
        problem = "" if values.shape == (size,) else f"it holds {tuple(values.shape)} values, {size} are wanted"
        problem = problem or ("" if checksum == _checksum(values) else "its checksum does not hold")
    except (SafetensorError, OSError) as error:
        problem = str(error)
    if problem:
        warn(f"{path} is damaged ({problem}); it is made again")
        return None
    return values


def write(path: Path, logprobs: Tensor) -> None:
    """Writes the values with their checksum, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        save_file({"logprobs": logprobs.contiguous()}, aside, metadata={"sha256": _checksum(logprobs)})


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(_bytes(values)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
