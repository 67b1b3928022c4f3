"""From votes to training records: aggregation, soft labels, margins, splits by prompt and by annotator."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sqlalchemy import Connection

from trimtab.feedback.aggregate import Method, aggregate, share_of_a
from trimtab.feedback.project import Labels
from trimtab.feedback.vote_table import votes_from_rows
from trimtab.feedback.votes import Cast, cast_votes, ranked_pairs
from trimtab.types import (
    Comparison,
    Demonstration,
    JsonDict,
    LabelledResponse,
    PreferencePair,
    Prompt,
    SteppedResponse,
    from_dict,
)

Split = Literal["all", "train", "held_out"]
_METHODS: dict[str, Method] = {
    "share": "majority",
    "majority": "majority",
    "dawid_skene": "dawid_skene",
    "one_coin": "one_coin",
    "mace": "mace",
}


@dataclass(frozen=True)
class _Judgement:
    """One choice between two replies: of a pair, or out of a ranking."""

    key: str
    prompt: Prompt
    a: str
    b: str
    choice: str
    margin: float
    """Of the chosen side; 0 for neither."""
    cast: Cast


def votes_in(connection: Connection, settings: Labels, split: Split, kinds: Sequence[str]) -> list[Cast]:
    """The votes of a split that judge replies of these kinds.

    "held_out" has the held-out prompts, and of the people only the held-out ones where some are; "train" has none of
    either. Votes of train people on held-out prompts, and the reverse, are in neither.
    """
    chosen = []
    for cast in cast_votes(connection, judged_only=True):
        if cast.kind not in kinds:
            continue
        prompt_out = _place(cast.prompt_id) < settings.held_out_prompts
        person_out = _place(cast.annotator) < settings.held_out_annotators
        keep = {
            "all": True,
            "train": not prompt_out and not person_out,
            "held_out": prompt_out and (person_out or settings.held_out_annotators == 0),
        }
        if keep[split]:
            chosen.append(cast)
    return chosen


def preference_pairs(
    connection: Connection, settings: Labels, split: Split = "all"
) -> tuple[list[PreferencePair], dict[str, int]]:
    """A pair for each two replies on which the votes lean, in the order in which they were first judged, and counts.

    An adjudicated item has the adjudicator's choice; an edited reply is preferred to the one it was made from.
    """
    casts = votes_in(connection, settings, split, ("pairs", "ranking"))
    counts = Counter(votes=len(casts))
    judgements = [j for cast in casts for j in _judgements(cast, settings)]
    decided = _adjudicated(connection, settings)
    kept = []
    for judgement in judgements:
        choice = judgement.choice
        if choice == "both_bad" and settings.both_bad == "drop":
            counts["dropped_both_bad_votes"] += 1
        elif choice == "tie" and settings.ties == "drop":
            counts["dropped_tie_votes"] += 1
        else:
            kept.append(judgement)
    by_key: dict[str, list[_Judgement]] = defaultdict(list)
    for judgement in kept:
        by_key[judgement.key].append(judgement)
    shares = _shares(kept, settings)
    pairs = []
    for key, group in by_key.items():
        counts["judged_pairs"] += 1
        share_a = decided.get(key, shares[key])
        first = group[0]
        share = max(share_a, 1 - share_a)
        if key not in decided and len(group) < settings.min_votes:
            counts["dropped_few_votes"] += 1
        elif np.isclose(share_a, 0.5):
            counts["dropped_even_votes"] += 1
        elif share < settings.min_agreement:
            counts["dropped_low_agreement"] += 1
        else:
            chosen, rejected = (first.a, first.b) if share_a > 0.5 else (first.b, first.a)
            counts["adjudicated"] += key in decided
            pairs.append(
                PreferencePair(
                    prompt=first.prompt,
                    chosen=chosen,
                    rejected=rejected,
                    margin=_margin(group, "A" if share_a > 0.5 else "B") if settings.margins else None,
                    label=1.0 if settings.rule == "majority" else float(share),
                )
            )
    for cast in votes_in(connection, settings, split, ("edit",)):
        original = cast.replies[0]["text"]
        if cast.answer.text and cast.answer.text != original:
            prompt = from_dict(Prompt, cast.prompt)
            pairs.append(PreferencePair(prompt=prompt, chosen=cast.answer.text, rejected=original))
            counts["edited_replies"] += 1
    counts["pairs"] = len(pairs)
    return pairs, dict(counts)


def comparisons(connection: Connection, settings: Labels, split: Split = "all") -> list[Comparison]:
    """Every vote over two replies by itself; "both bad" as a tie where the project says so, else left out."""
    found = []
    for cast in votes_in(connection, settings, split, ("pairs", "ranking")):
        for j in _judgements(cast, settings):
            choice = "tie" if j.choice == "both_bad" and settings.both_bad == "tie" else j.choice
            if choice in ("A", "B", "tie"):
                found.append(
                    Comparison(
                        prompt=j.prompt,
                        response_a=j.a,
                        response_b=j.b,
                        choice=choice,  # type: ignore[arg-type]
                        annotator=cast.annotator,
                    )
                )
    return found


def labelled_responses(
    connection: Connection, settings: Labels, points: int, split: Split = "all"
) -> tuple[list[LabelledResponse], dict[str, int]]:
    """Each rated reply with a thumb: up where the mean rating on [0, 1] is above `positive_from`."""
    groups: dict[str, list[Cast]] = defaultdict(list)
    for cast in votes_in(connection, settings, split, ("rating",)):
        groups[cast.item_sha256].append(cast)
    counts = Counter(votes=sum(map(len, groups.values())))
    found = []
    for group in groups.values():
        if len(group) < settings.min_votes:
            counts["dropped_few_votes"] += 1
            continue
        mean = float(np.mean([((c.answer.rating or 1) - 1) / (points - 1) for c in group]))
        if np.isclose(mean, settings.positive_from):
            counts["dropped_even_votes"] += 1
            continue
        prompt = from_dict(Prompt, group[0].prompt)
        response = group[0].replies[0]["text"]
        found.append(LabelledResponse(prompt=prompt, response=response, label=mean > settings.positive_from))
    counts["labelled"] = len(found)
    return found, dict(counts)


def stepped_responses(
    connection: Connection, settings: Labels, split: Split = "all"
) -> tuple[list[SteppedResponse], dict[str, int]]:
    """Each reply in steps with a mark by majority: right where neutral or right marks outnumber wrong ones.

    Steps after the first error of every annotator have no marks; the reply is cut off after its last marked step.
    """
    groups: dict[str, list[Cast]] = defaultdict(list)
    for cast in votes_in(connection, settings, split, ("steps",)):
        groups[cast.item_sha256].append(cast)
    counts = Counter(votes=sum(map(len, groups.values())))
    found = []
    for group in groups.values():
        labels: list[bool] = []
        for marks in zip(*(c.answer.steps for c in group), strict=True):
            given = [m for m in marks if m is not None]
            if not given:
                break
            labels.append(2 * sum(m >= 0 for m in given) > len(given))
        if len(group) < settings.min_votes or not labels:
            counts["dropped_few_votes"] += 1
            continue
        counts["steps_after_the_first_error"] += len(group[0].replies) - len(labels)
        steps = tuple(reply["text"] for reply in group[0].replies[: len(labels)])
        found.append(SteppedResponse(prompt=from_dict(Prompt, group[0].prompt), steps=steps, labels=tuple(labels)))
    counts["stepped"] = len(found)
    return found, dict(counts)


def demonstrations(
    connection: Connection, settings: Labels, split: Split = "all"
) -> tuple[list[Demonstration], dict[str, int]]:
    """Every reply that people wrote or edited."""
    casts = votes_in(connection, settings, split, ("demonstration", "edit"))
    found = [Demonstration(prompt=from_dict(Prompt, c.prompt), response=c.answer.text) for c in casts if c.answer.text]
    return found, {"votes": len(casts), "dropped_deleted_texts": len(casts) - len(found), "demonstrations": len(found)}


def groups(connection: Connection, settings: Labels, split: Split = "all") -> list[JsonDict]:
    """Each ranked set of replies with every annotator's ranking (places from best to worst, ties together) and the mean
    rank of each reply, 1 the best."""
    by_item: dict[str, list[Cast]] = defaultdict(list)
    for cast in votes_in(connection, settings, split, ("ranking",)):
        by_item[cast.item_sha256].append(cast)
    rows = []
    for casts in by_item.values():
        ranks = np.array([_ranks(c.answer.ranking) for c in casts])
        rows.append(
            {
                "prompt": casts[0].prompt["messages"],
                "id": casts[0].prompt_id,
                "responses": [reply["text"] for reply in casts[0].replies],
                "rankings": [
                    {"annotator": c.annotator, "ranking": [list(tier) for tier in c.answer.ranking]} for c in casts
                ],
                "mean_ranks": ranks.mean(axis=0).tolist(),
            }
        )
    return rows


def _ranks(ranking: Sequence[Sequence[int]]) -> list[float]:
    """The rank of each place, tied ones sharing their mean."""
    ranks: dict[int, float] = {}
    above = 0
    for tier in ranking:
        for place in tier:
            ranks[place] = above + (len(tier) + 1) / 2
        above += len(tier)
    return [ranks[place] for place in sorted(ranks)]


def _judgements(cast: Cast, settings: Labels) -> Iterable[_Judgement]:
    prompt = from_dict(Prompt, cast.prompt)
    texts = [reply["text"] for reply in cast.replies]
    if cast.kind == "ranking":
        for a, b, choice in ranked_pairs(cast.answer.ranking):
            yield _Judgement(f"{cast.item_sha256}/{a}-{b}", prompt, texts[a], texts[b], choice, 0.0, cast)
        return
    margin = 0.0
    if settings.margins and cast.answer.strength is not None:
        margin = settings.margins[min(cast.answer.strength, len(settings.margins)) - 1]
    yield _Judgement(cast.item_sha256, prompt, texts[0], texts[1], cast.answer.choice, margin, cast)


def _shares(judgements: Sequence[_Judgement], settings: Labels) -> dict[str, float]:
    """How strongly A of each pair is preferred, by the rule."""
    if not judgements:
        return {}
    rows = [
        (f"vote {j.cast.id}", {"item": j.key, "annotator": j.cast.annotator, "choice": j.choice}) for j in judgements
    ]
    votes = votes_from_rows(rows, order=("A", "tie", "both_bad", "B"))
    if not votes.pairwise:  # nobody chose a side
        return dict.fromkeys((j.key for j in judgements), 0.5)
    share = share_of_a(votes, aggregate(votes, _METHODS[settings.rule]))
    return dict(zip(votes.items, share.tolist(), strict=True))


def _adjudicated(connection: Connection, settings: Labels) -> dict[str, float]:
    """The share for A that an adjudicator's choice stands for."""
    worth = {"A": 1.0, "B": 0.0, "tie": 0.5, "both_bad": 0.5}
    decided: dict[str, float] = {}
    for cast in cast_votes(connection, purposes=("adjudication",), judged_only=True):
        if cast.kind in ("pairs", "ranking"):
            decided |= {j.key: worth[j.choice] for j in _judgements(cast, settings)}
    return decided


def _margin(group: Sequence[_Judgement], side: str) -> float:
    """Mean margin of the votes towards the preferred side; a vote for the other side counts against it."""
    signed = [j.margin if j.choice == side else -j.margin for j in group]
    return max(0.0, float(np.mean(signed)))


def _place(name: str) -> float:
    """As `data.preferences.split_by_prompt` places a prompt: the same prompts are held out from every source."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
