"""The card of a reward model, as a file and as sentences.

The reward stage writes the card of the model that it trained; the command judges any reward model on further pairs.
Both score the pairs, score the probes in one further pass, and leave all figures to `evals`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import check_out, json_text, write_out
from trimtab.core.hub import members_in, read_json
from trimtab.core.types import PreferencePair, Prompt
from trimtab.data.layouts import Loaded, OnBadRow, Reading, load
from trimtab.engines.device import device_of
from trimtab.evals.length_curves import length_figures
from trimtab.evals.probes import make_probes, read_probes
from trimtab.evals.reward_card import SIDES, reward_card
from trimtab.reports.card_page import write_card
from trimtab.reports.card_sentences import card_sentences
from trimtab.rewards.length_correction import LengthCorrection, corrections_in
from trimtab.rewards.model import RewardModel
from trimtab.rewards.scorer import TOKEN_BUDGET, RewardModelScorer, lengths_of, rewards_of
from trimtab.runs.models import CARD_FILE, local_digest, trained_on
from trimtab.stats import Floats

PAGE_FILE = "reward_card.html"
AVERAGE_FILE = "average.json"
"""The members and the points of an average, in its directory."""
VERSION = 1
"""The version of the schema, raised when a reader of the file would have to change."""

Texts = Sequence[tuple[Prompt, str]]


def card(
    *,
    model: str,
    data: Sequence[str],
    out: Path | None = None,
    slice_by: str | None = None,
    on_bad_row: OnBadRow = "stop",
    device: str | None = None,
) -> list[str]:
    """Judges a reward model on preference pairs, writes `reward_card.json` and a page with its charts into the
    directory `out` if it is given, and returns the sentences of the card.

    The pairs of all sources are judged together. Their slices are the values of the fact `slice_by`, or without it the
    sources if there are several. A pair that the model cannot read is left out and counted in `num_too_long`; with
    "drop" a row that cannot be used is left out too, and counted in `num_bad_rows`. Raises DataError for such a row
    otherwise, if a pair lacks the fact, and if no pair is left; raises ConfigError if a source is given twice.
    """
    refuse_repeated_sources(data)
    if out is not None:
        check_out(out / CARD_FILE)
    loaded = {source: load(PreferencePair, source, on_bad_row=on_bad_row) for source in data}
    by_source = {source: one.records for source, one in loaded.items()}
    pairs = [pair for records in by_source.values() for pair in records]
    if slice_by is not None:
        slices = [name for source, one in loaded.items() for name in _values_of(slice_by, one, source)]
    else:
        slices = [source for source, records in by_source.items() for _ in records] if len(data) > 1 else []
    scorer = RewardModel(path=model).load(token_budget=TOKEN_BUDGET, device=device_of(device))
    chosen, rejected = rewards_of_sides(scorer, pairs, unread="nan")
    fits = ~np.isnan(chosen + rejected)
    if not fits.any():
        raise DataError(
            f"none of {len(pairs)} pairs fits into the {scorer.positions} positions of the reward model",
            where=", ".join(data),
            fix="give shorter pairs, or use a reward model that reads longer ones",
        )
    judged = list(compress(pairs, fits))
    found = measure(
        judged,
        chosen=chosen[fits],
        rejected=rejected[fits],
        score=lambda texts: rewards_of(scorer, texts, unread="nan"),
        lengths=reply_lengths(scorer, judged),
        corrections=corrections_in(model),
        slices=list(compress(slices, fits)),
    )
    found |= {"num_too_long": int((~fits).sum()), **of_reading(model, loaded)}
    if out is not None:
        write_out(out / CARD_FILE, card_text(found, model=model, digest=local_digest(model), data=data))
        write_card(found, out / PAGE_FILE, model=model)
    return card_sentences(found)


def rewards_of_sides(
    scorer: RewardModelScorer, pairs: Sequence[PreferencePair], *, unread: Literal["refuse", "nan"] = "refuse"
) -> tuple[Floats, Floats]:
    """The rewards of the chosen and of the rejected replies. They are scored in one call, so that two replies that are
    the same to the model, as those that differ in a blank which its template strips, are a tie."""
    found = rewards_of(scorer, [text for side in SIDES for text in texts_of(pairs, side)], unread=unread)
    return found[: len(pairs)], found[len(pairs) :]


def refuse_repeated_sources(sources: Sequence[str]) -> None:
    """Raises ConfigError if a source is given twice: what it holds would count twice."""
    if twice := [source for number, source in enumerate(sources) if source in sources[:number]]:
        raise ConfigError(f"{twice[0]} is given twice", where="the command line", fix="give each source once")


def of_reading(model: str, loaded: Mapping[str, Reading]) -> dict[str, Any]:
    """What a card says of its sources: `num_bad_rows`, and as `trained_on` those on which the model, or a member of it,
    was trained, if there are any."""
    average = Path(model).expanduser() / AVERAGE_FILE
    members = read_json(average).get("members", []) if average.is_file() else members_in(model)
    seen = trained_on(members, {source: one.sha256 for source, one in loaded.items()})
    return {"num_bad_rows": sum(one.num_dropped for one in loaded.values())} | ({"trained_on": seen} if seen else {})


def texts_of(pairs: Sequence[PreferencePair], side: str) -> Texts:
    """The prompt and the reply on one of the `SIDES` of each pair."""
    return [(pair.prompt, getattr(pair, side)) for pair in pairs]


def reply_lengths(scorer: RewardModelScorer, pairs: Sequence[PreferencePair]) -> Floats:
    """[2, num_pairs] the numbers of tokens of the chosen and the rejected replies, as the model reads them."""
    texts = [text for side in SIDES for text in texts_of(pairs, side)]
    return np.array(lengths_of(scorer.ids_of_texts(texts)), dtype=np.float64).reshape(2, -1)


def measure(
    pairs: Sequence[PreferencePair],
    *,
    chosen: Floats,
    rejected: Floats,
    score: Callable[[Texts], Floats],
    lengths: Floats,
    corrections: Mapping[str, LengthCorrection],
    **options: Any,
) -> dict[str, Any]:
    """The whole card: `reward_card` from the rewards of the pairs, [num_pairs] each, with its `options`; what `score`
    gives to the probes that are made of them; and what the rewards owe to the `lengths` [2, num_pairs] of the replies,
    as they are and after each of the `corrections`."""
    known = [_probability_chosen(pair) for pair in pairs]
    probes = make_probes(pairs)
    both = np.stack([chosen, rejected])
    corrected = {name: both - correction.of_mean(lengths) for name, correction in corrections.items()}
    by_length = {"length": length_figures(pairs, rewards={"none": both} | corrected, lengths=lengths)}
    return (
        by_length
        | reward_card(
            pairs,
            score_chosen=chosen,
            score_rejected=rejected,
            probability_chosen=None if None in known else np.array(known, dtype=float),
            **options,
        )
        | read_probes(probes, score([(probe.prompt, probe.text) for probe in probes]))
    )


def _probability_chosen(pair: PreferencePair) -> float | None:
    """The known chance that an annotator of a world prefers the chosen reply. None without one, and for a fact of that
    name that is no probability."""
    value = pair.prompt.facts.get("probability_chosen")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 1 else None


def card_text(found: dict[str, Any], *, model: str, digest: str | None, data: Sequence[str]) -> str:
    """The card as its file holds it: with its version, the model, the model's digest if there is one, and the sources
    of the pairs."""
    return json_text({"version": VERSION, "model": model, "model_sha256": digest, "data": list(data), **found})


def _values_of(fact: str, loaded: Loaded[PreferencePair], source: str) -> list[str]:
    pairs = loaded.records
    if missing := sum(fact not in pair.prompt.facts for pair in pairs):
        known = ", ".join(sorted({name for pair in pairs for name in pair.prompt.facts})) or "none"
        column = (
            f"; {fact} is a column: jq -c '.facts.{fact} = .{fact}' makes a fact of it" if fact in loaded.unused else ""
        )
        raise DataError(
            f"{missing} of {len(pairs)} pairs have no fact {fact!r}",
            where=source,
            fix=f'give every row "facts": {{"{fact}": …}}, or another --slice; facts here: {known}{column}',
        )
    return [str(pair.prompt.facts[fact]) for pair in pairs]
