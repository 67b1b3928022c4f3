"""From votes to training records: aggregation, soft labels, margins, splits by prompt and by annotator."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from sqlalchemy import Connection

from trimtab.core.types import (
    Comparison,
    Demonstration,
    JsonDict,
    LabelledResponse,
    PreferencePair,
    Prompt,
    SteppedResponse,
    from_dict,
    prompt_id,
)
from trimtab.data.split import place_of_prompt
from trimtab.feedback.answers import as_in_a_form
from trimtab.feedback.project import LabelSettings
from trimtab.feedback.store import digest
from trimtab.feedback.votes import CountedVote, cast_votes
from trimtab.feedback.voting import JUDGED
from trimtab.stats import Floats
from trimtab.votes.aggregate import AggregationMethod, aggregate, share_of_a
from trimtab.votes.table import WORTH, ranked_pairs, votes_from_rows

LabelSplit = Literal["all", "train", "held_out"]


@dataclass(frozen=True)
class _Judgement:
    """One choice between two replies: of a pair, or out of a ranking."""

    key: str
    """Hash of the prompt and both replies."""
    prompt: Prompt
    a: str
    """The reply whose text sorts first, whichever side it was on: all votes over two replies have one orientation."""
    b: str
    choice: str
    """A, B, tie or both_bad, of these sides."""
    margin: float
    """Margin of the chosen side; 0 if the vote gives none."""
    cast: CountedVote


def votes_in(
    connection: Connection, settings: LabelSettings, split: LabelSplit, kinds: Sequence[str]
) -> tuple[list[CountedVote], Counter[str]]:
    """The votes of a split that judge replies of these kinds, and counts, also of those that say nothing of them.

    "held_out" has the held-out prompts and, if people are held out too, only the votes of those people. "train" has
    neither. Votes of other people on held-out prompts, and the reverse, are then in neither split.
    """
    chosen, num_not_judged = [], 0
    for cast, prompt_out in _placed(cast_votes(connection), settings, kinds):
        person_out = cast.annotator_place < settings.held_out_annotators
        keep = {
            "all": True,
            "train": not prompt_out and not person_out,
            "held_out": prompt_out and (person_out or settings.held_out_annotators == 0),
        }
        if keep[split] and cast.answer.choice in JUDGED:
            chosen.append(cast)
        elif keep[split]:
            num_not_judged += 1
    counts = Counter(votes=len(chosen))
    if num_not_judged:
        counts["not_judged"] = num_not_judged
    return chosen, counts


def decisions_in(
    connection: Connection, settings: LabelSettings, split: LabelSplit, kinds: Sequence[str]
) -> dict[str, CountedVote]:
    """The newest decision on each adjudicated task, by the item's hash.

    A decision is the project's and not a person's: it is in the split of its prompt, whoever made it. The choice
    "cannot_judge" decides that the item gives no label.
    """
    decisions = cast_votes(connection, purposes=("adjudication",))
    found = _placed((cast for cast in decisions if cast.item_purpose == "task"), settings, kinds)
    wanted = {"all": (True, False), "train": (False,), "held_out": (True,)}[split]
    return {cast.item_sha256: cast for cast, prompt_out in found if prompt_out in wanted}


def _placed(
    casts: Iterable[CountedVote], settings: LabelSettings, kinds: Sequence[str]
) -> Iterator[tuple[CountedVote, bool]]:
    """The votes on items of these kinds, each with whether its prompt is held out."""
    out: dict[int, bool] = {}
    for cast in casts:
        if cast.kind in kinds:
            if cast.item_id not in out:
                messages = from_dict(Prompt, cast.prompt).messages
                out[cast.item_id] = place_of_prompt(messages) < settings.held_out_prompts
            yield cast, out[cast.item_id]


def _by_item(
    connection: Connection, settings: LabelSettings, split: LabelSplit, kinds: Sequence[str]
) -> tuple[list[list[CountedVote]], Counter[str]]:
    """The votes on each item, in the order in which items were first judged, and counts. An adjudicated item has only
    its decision."""
    casts, counts = votes_in(connection, settings, split, kinds)
    groups: dict[str, list[CountedVote]] = defaultdict(list)
    for cast in casts:
        groups[cast.item_sha256].append(cast)
    for item, decision in decisions_in(connection, settings, split, kinds).items():
        groups[item] = [decision]
        if decision.answer.choice in JUDGED:
            counts["adjudicated"] += 1
        else:
            counts["dropped_left_out_items"] += 1
            del groups[item]
    return list(groups.values()), counts


def _too_few(group: Sequence[CountedVote], settings: LabelSettings) -> bool:
    return len(group) < settings.min_votes and group[0].purpose != "adjudication"


def preference_pairs(
    connection: Connection, settings: LabelSettings, split: LabelSplit = "all"
) -> tuple[list[PreferencePair], dict[str, int]]:
    """A pair for every two replies of which the votes prefer one, in the order they were first judged, and counts.

    An adjudicated item takes the adjudicator's choice and its strength, whatever became of its votes. An edited reply
    is preferred to the one it was made from.
    """
    kinds = ("pairs", "ranking")
    casts, counts = votes_in(connection, settings, split, kinds)
    decisions = decisions_in(connection, settings, split, kinds)
    left_out = {item for item, decision in decisions.items() if decision.answer.choice not in JUDGED}
    if left_out:
        counts["dropped_left_out_items"] = len(left_out)
        casts = [cast for cast in casts if cast.item_sha256 not in left_out]
    kept = []
    for judgement in (j for cast in casts for j in _judgements(cast, settings)):
        if judgement.choice == "both_bad" and settings.both_bad == "drop":
            counts["dropped_both_bad_votes"] += 1
        elif judgement.choice in ("tie", "both_bad") and settings.ties == "drop":
            counts["dropped_tie_votes"] += 1
        else:
            kept.append(judgement)
    by_key: dict[str, list[_Judgement]] = defaultdict(list)
    for judgement in kept:
        by_key[judgement.key].append(judgement)
    shares = _shares(kept, settings)
    decided = [j for item, cast in decisions.items() if item not in left_out for j in _judgements(cast, settings)]
    for judgement in decided:
        by_key[judgement.key] = [judgement]
        shares[judgement.key] = WORTH[judgement.choice]
    found = [_pair_of(group, shares[key], settings, counts) for key, group in by_key.items()]
    pairs = [pair for pair in found if pair is not None]
    edited, edit_counts = _edited_pairs(connection, settings, split)
    counts.update(edit_counts)
    counts["pairs"] = len(pairs) + len(edited)
    return pairs + edited, dict(counts)


def _pair_of(
    group: Sequence[_Judgement], share_a: float, settings: LabelSettings, counts: Counter[str]
) -> PreferencePair | None:
    """The pair that the judgements of two replies make, with this share for A; None if they are too few or do not
    decide, which is counted."""
    first, share = group[0], max(share_a, 1 - share_a)
    adjudicated = first.cast.purpose == "adjudication"
    counts["judged_pairs"] += 1
    if not adjudicated and len(group) < settings.min_votes:
        counts["dropped_few_votes"] += 1
    elif np.isclose(share_a, 0.5):
        counts["dropped_even_votes"] += 1
    elif share < settings.min_agreement:
        counts["dropped_low_agreement"] += 1
    else:
        counts["adjudicated"] += adjudicated
        chosen, rejected = (first.a, first.b) if share_a > 0.5 else (first.b, first.a)
        return PreferencePair(
            prompt=first.prompt,
            chosen=chosen,
            rejected=rejected,
            margin=_margin(group, "A" if share_a > 0.5 else "B") if settings.margins else None,
            label=1.0 if settings.rule == "majority" else float(share),
        )
    return None


def _edited_pairs(
    connection: Connection, settings: LabelSettings, split: LabelSplit
) -> tuple[list[PreferencePair], Counter[str]]:
    """A pair of each edited reply (chosen) and the one it was made from, if anything was changed; and counts."""
    found, counts = _by_item(connection, settings, split, ("edit",))
    pairs = []
    for cast in (cast for group in found for cast in group):
        original = cast.replies[0]["text"]
        if cast.answer.text and cast.answer.text != as_in_a_form(original):
            prompt = from_dict(Prompt, cast.prompt)
            pairs.append(PreferencePair(prompt=prompt, chosen=cast.answer.text, rejected=original))
    del counts["votes"]
    return pairs, counts + Counter(edited_replies=len(pairs))


def comparisons(
    connection: Connection, settings: LabelSettings, split: LabelSplit = "all"
) -> tuple[list[Comparison], dict[str, int]]:
    """Every vote between two replies by itself, of an adjudicated item only the decision; and counts.

    "Both bad" is a tie if the project says so; otherwise it is left out.
    """
    found = []
    groups, counts = _by_item(connection, settings, split, ("pairs", "ranking"))
    for cast in sorted((cast for group in groups for cast in group), key=lambda cast: cast.id):
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
            else:
                counts["dropped_both_bad_votes"] += 1
    return found, dict(counts)


def labelled_responses(
    connection: Connection, settings: LabelSettings, points: int, split: LabelSplit = "all"
) -> tuple[list[LabelledResponse], dict[str, int]]:
    """Each rated reply, labelled true if its mean rating, scaled to [0, 1], is above `positive_from`; and counts."""
    groups, counts = _by_item(connection, settings, split, ("rating",))
    found = []
    for group in groups:
        if _too_few(group, settings):
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
    connection: Connection, settings: LabelSettings, split: LabelSplit = "all"
) -> tuple[list[SteppedResponse], dict[str, int]]:
    """Each reply in steps with labels by majority: true if neutral and right marks outnumber wrong ones; and counts.

    Steps after the first error of every annotator have no marks; the reply is cut off after its last marked step.
    """
    groups, counts = _by_item(connection, settings, split, ("steps",))
    found = []
    for group in groups:
        labels: list[bool] = []
        for marks in zip(*(c.answer.steps for c in group), strict=True):
            given = [m for m in marks if m is not None]
            if not given:
                break
            labels.append(2 * sum(m >= 0 for m in given) > len(given))
        if _too_few(group, settings) or not labels:
            counts["dropped_few_votes"] += 1
            continue
        counts["steps_after_the_first_error"] += len(group[0].replies) - len(labels)
        steps = tuple(reply["text"] for reply in group[0].replies[: len(labels)])
        found.append(SteppedResponse(prompt=from_dict(Prompt, group[0].prompt), steps=steps, labels=tuple(labels)))
    counts["stepped"] = len(found)
    return found, dict(counts)


def demonstrations(
    connection: Connection, settings: LabelSettings, split: LabelSplit = "all"
) -> tuple[list[Demonstration], dict[str, int]]:
    """Every reply that people wrote or edited, and counts; of an adjudicated item only the adjudicator's."""
    groups, counts = _by_item(connection, settings, split, ("demonstration", "edit"))
    casts = [cast for group in groups for cast in group]
    found = [Demonstration(prompt=from_dict(Prompt, c.prompt), response=c.answer.text) for c in casts if c.answer.text]
    return found, counts | {"dropped_deleted_texts": len(casts) - len(found), "demonstrations": len(found)}


def groups(
    connection: Connection, settings: LabelSettings, split: LabelSplit = "all"
) -> tuple[list[JsonDict], dict[str, int]]:
    """Each ranked set of replies with all its rankings and the mean rank of each reply (1 is best); and counts.

    A ranking lists places from best to worst, with ties together. An adjudicated set has only the decision.
    """
    by_item, counts = _by_item(connection, settings, split, ("ranking",))
    rows = []
    for casts in by_item:
        if _too_few(casts, settings):
            counts["dropped_few_votes"] += 1
            continue
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
    return rows, dict(counts)


def _ranks(ranking: Sequence[Sequence[int]]) -> Floats:
    """The rank of each place; tied places share their mean rank."""
    tier = {place: i for i, places in enumerate(ranking) for place in places}
    return np.asarray(scipy.stats.rankdata([tier[place] for place in sorted(tier)]))


def _judgements(cast: CountedVote, settings: LabelSettings) -> Iterable[_Judgement]:
    prompt = from_dict(Prompt, cast.prompt)
    texts = [reply["text"] for reply in cast.replies]
    if cast.kind == "ranking":
        for a, b, choice in ranked_pairs(cast.answer.ranking):
            yield _judgement(prompt, texts[a], texts[b], choice, 0.0, cast)
        return
    margin = 0.0
    if settings.margins and cast.answer.strength is not None:
        margin = settings.margins[min(cast.answer.strength, len(settings.margins)) - 1]
    yield _judgement(prompt, texts[0], texts[1], cast.answer.choice, margin, cast)


def _judgement(prompt: Prompt, a: str, b: str, choice: str, margin: float, cast: CountedVote) -> _Judgement:
    """A judgement with its sides in a fixed order, so that the same two replies are one pair in all their items."""
    if b < a:
        a, b, choice = b, a, {"A": "B", "B": "A"}.get(choice, choice)
    return _Judgement(digest([prompt_id(prompt.messages), a, b]), prompt, a, b, choice, margin, cast)


def _shares(judgements: Sequence[_Judgement], settings: LabelSettings) -> dict[str, float]:
    """The share of preference for A of each pair, by the project's rule.

    By shares, a tie (and "both bad" if it counts) is half a vote for each side. The annotator models are fitted to the
    votes for a side only: the truth about a pair is A or B, and a tie says nothing about it, nor that its author is
    unreliable. A third class, chosen seldom or never, would take its part of every item's probability (with MACE, whose
    classes are equally likely beforehand, nearly all of it).
    """
    method: AggregationMethod = "majority" if settings.rule == "share" else settings.rule
    rows = [
        (f"vote {j.cast.id}", {"item": j.key, "annotator": j.cast.annotator, "choice": _side(j)})
        for j in judgements
        if method == "majority" or _side(j) != "tie"
    ]
    shares = {j.key: 0.5 for j in judgements}
    votes = votes_from_rows(rows)
    if votes.pairwise:  # somebody chose a side
        share = share_of_a(votes, aggregate(votes, method))
        shares |= dict(zip(votes.items, share.tolist(), strict=True))
    return shares


def _side(judgement: _Judgement) -> str:
    return "tie" if judgement.choice == "both_bad" else judgement.choice


def _margin(group: Sequence[_Judgement], side: str) -> float:
    """Mean margin of the votes towards the preferred side; a vote for the other side counts against it."""
    signed = [j.margin if j.choice == side else -j.margin for j in group]
    return max(0.0, float(np.mean(signed)))
