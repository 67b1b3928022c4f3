"""Fits the correction of a reward model for length to a fixed set of replies, and writes it beside the weights.

The reward stage does this by itself, on the replies that it holds out. The command is for models of other programs, for
averages, and for another set of replies, such as samples of the policy that is to be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import writing
from trimtab.core.types import Demonstration, PreferencePair, prompt_id
from trimtab.data.layouts import OnBadRow, load
from trimtab.engines.device import device_of
from trimtab.evals.length_curves import BANDWIDTH, length_premium, length_refusal
from trimtab.evals.reward_card import SIDES
from trimtab.reports.card_sentences import amount
from trimtab.rewards.length_correction import LENGTH_FILE, fitted, write_correction
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import TOKEN_BUDGET, finite_scores, lengths_of
from trimtab.stages.card import Texts, of_reading, refuse_repeated_sources, texts_of
from trimtab.stages.use import holds_pairs


def debias(
    *,
    model: str,
    data: Sequence[str],
    bandwidth: float = BANDWIDTH,
    on_bad_row: OnBadRow = "stop",
    device: str | None = None,
) -> list[str]:
    """Writes length_correction.json into the directory of the reward model; returns sentences about it.

    The replies of all sources are taken together, of pairs both sides. Replies that the model cannot read are left out,
    and with "drop" rows that cannot be used; sentences count them. Raises ConfigError if the model is no directory or a
    source is given twice, and DataError if the replies are too few or all of one length.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise ConfigError(
            f"{model!r} is no directory here, and the correction is kept beside the weights",
            where="MODEL",
            fix="fetch the model into a directory (hf download NAME --local-dir DIRECTORY), and name that",
        )
    refuse_repeated_sources(data)
    scorer = RewardModel(path=model).load(token_budget=TOKEN_BUDGET, device=device_of(device))
    loaded = {source: load(kind_of(source), source, on_bad_row=on_bad_row) for source in data}
    texts = [text for one in loaded.values() for text in replies_of(one.records)]
    most = scorer.positions
    read = [
        (prompt_id(prompt.messages), ids)
        for (prompt, _), ids in zip(texts, scorer.ids_of_texts(texts), strict=True)
        if most is None or len(ids[0]) + len(ids[1]) <= most
    ]
    sequences = [ids for _, ids in read]
    lengths = np.array(lengths_of(sequences), dtype=np.float64)
    if problem := length_refusal(lengths):
        raise DataError(
            problem,
            where=", ".join(data),
            fix="give more replies, of different lengths, such as samples of the policy or held-out pairs",
        )
    scores = finite_scores(scorer.member_scores(sequences).double().numpy(), of=scorer.model)
    with writing(LENGTH_FILE, directory / LENGTH_FILE):
        write_correction(fitted(scores, lengths, data=data, bandwidth=bandwidth), directory)
    premium = length_premium(scores.mean(0), lengths, [prompt for prompt, _ in read])
    said = [
        f"fitted to {len(read)} replies of {lengths.min():.0f} to {lengths.max():.0f} tokens: one standard deviation "
        f"of length ({lengths.std():.0f} tokens) goes with {amount(premium)} of reward",
        f"{directory / LENGTH_FILE}: use it with length_correction = 'lowess' or 'regression'; trimtab card says what "
        "it costs in accuracy",
        "the directory has changed: a card written before is not its card any more, and a run that began with it "
        "before does not go on with it",
    ]
    about = of_reading(model, loaded)
    if sources := about.get("trained_on"):
        said.append(
            f"the model was trained on {' and '.join(sources)}: fit the curves to replies that it has not seen, for "
            "which it may pay otherwise"
        )
    for num, why in (
        (len(texts) - len(read), "replies are left out, because the model cannot read texts so long"),
        (about["num_bad_rows"], "rows are left out, because they cannot be used"),
    ):
        said += [f"{num} {why}"] * bool(num)
    return said


def kind_of(source: str) -> type[Any]:
    """The kind of record that holds the replies of a source: pairs, or single replies."""
    return PreferencePair if holds_pairs(source) else Demonstration


def replies_of(records: Sequence[Any]) -> Texts:
    """The replies of records with their prompts; of pairs both sides."""
    if records and isinstance(records[0], PreferencePair):
        return [text for side in SIDES for text in texts_of(records, side)]
    return [(one.prompt, one.response) for one in records]
