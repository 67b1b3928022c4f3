"""Log-probabilities of a reference that never changes: found once, kept on disk, and found again when anything they
depend on is another.

What is kept is named by a hash of everything it follows from: the weights and the architecture, the token ids (which
hold the data, the template, the tokenizer and any truncation), the precision, the temperature, how the passes are cut,
and the version of torch. So nothing is ever out of date; it is only not found.
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
from trimtab.models.forward import token_logprobs_of
from trimtab.models.roles import Policy

TREES_PER_FILE = 4096
"""Trees of one file: what a killed run has to do again at most."""


def reference_logprobs(reference: Policy, trees: Sequence[Tree], *, token_budget: int, directory: Path) -> list[Tensor]:
    """Log-probabilities of the trained tokens of each tree, [num_trained] float32, from `directory` where they are
    kept there. What is computed is kept; a damaged file is said on stderr, and made again."""
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
    """SHA-256 of the weights the policy computes with and of its architecture. An adapter that is not its own does not
    count, nor under which names adapters keep the weights of the base."""
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
    if policy.adapter is not None:  # how much an adapter counts is not among its weights
        layers: Any = model.named_modules()
        scaling = [(n, m.scaling[policy.adapter]) for n, m in layers if policy.adapter in getattr(m, "lora_A", ())]
        digest.update(json.dumps(sorted(scaling)).encode())
    return digest.hexdigest()


_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def content_key(model_digest: str, policy: Policy, trees: Sequence[Tree], token_budget: int) -> str:
    """The name of what these trees give under a model with this digest."""
    how = [model_digest, policy.precision, policy.temperature, policy.form, token_budget, torch.__version__]
    digest = hashlib.sha256(json.dumps(how).encode())
    for tree in trees:
        shape = (len(tree.prompt), *(len(b.ids) for b in tree.branches))
        ids = [*tree.prompt, *(i for b in tree.branches for i in b.ids), *(m for b in tree.branches for m in b.mask)]
        digest.update(_bytes(torch.tensor([len(shape), *shape, *ids], dtype=torch.int64)))
    return digest.hexdigest()[:32]


def read(path: Path, size: int) -> Tensor | None:
    """What `write` kept, [size]; None where there is nothing, or nothing whole, which is then said."""
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
        print(f"warning: {path} is damaged ({problem}); it is made again", file=sys.stderr)
        return None
    return values


def write(path: Path, logprobs: Tensor) -> None:
    """Keeps the values with their checksum, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        save_file({"logprobs": logprobs.contiguous()}, aside, metadata={"sha256": _checksum(logprobs)})


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(_bytes(values)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
