"""Asks a model the questions of a suite and writes the figures.

The model and its baseline are asked one after the other, so that one is in memory at a time, with the same items and
the same random numbers, each under its own chat template. Replies come from the sampler and
log-probabilities from the scorer that training uses; what they are worth is left to `evals.suites`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core import config, seeds
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import check_out, finite, json_lines, json_text, write_out
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat
from trimtab.engines.build import Engines, load_policy, sampling_roles
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.evals.suites.report import report
from trimtab.evals.suites.results import VERSION
from trimtab.evals.suites.suite import (
    Question,
    SuiteAnswer,
    SuiteItem,
    check_limit,
    load_items,
    load_suite,
    refuse_itself,
)
from trimtab.math.masking import sum_per_sequence
from trimtab.models.load import load_tokenizer
from trimtab.rewards.scorer import TOKEN_BUDGET
from trimtab.runs.environment import environment
from trimtab.runs.models import local_digest

MAX_PROMPT_TOKENS = 8192
"""A longer conversation of a suite is refused."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """How one model is asked."""

    model: str
    """The checkpoint."""
    sampling: Sampling
    """How replies are drawn."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How it is computed."""
    seed: int = 0
    """Seed of the replies."""


def run_suite(
    name: str,
    model: str,
    baseline: str | None = None,
    *,
    data: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    engine: dict[str, Any] | None = None,
    out: Path | None = None,
    replies: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Asks a model, and its baseline if one is given, the items of a suite; returns what is written to `out` as JSON.

    `data` and `limit` are as in `load_items`. `engine` holds settings of `EngineSettings`. `replies` is a file for the
    answers themselves, as JSON lines; they may be harmful texts, so that the figures are kept apart from them. Both
    files are written whole at the end. Raises DataError, ConfigError or EngineError.
    """
    check_limit(limit)
    refuse_itself(model, baseline)
    if out is not None and replies is not None and os.path.realpath(out) == os.path.realpath(replies):
        raise ConfigError(
            f"the figures and the replies would both be written to {out}",
            where="--out and --replies",
            fix="name two files",
        )
    check_out(out, replies)
    suite = load_suite(name)
    loaded = load_items(suite, data, limit=limit, seed=seed)
    decoding: dict[str, Any] = {"top_k": 1} if suite.temperature == 0 else {"temperature": suite.temperature}
    length = max_new_tokens or suite.max_new_tokens
    sampling = Sampling(max_new_tokens=length, max_prompt_tokens=MAX_PROMPT_TOKENS, **decoding)
    how = config.resolve(EngineSettings, engine or {}, where="the command line")
    answers: dict[str, list[list[SuiteAnswer]]] = {}
    seconds: dict[str, float] = {}
    for role, path in (("model", model), ("baseline", baseline)):
        if path is not None:
            begin = time.monotonic()
            answers[role] = ask(SuiteSettings(model=path, sampling=sampling, engine=how, seed=seed), loaded.items)
            seconds[role] = round(time.monotonic() - begin, 1)
    found = {
        "version": VERSION,
        "suite": name,
        "paper": suite.paper,
        "notes": list(suite.notes),
        "model": model,
        "model_sha256": local_digest(model),
        "baseline": baseline,
        "baseline_sha256": None if baseline is None else local_digest(baseline),
        "data": loaded.sources,
        "num_available": loaded.num_available,
        "settings": {"limit": limit, "seed": seed, "max_new_tokens": length, "temperature": suite.temperature},
        "engine": how,
        "command": command,
        "environment": environment(),
        "seconds": seconds,
        **report(suite, loaded.items, answers["model"], answers.get("baseline"), seed=seed),
    }
    if replies is not None:
        write_out(replies, json_lines(_rows(loaded.items, answers)))
    if out is not None:
        write_out(out, json_text(found))
    values: dict[str, Any] = finite(found)
    return values


def ask(settings: SuiteSettings, items: Sequence[SuiteItem]) -> list[list[SuiteAnswer]]:
    """The answers of one model to the questions of each item."""
    chat = Chat(load_tokenizer(settings.model))
    policy = load_policy(settings.model, chat, settings)
    with Engines.start(settings, Path(), load=sampling_roles, models={"policy": policy}) as engines:
        sampler = engines.sampler(policy, chat, settings.sampling)
        questions = [question for item in items for question in item.questions]
        generated = [i for i, question in enumerate(questions) if not question.options]
        chosen = [i for i, question in enumerate(questions) if question.options]
        answers: dict[int, SuiteAnswer] = {}
        if generated:
            asked = [questions[i] for i in generated]
            answers |= zip(generated, replies_to(asked, sampler, seed=settings.seed), strict=True)
        if chosen:
            scorer = LocalScorer(policy, token_budget=TOKEN_BUDGET)
            asked = [questions[i] for i in chosen]
            answers |= zip(chosen, option_logprobs(asked, sampler, scorer, chat), strict=True)
    ordered = iter(answers[i] for i in range(len(questions)))
    return [[next(ordered) for _ in item.questions] for item in items]


def replies_to(questions: Sequence[Question], sampler: LocalSampler, *, seed: int) -> list[SuiteAnswer]:
    """Generated answers. All conversations of a turn are drawn together, and those with one number of samples."""
    found: dict[int, list[tuple[str, bool]]] = {i: [] for i in range(len(questions))}
    for turn in range(max(len(question.turns) for question in questions)):
        for num_samples in sorted({question.num_samples for question in questions}):
            here = [i for i, one in enumerate(questions) if turn < len(one.turns) and one.num_samples == num_samples]
            prompts = [_prompt(questions[i], [text for text, _ in found[i]], turn) for i in here]
            rollouts = sampler.generate(prompts, group_size=num_samples, seed=seeds.derive(seed, "suite", turn))
            for place, rollout in enumerate(rollouts):
                cut = rollout.finish_reason == "length"
                found[here[place // num_samples]].append((rollout.response, cut))
    return [
        SuiteAnswer(replies=tuple(text for text, _ in row), num_truncated=sum(cut for _, cut in row))
        for row in found.values()
    ]


def option_logprobs(
    questions: Sequence[Question], sampler: LocalSampler, scorer: LocalScorer, chat: Chat
) -> list[SuiteAnswer]:
    """Log-probabilities of the options as replies, without their end token; one tree for each conversation. Raises
    DataError for an option without a token, and what `check_room` raises for one that is too long for the model."""
    ids = {option: chat.encode_response(option, ended=False) for one in questions for option in one.options}
    if empty := [option for option, tokens in ids.items() if not tokens]:
        raise DataError(f"the option {empty[0]!r} has no tokens", where="the suite's data", fix="leave such rows out")
    said: dict[int, list[str]] = {i: [] for i in range(len(questions))}
    rows: dict[int, list[tuple[float, ...]]] = {i: [] for i in range(len(questions))}
    for turn in range(max(len(question.turns) for question in questions)):
        here = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        trees = []
        for i, prompt in zip(here, sampler.encode([_prompt(questions[i], said[i], turn) for i in here]), strict=True):
            replies = [ids[option] for option in questions[i].options]
            sampler.check_room(len(prompt), max(map(len, replies)))
            trees.append(response_tree(prompt, replies))
        batch = TokenTrees.build(trees)
        logprobs = scorer.logprobs(batch).to(torch.float64)
        values = iter(sum_per_sequence(logprobs, batch.sequence_ids, batch.num_sequences).tolist())
        for i in here:
            row = tuple(next(values) for _ in questions[i].options)
            rows[i].append(row)
            said[i].append(questions[i].options[row.index(max(row))])
    return [
        SuiteAnswer(logprobs=tuple(rows[i]), num_tokens=tuple(len(ids[option]) for option in question.options))
        for i, question in enumerate(questions)
    ]


def _prompt(question: Question, said: Sequence[str], turn: int) -> Prompt:
    """The conversation up to a user turn, with the replies so far."""
    messages: list[Message] = []
    for number, text in enumerate(question.turns[: turn + 1]):
        messages.append(Message("user", text))
        if number < turn:
            messages.append(Message("assistant", said[number]))
    return Prompt(messages=tuple(messages))


def _rows(items: Sequence[SuiteItem], answers: dict[str, list[list[SuiteAnswer]]]) -> Iterator[dict[str, Any]]:
    """A row for each question and model: the turns, and what was answered."""
    for role, given in answers.items():
        for item, row in zip(items, given, strict=True):
            for question, answer in zip(item.questions, row, strict=True):
                asked = {"id": item.id, "role": role, "turns": question.turns, "options": question.options}
                yield asked | {"replies": answer.replies, "logprobs": answer.logprobs}
