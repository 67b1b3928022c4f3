"""Digests of model directories, by which a resumed run finds that a model is not the one it began with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trimtab.core.hub import ADAPTER_FILE, BESIDE_FILE, base_of, is_ensemble, members_in, read_json

_READ = ("*.json", "*.jinja", "*.model", "*.safetensors")
"""The files that decide what a model computes: configuration, tokenizer, template and weights."""
CARD_FILE = "reward_card.json"
"""What was found out about a reward model (`evals/reward_card.schema.json`), which changes nothing that it computes."""
_WHOLE_BYTES = 2**26
"""A file up to this size is read whole; of a larger one, the header and blocks at even distances are read."""
_NUM_BLOCKS, _BLOCK_BYTES = 1024, 4096


def model_digest(directory: str | Path) -> str:
    """The SHA-256 of a model directory: of the contents of its files, for an adapter of those of its base too,
    and for an ensemble of those of all members.

    Where the directory and the base lie does not count. Large weights are sampled: training changes nearly all of their
    numbers, and reading many gigabytes would take longer than the first steps.
    """
    path = Path(directory)
    digest = hashlib.sha256()
    for file in sorted(
        {file for pattern in _READ for file in path.glob(pattern)} - {path / BESIDE_FILE, path / CARD_FILE}
    ):
        digest.update(file.name.encode())
        if file.name == ADAPTER_FILE:
            described = read_json(file) | {"base_model_name_or_path": None}
            digest.update(json.dumps(described, sort_keys=True).encode())
        else:
            _add_file(digest, file)
    if is_ensemble(path):  # this is the directory of its first member
        for member in members_in(path)[1:]:
            digest.update(model_digest(member).encode())
    base = base_of(path)
    if base is not None:
        digest.update((local_digest(base) or base).encode())
    return digest.hexdigest()


def local_digest(model: str | Path) -> str | None:
    """The digest of a model in a directory; None for a hub id."""
    return model_digest(model) if Path(model).is_dir() else None


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        if size <= _WHOLE_BYTES:
            digest.update(opened.read())
            return
        header = int.from_bytes(opened.read(8), "little")
        digest.update(opened.read(min(header, _WHOLE_BYTES)))
        for number in range(_NUM_BLOCKS):
            opened.seek(number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            digest.update(opened.read(_BLOCK_BYTES))
