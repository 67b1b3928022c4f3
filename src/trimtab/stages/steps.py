"""Label the steps of replies by rollouts: completions from the end of each step, judged by a verifier.

A step is good if the reply can still end right from it (Math-Shepherd: Wang et al., arXiv:2312.08935, section 3.3). A
policy continues the token ids of the reply up to the end of each step; rewards judge the whole texts. The last step is
judged by the reply itself, as there is nothing left to complete. What is written is the stepwise layout, for a process
model, and the same replies with their outcomes, for an outcome model. Rows are written a few replies at a time, from
which a killed run goes on.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch

from trimtab.core import seeds
from trimtab.core.config import Choice
from trimtab.core.errors import DataError
from trimtab.core.metrics import Metrics, Total, mean_of
from trimtab.core.types import Demonstration, JsonDict, Rollout, to_dict
from trimtab.data.chat import Chat
from trimtab.data.graded import step_ends
from trimtab.engines.build import Engines, load_policy, sampling_roles
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_tokenizer
from trimtab.rewards.combined import CombinedReward, judges, load_rewards, refuse_missing_facts
from trimtab.runs.loop import JointState, stepping
from trimtab.runs.run import Run
from trimtab.stages.noise import seed_noise
from trimtab.stages.reading import read
from trimtab.stages.rows_file import RowsFile
from trimtab.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class StepsSettings:
    """Settings of the steps stage."""

    model: str
    """The policy that completes the replies, usually the one that wrote them."""
    data: str
    """Replies in steps: demonstrations, or a file of `trimtab generate`. Their prompts hold the facts that the verifier
    reads."""
    limit: int | None = None
    """Use only the first replies."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Refuse the data at a bad row, or drop and count such rows."""
    rewards: Annotated[tuple[Any, ...], Choice("reward")]
    """The verifier, such as ["exact_answer"]; several are added up with their weights."""
    right_from: float = 0.5
    """The lowest reward of a right reply."""
    separator: str = "\n"
    """The text between steps."""
    num_completions: int = 8
    """Completions from the end of each step."""
    labels: Literal["hard", "soft"] = "hard"
    """Hard: a step is right if at least one completion is. Soft: the label is the share of right completions."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn; max_new_tokens bounds each of them."""
    replies_per_step: int = 16
    """Replies whose steps are labelled together. Bounds memory and what a kill can lose; changes no label."""
    max_steps: int | None = None
    """Stop after this many rounds of replies; None labels all."""
    token_budget: int = 4096
    """Tokens of one forward pass of a reward model: memory and speed only."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How the stage is computed."""
    seed: int = 0
    """Seed of the completions."""
    trackers: Annotated[tuple[Any, ...], Choice("tracker")] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards is empty; name the verifier, such as rewards = ['exact_answer']")
        if not self.separator:
            raise ValueError("separator is empty; name the text that stands between steps")
        bounds = [getattr(reward, "bounds", None) for reward in self.rewards]
        if None in bounds:
            return
        ends = [
            [reward.weight * end for end in both] for reward, both in zip(self.rewards, bounds, strict=True) if both
        ]
        low, high = (sum(map(end, ends)) + 0.0 for end in (min, max))
        if not low < self.right_from <= high:
            why = "no reply can be right" if self.right_from > high else "every reply is right"
            raise ValueError(
                f"right_from = {self.right_from:g}, and the rewards give a reply from {low:g} to {high:g}: {why}"
            )


class Begun(NamedTuple):
    """A reply in token ids, the places where its steps end, and its steps as texts."""

    record: Demonstration
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    steps: tuple[str, ...]


def run(settings: StepsSettings, run: Run) -> None:
    """Writes steps.jsonl (the stepwise layout) and outcomes.jsonl (replies with thumbs)."""
    chat = Chat(load_tokenizer(settings.model))
    options: dict[str, Any] = {"on_bad_row": settings.on_bad_row, "limit": settings.limit, "accepts": chat.refusal}
    loaded = read(Demonstration, settings.data, run, **options)
    begun, counts = begin(loaded.records, chat, settings)
    refuse_missing_facts(judges(settings), [one.record.prompt for one in begun], where=settings.data)
    device = settings.engine.find_device()
    verifier = load_rewards(settings.rewards, token_budget=settings.token_budget, device=device)
    policy = load_policy(settings.model, chat, settings)
    engines = Engines.start(settings, run.directory, load=sampling_roles, models={"policy": policy})
    sampler = engines.sampler(policy, chat, settings.sampling)
    sampler.check_room(max(len(one.prompt_ids) + len(one.ids) for one in begun), settings.sampling.max_new_tokens)
    run.note_path("sampler", sampler.sampler)
    stepwise, outcomes = RowsFile(run.directory / "steps.jsonl"), RowsFile(run.directory / "outcomes.jsonl")
    state = JointState([stepwise, outcomes])
    num_planned = math.ceil(len(begun) / settings.replies_per_step)
    num_steps = min(num_planned, settings.max_steps or num_planned)
    with engines, stepping(run, state, num_steps=num_steps, checkpoint_every=1, description="steps") as steps:
        for number in steps:
            seed_noise(settings.seed, "steps", number)
            first = number * settings.replies_per_step
            mine = begun[first : first + settings.replies_per_step]
            labelled, judged, metrics = label_step(first, mine, sampler=sampler, verifier=verifier, settings=settings)
            stepwise.append_rows(labelled)
            outcomes.append_rows(judged)
            steps.log(metrics)
    rows = {"stepwise_rows": stepwise.num_rows, "outcome_rows": outcomes.num_rows}
    run.finish({
        "num_steps": num_steps,
        "num_planned_steps": num_planned,
        "num_completions": settings.num_completions,
        "labels": settings.labels,
        "sampler": sampler.sampler,
        "counts": dict(loaded.counts) | counts | rows,
    })  # fmt: skip


def begin(records: Sequence[Demonstration], chat: Chat, settings: StepsSettings) -> tuple[list[Begun], dict[str, int]]:
    """The replies with the ends of their steps; those that can not be labelled are counted. Raises DataError if none is
    left, or if none has the separator between two steps."""
    counts: Counter[str] = Counter()
    found = []
    for record in records:
        prompt_ids = tuple(chat.encode_prompt(record.prompt.messages))
        if len(prompt_ids) > settings.sampling.max_prompt_tokens:
            counts["dropped_long_prompts"] += 1
            continue
        ids = tuple(chat.encode_response(record.response))
        ends = step_ends(chat, ids, settings.separator)
        steps = steps_of(record.response, settings.separator)
        if len(steps) != len(ends):  # a token holds a step whole
            counts["dropped_steps_in_one_token"] += 1
            continue
        counts["one_step_replies"] += len(ends) == 1
        found.append(Begun(record, prompt_ids, ids, tuple(ends), steps))
    if not found:
        raise DataError(
            f"none of {len(records)} replies can be labelled: {counts['dropped_long_prompts']} have a prompt of more "
            f"than {settings.sampling.max_prompt_tokens} tokens, {counts['dropped_steps_in_one_token']} a token that "
            "holds a step whole",
            where=settings.data,
            fix="raise sampling.max_prompt_tokens, or set separator to the text that stands between steps",
        )
    if counts["one_step_replies"] == len(found):
        raise DataError(
            f"none of {len(found)} replies has the separator {settings.separator!r} between two steps",
            where=settings.data,
            fix="set separator to the text that stands between the steps of these replies, or give others",
        )
    return found, dict(counts)


def steps_of(text: str, separator: str) -> tuple[str, ...]:
    """The steps of a reply as texts, which joined by the separator are the reply but for blanks around it."""
    steps: list[str] = []
    for piece in text.split(separator):
        if not steps or (piece.strip() and steps[-1].strip()):
            steps.append(piece)
        else:
            steps[-1] += separator + piece
    return tuple(steps)


def label_step(
    first: int,
    begun: Sequence[Begun],
    *,
    sampler: LocalSampler,
    verifier: CombinedReward,
    settings: StepsSettings,
) -> tuple[list[JsonDict], list[JsonDict], Metrics]:
    """Rows of steps.jsonl and of outcomes.jsonl for these replies, of which `first` is the number of the first; and
    metrics. A step whose completions cannot be judged has the label null, and a reply that cannot is left out of the
    outcomes."""
    started, size = time.perf_counter(), settings.num_completions
    open_ends = [(i, end) for i, one in enumerate(begun) for end in one.ends[:-1]]
    prefixes = [begun[i].prompt_ids + begun[i].ids[: end + 1] for i, end in open_ends]
    uniforms = np.empty((len(prefixes) * size, settings.sampling.max_new_tokens))
    # The random numbers of a completion come from its reply's place in the data, its step and its own number.
    seed = seeds.derive(settings.seed, "steps")
    names = [(first + i, end, g) for i, end in open_ends for g in range(size)]
    for i, name in enumerate(names):
        uniforms[i] = seeds.generator(seed, *name).random(uniforms.shape[1])
    drawn = sampler.continue_ids(prefixes, group_size=size, uniforms=torch.from_numpy(uniforms))
    generated = time.perf_counter()
    completed = [
        rollout_of(begun[i], begun[i].ids[: end + 1] + tuple(ids), stopped, sampler)
        for (i, end), (ids, _, stopped) in zip([pair for pair in open_ends for _ in range(size)], drawn, strict=True)
    ]
    whole = [rollout_of(one, one.ids, True, sampler) for one in begun]
    rewards = verifier.score_parts([*completed, *whole])[0].tolist()
    judged, outcomes = rewards[: len(completed)], rewards[len(completed) :]
    groups = iter([judged[i : i + size] for i in range(0, len(judged), size)])
    stepwise, thumbs = [], []
    for one, outcome in zip(begun, outcomes, strict=True):
        counted = [right_of(next(groups), settings.right_from) for _ in one.ends[:-1]]
        counted.append(right_of([outcome], settings.right_from))
        prompt = to_dict(one.record.prompt)
        asked = {"prompt": prompt["messages"], "id": prompt["id"], "facts": prompt["facts"]}
        labelled = [label_of(*c, settings.labels) for c in counted]
        stepwise.append(asked | {"completions": list(one.steps), "labels": labelled, "num_right": counted})
        if counted[-1][1]:
            thumbs.append(asked | {"completion": one.record.response, "label": bool(counted[-1][0])})
    labels = [label for row in stepwise for label in row["labels"] if label is not None]
    metrics: Metrics = {
        "steps/right_fraction": mean_of(map(float, labels)),
        "steps/completions_right_fraction": mean_of(
            float(r >= settings.right_from) for r in judged if not math.isnan(r)
        ),
        "steps/unjudged": Total(sum(math.isnan(reward) for reward in rewards)),
        "rollout/length_mean": mean_of(len(ids) for ids, _, _ in drawn),
        "rollout/truncated_fraction": mean_of(not stopped for _, _, stopped in drawn),
        "time/generate_seconds": Total(generated - started),
        "time/score_seconds": Total(time.perf_counter() - generated),
    }
    return stepwise, thumbs, metrics


def rollout_of(one: Begun, ids: Sequence[int], stopped: bool, sampler: LocalSampler) -> Rollout:
    """A reply with these ids, as rewards read it. Its log-probabilities are not known, since only a part was drawn."""
    return Rollout(
        prompt=one.record.prompt,
        response=sampler.text(ids),
        prompt_ids=one.prompt_ids,
        response_ids=tuple(ids),
        logprobs=(math.nan,) * len(ids),
        finish_reason="stop" if stopped else "length",
    )


def right_of(rewards: Sequence[float], right_from: float) -> tuple[int, int]:
    """The number of right completions, and the number of those that were judged."""
    known = [reward for reward in rewards if not math.isnan(reward)]
    return sum(reward >= right_from for reward in known), len(known)


def label_of(num_right: int, num_judged: int, labels: str) -> bool | float | None:
    """The label of a step; None if no completion was judged."""
    if not num_judged:
        return None
    return num_right > 0 if labels == "hard" else num_right / num_judged


STAGE = Stage(
    settings=StepsSettings,
    run=run,
    data=lambda _settings: (Demonstration,),
    writes=("steps.jsonl", "outcomes.jsonl", "metrics.jsonl"),
    grows=("max_steps",),
    about="Steps of replies were labelled by completions from their ends, which a verifier judged.",
    charts=(("steps/right_fraction", "steps/completions_right_fraction"),),
)
