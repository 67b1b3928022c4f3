"""Writes a checkpoint as a whole model: an adapter is merged into its base, and end and padding tokens are set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from trimtab.core.errors import ConfigError
from trimtab.core.files import new_directory
from trimtab.core.hub import refuse_ensemble
from trimtab.models.load import is_classifier, load_causal, load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.length_correction import LENGTH_FILE

Dtype = Literal["as stored", "float32", "bfloat16", "float16"]


def export(*, model: str, out: Path, dtype: Dtype = "as stored") -> str:
    """Writes the policy or reward model `model` to `out`, whole or not at all, and says what was written. The directory
    must be new or empty.

    An adapter of any kind that peft can merge is merged, with every part it brings.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} is there and not empty", where="--out", fix="name a new directory")
    refuse_ensemble(model, where=model)
    tokenizer = load_tokenizer(model)
    scalar = is_classifier(model)
    loaded = load_scalar(model) if scalar else load_causal(model)
    with new_directory(out) as aside:
        save_model(loaded, tokenizer, aside, dtype=None if dtype == "as stored" else getattr(torch, dtype))
        if (correction := Path(model).expanduser() / LENGTH_FILE).is_file():
            shutil.copyfile(correction, aside / LENGTH_FILE)  # the scores are the same, so are their curves
    return f"{out}: a {'reward model' if scalar else 'language model'}, {type(loaded).__name__}"
