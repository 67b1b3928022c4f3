"""Distillation: a reward model that learns from the scores of other rewards, its teacher, in the place of labels.

The teacher scores both replies of every pair, and the sigmoid of the difference is the label that the student learns
(Bradley-Terry with soft labels). The scores themselves are not regressed on: only differences between replies to one
prompt move a policy, and how much a large model likes a prompt is for a small one much to learn and nothing to gain.
The student's scores are in the teacher's units all the same, divided by the temperature.

What the data says of the pairs is not learned from. It judges: the card of the student is on the held-out labels, and
says beside it how far the student orders these pairs as its teacher does, and how far the teacher orders them as
labelled. The teacher's scores are kept in teacher.jsonl, from which a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from trimtab.core import registry
from trimtab.core.errors import DataError
from trimtab.core.files import write_rows, writing
from trimtab.core.terminal import note
from trimtab.core.types import PreferencePair, Prompt, Rollout, prompt_id, to_dict
from trimtab.data.chat import Chat
from trimtab.data.pairs import Comparisons
from trimtab.evals.reward_card import SIDES, ordering_accuracy
from trimtab.rewards.combined import CombinedReward, judges, load_rewards, refuse_missing_facts, scales_apart
from trimtab.rewards.model import ModelReward
from trimtab.runs.models import local_digest
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise
from trimtab.stages.reward_settings import RewardSettings
from trimtab.stats import Floats, spearman

TEACHER_FILE = "teacher.jsonl"
"""The pairs with the teacher's scores of both replies, in the directory of the run."""


@dataclass(frozen=True)
class Taught:
    """What the teacher makes of the pairs."""

    train: Comparisons
    """Those to train on, with the teacher's labels."""
    held_out: Comparisons
    """Those to judge by, with the teacher's labels."""
    scores: Floats
    """[2, num_pairs], the teacher's scores of the held-out pairs: of their chosen and rejected replies."""


def teach(
    settings: RewardSettings, run: Run, chat: Chat, train: Comparisons, held_out: Comparisons, counts: dict[str, int]
) -> Taught:
    """The pairs as the teacher sees them. Its scores are read from teacher.jsonl, if this run has written it.

    `counts` counts the margins in the data, which are not learned from, and the pairs whose replies the teacher scores
    alike. Raises DataError if the teacher could not judge a reply, or gives both replies of every pair one score.
    """
    sets = {"train": train.pairs(), "held_out": held_out.pairs()}
    path = run.directory / TEACHER_FILE
    for name, digest in _digests(settings).items():  # models.json is not binding before the first checkpoint
        run.add_data(f"teacher {name}", digest, sum(map(len, sets.values())))
    if path.exists():
        found = _kept(path, sets)
    else:
        teacher = load_teacher(settings, list(chain(*sets.values())))
        seed_noise(settings.seed, "teacher")  # for teachers that draw random numbers
        scores = score_pairs(teacher, list(chain(*sets.values())), chat, where=settings.data)
        found = dict(zip(sets, np.split(scores, [len(sets["train"])], axis=1), strict=True))
        with writing(TEACHER_FILE, path):
            write_rows(path, (row for name, pairs in sets.items() for row in _rows(name, pairs, found[name])))
    margins = found["train"][0] - found["train"][1]
    if not margins.any():
        raise DataError(
            f"the teacher gives both replies of each of {len(margins)} pairs the same score: there is nothing to learn",
            where=f"teacher: {', '.join(_names(settings))}",
            fix="name a teacher that tells these replies apart, or give pairs whose replies differ in what it judges",
        )
    if tied := int((margins == 0).sum()):
        counts["pairs_tied_by_teacher"] = tied
        if 2 * tied > len(margins):
            note(
                f"the teacher gives both replies of {tied:,} of {len(margins):,} pairs the same score, so the "
                "student learns that they are alike"
            )
    if unread := int(np.isfinite(train.margins).sum()):
        counts["margins_not_learned_from"] = unread

    def relabelled(pairs: Comparisons, scores: Floats) -> Comparisons:
        return pairs.relabelled(scipy.special.expit((scores[0] - scores[1]) / settings.teacher_temperature))

    return Taught(relabelled(train, found["train"]), relabelled(held_out, found["held_out"]), found["held_out"])


def load_teacher(settings: RewardSettings, pairs: Sequence[PreferencePair]) -> CombinedReward:
    """The teacher, with its models on the device of the stage. Raises DataError if prompts lack a fact it needs."""
    prompts = list({prompt_id(pair.prompt.messages): pair.prompt for pair in pairs}.values())
    refuse_missing_facts(judges(settings), prompts, where=settings.data)
    device = settings.engine.find_device()
    return load_rewards(settings.teacher, token_budget=settings.token_budget, device=device)


def score_pairs(teacher: CombinedReward, pairs: Sequence[PreferencePair], chat: Chat, *, where: str) -> Floats:
    """[2, num_pairs] the teacher's scores of the chosen and the rejected reply of each pair. A reward model reads them
    as texts, with its own tokenizer. Raises DataError if it gives a reply no score."""
    rollouts = []
    for prompt, of_prompt in groupby(pairs, key=lambda pair: pair.prompt):
        ids = tuple(chat.encode_prompt(prompt.messages))
        rollouts += [finished(prompt, ids, getattr(pair, side), chat) for pair in of_prompt for side in SIDES]
    total, parts, _ = teacher.score_parts(rollouts)
    if apart := scales_apart(parts, {part.name: part.weight for part in teacher.parts}):
        note(f"of the teacher, {apart}; change the weights")
    scores = total.double().numpy()
    if bad := np.flatnonzero(~np.isfinite(scores)).tolist():
        raise DataError(
            f"the teacher gives {len(bad)} of {len(scores)} replies no score; the first is "
            f"{rollouts[bad[0]].response[:60]!r}, to {rollouts[bad[0]].prompt.text[:60]!r}",
            where=where,
            fix="leave these pairs out, or name a teacher that can judge them",
        )
    return scores.reshape(-1, 2).T


def finished(prompt: Prompt, prompt_ids: tuple[int, ...], reply: str, chat: Chat) -> Rollout:
    """A reply as a finished rollout, for rewards that read these. Nobody sampled it: its log-probabilities are 0."""
    ids = tuple(chat.encode_response(reply))
    return Rollout(
        prompt=prompt,
        response=reply,
        prompt_ids=prompt_ids,
        response_ids=ids,
        logprobs=(0.0,) * len(ids),
        finish_reason="stop",
    )


def agreement_with_teacher(
    settings: RewardSettings, pairs: Sequence[PreferencePair], student: Floats, teacher: Floats
) -> dict[str, Any]:
    """What the student keeps of its teacher, from the scores [2, num_pairs] of both for chosen and rejected replies.

    `agreement` is the share of pairs that the student orders as the teacher does, its ties half, without the `num_tied`
    pairs that the teacher does not order; `margin_spearman` is the rank correlation of the two margins. `accuracy` is
    the teacher's own, beside which that of the student stands on the card. Intervals resample prompts.
    """
    prompts = np.array([prompt_id(pair.prompt.messages) for pair in pairs])
    decided = np.array([pair.label != 0.5 for pair in pairs])
    ours, theirs = student[0] - student[1], teacher[0] - teacher[1]
    ordered = theirs != 0
    alike = (np.sign(theirs) * ours)[ordered]
    agreement = ordering_accuracy(alike, np.zeros_like(alike), prompts[ordered].tolist())
    accuracy = ordering_accuracy(teacher[0, decided], teacher[1, decided], prompts[decided].tolist())
    return {
        "names": _names(settings),
        "temperature": settings.teacher_temperature,
        "num_tied": int((~ordered).sum()),
        "margin_spearman": spearman(ours, theirs),
        **agreement.named("agreement"),
        **accuracy.named("accuracy"),
    }


def _digests(settings: RewardSettings) -> dict[str, str]:
    """The digests of the teacher's models that are in directories, by their paths: the labels depend on these."""
    paths = [reward.path for reward in settings.teacher if isinstance(reward, ModelReward)]
    return {path: digest for path in paths if (digest := local_digest(path)) is not None}


def _names(settings: RewardSettings) -> list[str]:
    """The teacher's rewards as a card names them: a reward model by its path."""
    return [getattr(reward, "path", registry.name_of("reward", type(reward))) for reward in settings.teacher]


def _rows(name: str, pairs: Sequence[PreferencePair], scores: Floats) -> list[dict[str, Any]]:
    both = zip(pairs, scores[0].tolist(), scores[1].tolist(), strict=True)
    return [to_dict(pair) | {"set": name, "teacher_chosen": a, "teacher_rejected": b} for pair, a, b in both]


def _kept(path: Path, sets: dict[str, list[PreferencePair]]) -> dict[str, Floats]:
    """The scores in teacher.jsonl. Raises DataError if they are not those of these pairs."""
    try:
        with path.open(encoding="utf-8") as file:  # read by its line breaks: a text may hold what splitlines() cuts at
            rows = [json.loads(line) for line in file]
        found = {
            name: np.array(
                [[r["teacher_chosen"], r["teacher_rejected"]] for r in rows if r["set"] == name], dtype=float
            )
            for name in sets
        }
        texts = [(row["set"], row["chosen"], row["rejected"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise _lost(f"{TEACHER_FILE} is damaged: {error!r}", path) from error
    if texts != [(name, pair.chosen, pair.rejected) for name, pairs in sets.items() for pair in pairs]:
        raise _lost(f"{TEACHER_FILE} holds the scores of other pairs than those of this run", path)
    return {name: values.reshape(-1, 2).T for name, values in found.items()}


def _lost(problem: str, path: Path) -> DataError:
    return DataError(problem, where=str(path), fix="remove it: the teacher then scores the pairs again")
