"""Checks that two models give a token id the same meaning. It runs when they are loaded, because a difference would
cause no error later."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import ConfigError
from trimtab.core.hub import base_of, find_model, same_model
from trimtab.data.tokenizers import ModelFacts, facts_of, load_tokenizer

FIXES = {
    "reference": "name a reference of the policy's own family and tokenizer, usually the model that the policy starts "
    "from",
    "baseline": "compare with a model of the policy's own family and tokenizer; for another, measure each by itself, "
    "without a baseline",
    "critic": "set critic.init = 'policy' (or 'value_head'), so that the critic starts from the policy; the reward "
    "model can stay, for it is given the text",
    "cost.critic": "name the policy as cost.critic; the reward model of the cost can stay, for it is given the text",
}
"""What to do about a model with another vocabulary than the policy's, by the setting that names it."""


def refuse_other_vocabulary(
    tokenizer: PreTrainedTokenizerBase, path: str | Path, *, role: str, where: str = ""
) -> None:
    """Raises ConfigError unless the model in `path` reads the token ids of this tokenizer as the same text and has a
    row for each token. For a model without a tokenizer of its own only the number of rows is checked. `role` is a key
    of `FIXES`.

    Special tokens may have other names, as reserved tokens within one model family do. Ordinary tokens must be equal.
    """
    own: ModelFacts | None = getattr(tokenizer, "model_facts", None)
    if same_model(path, tokenizer.name_or_path):
        return
    other = load_tokenizer(path) if has_tokenizer(path) else None
    num_rows = _num_rows(path, tokenizer) if other is None else other.model_facts.num_rows
    problem = ""
    if other is not None and (difference := vocabulary_difference(tokenizer, other)):
        problem = f"would read the policy's token ids in another vocabulary: {difference}"
    # Rows that pad an embedding to a round number are not tokens, and are never sampled.
    needed = 1 + max(id_ for id_ in tokenizer.get_vocab().values() if own is None or id_ < own.num_rows)
    if num_rows < needed:
        problem = problem or (
            f"has {num_rows} rows in its embedding and the policy's tokens need {needed}: it could not read every "
            "token that the policy writes"
        )
    if problem:
        name = role.rpartition(".")[2]
        raise ConfigError(f"the {name} {str(path)!r} {problem}", where=where or f"{role} and model", fix=FIXES[role])


def vocabulary_difference(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """A description of how the ordinary tokens of two tokenizers differ; "" if they do not."""
    named = {*tokenizer.added_tokens_decoder, *other.added_tokens_decoder}
    ours = {id_: text for text, id_ in tokenizer.get_vocab().items() if id_ not in named}
    theirs = {id_: text for text, id_ in other.get_vocab().items() if id_ not in named}
    differing = [id_ for id_ in sorted(ours.keys() | theirs.keys()) if ours.get(id_) != theirs.get(id_)]
    if not differing:
        return ""
    first = differing[0]
    return (
        f"{len(differing)} of {len(ours)} ids stand for other text, such as {first}, which is {ours.get(first)!r} here "
        f"and {theirs.get(first)!r} there"
    )


def has_tokenizer(path: str | Path) -> bool:
    """Whether a model directory holds a tokenizer, or names a base that does. Always true for a hub id."""
    name = Path(find_model(path))
    if not name.is_dir() or any((name / file).exists() for file in ("tokenizer_config.json", "tokenizer.json")):
        return True
    base = base_of(path)
    return base is not None and has_tokenizer(base)


def _num_rows(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> int:
    return facts_of(tokenizer, find_model(path), base_of(path)).num_rows
