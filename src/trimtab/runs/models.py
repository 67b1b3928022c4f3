"""Digests of model directories, by which a resumed run finds that a model is not the one it began with."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
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


def trained_on(models: Sequence[str], sources: Mapping[str, str]) -> list[str]:
    """Those of the `sources`, given with the hashes of their contents, on which one of the models was trained. Known of
    models in the directory of the run that made them; data of which a share was held out counts."""
    hashes = {_training_data(Path(model).expanduser().resolve()) for model in models}
    return [source for source, sha256 in sources.items() if sha256 in hashes - {None}]


def _training_data(model: Path) -> str | None:
    """The hash of the data that the run around a model was trained on. None if it lies in no such directory; there may
    be files of these names that are no record of a run."""
    for directory in model.parents[:3]:  # a member of an ensemble lies in model/members/1
        if not (directory / "settings.toml").is_file() or not (directory / "data.json").is_file():
            continue
        with suppress(ValueError, LookupError, TypeError):
            settings = tomllib.loads((directory / "settings.toml").read_text(encoding="utf-8"))
            return str(json.loads((directory / "data.json").read_text(encoding="utf-8"))[settings["data"]]["sha256"])
    return None


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
